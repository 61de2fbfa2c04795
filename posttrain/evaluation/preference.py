"""Held-out pairs: does the implicit reward order them as the truth does, and is its margin a probability?

The implicit reward of a completion is beta times its log-ratio, the model's log-probability minus the reference's,
summed over its tokens in nats (arXiv:2305.18290 Eq. 5).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from posttrain import objectives
from posttrain.evaluation import bootstrap, calibration
from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.likelihood import likelihood
from posttrain.evaluation.rows import Row, is_pair, require
from posttrain.statistics import signature

Array = npt.NDArray[Any]
ACCEPTS = "a prompt with chosen and rejected"

# They take beta and log-ratios, and sigmoid(beta * margin of log-ratios) is not the preference that they model.
_OTHER_PREFERENCES = frozenset({"cal_dpo", "f_dpo", "hinge", "sppo", "tdpo"})


@dataclass(frozen=True, eq=False)
class Pairs:
    """Log-probabilities of held-out pairs, each pair turned so that the chosen completion is the better one in truth.

    Args:
        index: (pairs,) row numbers, ascending.
        chosen, rejected: (pairs,) nats, of the model, summed over the completion.
        reference_chosen, reference_rejected: (pairs,) nats, of the reference.
        probability: (pairs,) true probability that chosen is preferred, from 1/2 (a tie) to 1.
        beta: reward per nat; None where the objective has no such model of preferences.
        truncated: completions cut at the longest sequence's length.
        skipped: rows of which a completion has no token left to score.
    """

    index: Array
    chosen: Array
    rejected: Array
    reference_chosen: Array
    reference_rejected: Array
    probability: Array
    beta: float | None
    truncated: int
    skipped: int

    @property
    def margin(self) -> Array:
        """(pairs,) nats: the chosen log-ratio minus the rejected one."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)

    def values(self) -> dict[str, Array]:
        """Metric -> (pairs,) its value on each pair; NaN where it says nothing of a pair.

        - ``reward_accuracy``: 1 where the margin is positive, 1/2 at 0; of pairs that are no ties.
        - ``logratio_margin``: nats; of pairs that are no ties.
        - ``chosen_logp_change``, ``rejected_logp_change``: nats, against the reference: a margin grows as well while
          both fall (likelihood displacement, arXiv:2410.08847).
        - with a beta, of p = sigmoid(beta * margin) and the true probability q: ``margin_brier_score``, the expected
          q (1 - p)² + (1 - q) p², and ``margin_nll``, -q log p - (1 - q) log(1 - p) in nats.
        """
        decided = self.probability > 0.5
        found = {
            "reward_accuracy": np.where(decided, np.sign(self.margin) / 2 + 0.5, np.nan),
            "logratio_margin": np.where(decided, self.margin, np.nan),
            "chosen_logp_change": self.chosen - self.reference_chosen,
            "rejected_logp_change": self.rejected - self.reference_rejected,
        }
        if self.beta is not None:
            x, q = self.beta * self.margin, self.probability
            p = expit(x)
            found["margin_brier_score"] = q * (1 - p) ** 2 + (1 - q) * p**2
            found["margin_nll"] = q * np.logaddexp(0, -x) + (1 - q) * np.logaddexp(0, x)
        return found

    def statistics(self) -> dict[str, tuple[bootstrap.Statistic, Array]]:
        """Metric -> its statistic and the rows it is of: the means of `values`, and ``margin_calibration_error``.

        That is the expected calibration error of the completion that the margin prefers, whose truth is the
        probability that it is preferred.
        """
        found = {}
        for name, values in self.values().items():
            known = ~np.isnan(values)
            if known.any():
                found[name] = bootstrap.mean(values[known]), self.index[known]
        if self.beta is not None and len(self.index):
            sums = self._bins()
            pairs, bins, terms = sums.shape
            statistic = bootstrap.Statistic(
                sums.reshape(pairs, bins * terms),
                lambda totals: calibration.expected_calibration_error(totals.reshape(*totals.shape[:-1], bins, terms)),
            )
            found["margin_calibration_error"] = statistic, self.index
        return found

    def items(self) -> Iterable[tuple[int, dict[str, float]]]:
        """Row number and the pair's own numbers, without those that are missing."""
        columns = {
            "chosen_logp": self.chosen,
            "rejected_logp": self.rejected,
            "preference_probability": self.probability,
            **self.values(),
        }
        for place, row in enumerate(self.index):
            yield int(row), {name: float(one[place]) for name, one in columns.items() if not np.isnan(one[place])}

    def _bins(self) -> Array:
        assert self.beta is not None
        p = expit(self.beta * self.margin)
        # where the margin prefers neither, either choice is right half of the time
        right = np.where(p > 0.5, self.probability, np.where(p < 0.5, 1 - self.probability, 0.5))
        pairs = len(self.index)
        return calibration.bin_sums(np.maximum(p, 1 - p), right, np.arange(pairs), groups=pairs)


def score_pairs(
    model: CausalLM,
    reference: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    beta: float | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pairs:
    """Log-probabilities of both completions of every row under the model and the reference.

    Which completion is the better one in truth says the row's ``preference_probability`` (of chosen), else the sign of
    its ``score_margin``, else its label.

    Args:
        model, reference, tokenizer, batch_size, max_length: as in `posttrain.evaluation.likelihood.likelihood`.
        rows: ``prompt``, ``chosen`` and ``rejected``.
        beta: see `reward_beta`.
        progress: called with the number of completions of each finished batch, of either model.

    Raises:
        ValueError: a row is no pair, or as in `posttrain.evaluation.likelihood.likelihood`.
    """
    rows = list(rows)
    require(rows, "preference", ACCEPTS, is_pair)
    completions = [{**row, "completion": row[name]} for name in ("chosen", "rejected") for row in rows]
    found = [
        likelihood(one, tokenizer, completions, batch_size=batch_size, max_length=max_length, progress=progress)
        for one in (model, reference)
    ]
    logp = np.full((2, 2 * len(rows)), np.nan)
    for place, one in enumerate(found):
        logp[place, one.index] = -one.nll
    by_pair: Array = logp.reshape(2, 2, len(rows))
    probability = np.array([_true_probability(row) for row in rows])
    turned = probability < 0.5
    by_pair[:, :, turned] = by_pair[:, ::-1, turned]
    index = np.flatnonzero(np.isfinite(by_pair).all(axis=(0, 1)))
    (chosen, rejected), (reference_chosen, reference_rejected) = by_pair[:, :, index]
    return Pairs(
        index=index,
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        probability=np.where(turned, 1 - probability, probability)[index],
        beta=beta,
        truncated=found[0].truncated,
        skipped=len(rows) - len(index),
    )


def reward_beta(objective: Any) -> float | None:
    """Beta of an objective under which sigmoid(beta * margin of log-ratios) is the probability of a preference.

    Of the first term that has one: it takes a ``beta``, and log-ratios summed over the completions. None for objectives
    without a reference, or whose reward or preference is of another form.

    Args:
        objective: as ``objective:`` in a configuration.
    """
    for term in objective if isinstance(objective, list | tuple) else [objective]:
        options: Mapping[str, Any] = term if isinstance(term, Mapping) else {"name": term}
        name = options["name"]
        read = signature(objectives.get(name) if isinstance(name, str) else name)
        inputs = {*read.required, *read.optional}
        rewards = "logratio" in inputs or {"chosen_logratio", "rejected_logratio"} <= inputs
        if rewards and "beta" in read.hyperparameters and name not in _OTHER_PREFERENCES:
            return float(options.get("beta", read.hyperparameters["beta"]))
    return None


def _true_probability(row: Row) -> float:
    probability, margin = row.get("preference_probability"), row.get("score_margin")
    if probability is not None:
        return float(probability)
    return 1.0 if margin is None else float(np.sign(margin)) / 2 + 0.5
