"""A source's results while they are gathered, and intervals of numbers that are no mean over one set of items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.evaluation import bootstrap
from posttrain.evaluation.bootstrap import Estimate, Statistic
from posttrain.evaluation.report import Measure, SourceReport
from posttrain.evaluation.unlearning import membership
from posttrain.evaluation.unlearning.metrics import harmonic_mean
from posttrain.evaluation.unlearning.tokens import Array


@dataclass(frozen=True)
class Interval:
    """``resamples``, ``level`` and ``seed`` of the bootstrap, as `posttrain.evaluation.estimate` takes them."""

    resamples: int
    level: float
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "level": self.level, "seed": self.seed}


@dataclass
class Findings:
    """What becomes a `SourceReport`.

    Args:
        rows: of the source.
        fingerprint: of the rows.
        interval: of the bootstrap.
        items: a dictionary a row, or none where the numbers are of several sources.
    """

    rows: int
    fingerprint: str
    interval: Interval
    items: list[dict[str, Any]] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str, values: Array) -> None:
        """A metric that is the mean over items; an item without it has NaN and is not counted."""
        index = np.flatnonzero(np.isfinite(values))
        if not len(index):
            self.left_out[name] = "no row has it"
            return
        self.statistic(name, bootstrap.mean(values[index]), index)
        self.each(name, values)

    def statistic(self, name: str, statistic: Statistic, index: Array) -> None:
        """A metric that depends on the items at ``index`` through sums over them."""
        self.measures[name] = Measure(statistic, index, bootstrap.estimate(statistic, **self.interval.options))

    def each(self, name: str, values: Array) -> None:
        """A number of each item."""
        for item, value in zip(self.items, values.tolist(), strict=True):
            if math.isfinite(value):
                item[name] = value

    def number(self, name: str, value: float | Estimate, n: int = 0) -> None:
        """A metric of the whole; a plain number has no interval."""
        estimate = value if isinstance(value, Estimate) else Estimate(value, math.nan, math.nan, n)
        self.measures[name] = Measure(None, np.arange(0), estimate)

    def report(self) -> SourceReport:
        return SourceReport(
            rows=self.rows,
            fingerprint=self.fingerprint,
            verifier=None,
            measures=self.measures,
            counts=self.counts,
            not_measured=self.left_out,
            items=self.items,
            correct=None,
            reliability=[],
            probability_histogram=[],
        )


def utility(sets: Sequence[Array], interval: Interval) -> Estimate:
    """Harmonic mean of all columns' means of all sets; each set's items are drawn again by themselves.

    Args:
        sets: (items, metrics) each, of numbers that are at least 0.
        interval: of the bootstrap.
    """
    generator = np.random.default_rng(interval.seed)
    means = [values.mean(axis=0) for values in sets]
    drawn = []
    for values in sets:
        n = len(values)
        drawn.append(generator.multinomial(n, np.full(n, 1 / n), size=interval.resamples) @ values / n)
    tail = (1 - interval.level) / 2
    low, high = np.quantile(harmonic_mean(np.concatenate(drawn, axis=1)), [tail, 1 - tail])
    return Estimate(float(harmonic_mean(np.concatenate(means))), float(low), float(high), sum(map(len, sets)))


def add_leak(found: Findings, retain_auc: float | None, missing: str) -> None:
    """PrivLeak against the retain model's AUC, and against the AUC 1/2 of a model that tells nothing.

    Its interval is that of the model's own AUC: the other is taken as it is.

    Args:
        found: holds ``mia_min_k_auc``, gets ``privleak`` and ``privleak_to_half``.
        retain_auc: the same of the retain model, None where there is none.
        missing: why there is none.
    """
    auc = found.measures["mia_min_k_auc"].estimate

    def leak(other: float) -> Estimate:
        # it falls as the AUC rises, so the interval's ends change places
        value, low, high = (membership.privacy_leak(one, other) for one in (auc.value, auc.high, auc.low))
        return Estimate(value, low, high, auc.n)

    found.number("privleak_to_half", leak(0.5))
    if retain_auc is None:
        found.left_out["privleak"] = missing
    elif retain_auc >= 1:
        found.left_out["privleak"] = "the retain model's AUC is 1, and 1 - AUC is divided by"
    else:
        found.number("privleak", leak(retain_auc))
