"""Membership inference: can rows to forget be told from rows that no model has seen?

Every attack gives a score that is the higher the more the row looks as if it had been trained on.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from posttrain.evaluation.bootstrap import Estimate
from posttrain.evaluation.unlearning.tokens import AnswerTokens, Array

# Where the deviation of log p vanishes (a certain prediction) Min-K++ divides by this instead, nats.
SMALLEST_DEVIATION = 1e-6


def loss(answers: AnswerTokens) -> Array:
    """LOSS (arXiv:1709.01604): minus the mean NLL."""
    return -answers.mean_nll


def zlib_ratio(answers: AnswerTokens, texts: Sequence[str]) -> Array:
    """ZLib (arXiv:2012.07805): minus the mean NLL over the compressed length of the text in bytes."""
    return loss(answers) / np.array([len(zlib.compress(text.encode("utf-8"))) for text in texts])


def min_k(answers: AnswerTokens, share: float) -> Array:
    """Min-K (arXiv:2310.16789): mean log p of the least likely tokens.

    Args:
        share: of an answer's tokens; at least one is taken.
    """
    return np.array([_lowest(one, share) for one in answers.per_answer(answers.logp)])


def min_k_plus_plus(answers: AnswerTokens, share: float) -> Array:
    """Min-K++ (arXiv:2404.02936): `min_k` of (log p - mean) / deviation, those of log p under all tokens."""
    deviation = np.maximum(np.sqrt(np.maximum(answers.surprisal_variance, 0.0)), SMALLEST_DEVIATION)
    return np.array([_lowest(one, share) for one in answers.per_answer((answers.logp + answers.entropy) / deviation)])


def reference_ratio(answers: AnswerTokens, reference: AnswerTokens) -> Array:
    """Reference (arXiv:2112.03570): mean NLL of a reference model minus the model's own."""
    return reference.mean_nll - answers.mean_nll


def _lowest(values: Array, share: float) -> float:
    # the small addend: 0.29 * 100 is below 29 in floating point
    count = max(1, int(share * len(values) + 1e-9))
    return float(np.partition(values, count - 1)[:count].mean())


def auc(members: Array, others: Array) -> float:
    """Probability that a member's score lies above another row's, ties counting half: 1 tells all members."""
    return float(_above(members, others).mean())


def auc_estimate(
    members: Array, others: Array, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """`auc` with a percentile bootstrap interval, members and others each drawn again; ``n`` counts both."""
    above = _above(members, others)
    generator = np.random.default_rng(seed)
    first, second = (generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in above.shape)
    drawn = ((first @ above) * second).sum(axis=1) / above.size
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(above.mean()), float(low), float(high), len(members) + len(others))


def _above(members: Array, others: Array) -> Array:
    difference = members[:, None] - others[None, :]
    return (difference > 0) + 0.5 * (difference == 0)


def privacy_leak(model_auc: float, retain_auc: float) -> float:
    """PrivLeak (arXiv:2407.06460) in percent: 100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain).

    Near 0 for a model that tells members as poorly as the retain model; below 0 where traces of the rows to forget are
    left, above 0 where forgetting itself sets them apart.

    Raises:
        ValueError: the retain model tells every member, so that there is nothing to divide by.
    """
    if retain_auc >= 1:
        raise ValueError("PrivLeak divides by 1 - AUC of the retain model, and that AUC is 1.")
    return 100 * ((1 - model_auc) - (1 - retain_auc)) / (1 - retain_auc)
