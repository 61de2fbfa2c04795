"""Metrics of unlearning as functions of cached per-token statistics, with their values for each item."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from posttrain.evaluation.unlearning.tokens import AnswerTokens, Array

# How several perturbed answers become one probability in the truth ratio.
MEANS = ("geometric", "arithmetic")


def probability(answers: AnswerTokens) -> Array:
    """exp(-mean NLL over the answer's tokens), its end included (arXiv:2401.06121)."""
    return np.exp(-answers.mean_nll)


def normalised_probability(true_nll: Array, false_nll: Sequence[Array]) -> Array:
    """P(true answer) / (P(true answer) + sum of P(false answer)), each P normalised by length as in `probability`.

    Args:
        true_nll: (items,) nats a token.
        false_nll: an array (false answers,) for each item, nats a token.
    """
    # against the true answer, so that nothing underflows where all are improbable
    pairs = zip(true_nll, false_nll, strict=True)
    return 1.0 / (1.0 + np.array([np.exp(np.minimum(true - false, _LARGEST)).sum() for true, false in pairs]))


# e to this power is finite in float64.
_LARGEST = 700.0


def log_truth_ratio(paraphrase_nll: Array, perturbed_nll: Sequence[Array], mean: str) -> Array:
    """log of P(perturbed) / P(paraphrase), each P normalised by length (arXiv:2401.06121).

    Args:
        paraphrase_nll: (items,) nats a token; of the answer itself where there is no paraphrase.
        perturbed_nll: an array (perturbed answers,) for each item, nats a token.
        mean: over an item's perturbed answers: ``arithmetic`` is the paper's, ``geometric`` what its code came to.
    """
    if mean == "geometric":
        perturbed = np.array([-one.mean() for one in perturbed_nll])
    else:
        perturbed = np.array([np.logaddexp.reduce(-one) - np.log(len(one)) for one in perturbed_nll])
    return perturbed + paraphrase_nll


def forget_truth_ratio(log_ratio: Array) -> Array:
    """min(R, 1 / R): 1 where the model cannot tell the right answer from wrong ones."""
    return np.exp(-np.abs(log_ratio))


def retain_truth_ratio(log_ratio: Array) -> Array:
    """max(0, 1 - R): towards 1 where the right answer is much more likely than wrong ones."""
    return np.maximum(0.0, -np.expm1(np.minimum(log_ratio, _LARGEST)))


def forget_quality(log_ratio: Array, retain_log_ratio: Array) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov test of the items' truth ratios against those of a model that never saw them.

    Args:
        log_ratio, retain_log_ratio: (items,) of the unlearned and the retain model; the test is the same for R, 1 / R
            and log R.

    Returns:
        p-value (high: the two cannot be told apart) and statistic (largest distance of the two distributions).
    """
    found = stats.ks_2samp(log_ratio, retain_log_ratio)
    return float(found.pvalue), float(found.statistic)


def exact_memorization(answers: AnswerTokens) -> Array:
    """Share of an answer's tokens, without its end, that are the most probable ones; NaN for an answer of none."""
    hits = [one[:length].mean() if length else np.nan for one, length in _hits(answers)]
    return np.array(hits, dtype=np.float64)


def extraction_strength(answers: AnswerTokens) -> Array:
    """1 - k / |y| with the smallest k such that all tokens of y from the k-th on are the most probable ones.

    The answer y is taken without its end and teacher-forced. An answer whose last token is missed has k = |y|, so the
    floor is 0; code that stops at k = |y| - 1 never falls below 1 / |y| (arXiv:2406.09179). NaN for an answer of none.
    """
    found = []
    for hits, length in _hits(answers):
        missed = np.flatnonzero(~hits[:length])
        shortest = int(missed[-1]) + 1 if len(missed) else 0
        found.append(1.0 - shortest / length if length else np.nan)
    return np.array(found, dtype=np.float64)


def _hits(answers: AnswerTokens) -> list[tuple[Array, int]]:
    lengths = answers.text_lengths.tolist()
    return list(zip(answers.per_answer(answers.is_top1), lengths, strict=True))


def harmonic_mean(values: npt.ArrayLike) -> Array:
    """Over the last axis; 0 where a value is 0."""
    given = np.asarray(values, dtype=np.float64)
    positive = (given > 0).all(axis=-1)
    safe = np.where(given > 0, given, 1.0)
    return np.where(positive, given.shape[-1] / (1.0 / safe).sum(axis=-1), 0.0)
