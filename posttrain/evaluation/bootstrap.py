"""Percentile bootstrap over items, for a mean, a ratio of sums, or any function of per-item sums."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[Any]

# Bounds the (resamples, items) index block that is alive at once to about 32 MB.
_INDEX_BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval over ``n`` items, all in the statistic's own unit."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class Statistic:
    """A number that depends on its items only through sums over them.

    Args:
        terms: (items, terms) float64, what each item adds to the sums.
        combine: (..., terms) sums -> (...) values, a scalar for one row of sums; vectorised over the leading axes.
    """

    terms: Array
    combine: Callable[[Array], Any]

    @property
    def value(self) -> float:
        return float(self.combine(self.terms.sum(axis=0)))

    def take(self, index: Array) -> "Statistic":
        """The same statistic over the items at ``index``."""
        return Statistic(self.terms[index], self.combine)


def _quotient(sums: Array) -> Any:
    return sums[..., 0] / sums[..., 1]


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Statistic:
    """Sum of ``numerator`` over sum of ``denominator``: a per-token mean where items hold different numbers of tokens.

    Args:
        numerator, denominator: (items,), the denominator positive.

    Raises:
        ValueError: the shapes differ, or an item's denominator is not positive.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"ratio needs two vectors of one length, found shapes {top.shape} and {bottom.shape}.")
    if not (bottom > 0).all():
        raise ValueError(f"ratio needs positive denominators, found {bottom.min()}; drop the items without tokens.")
    return Statistic(np.stack([top, bottom], axis=1), _quotient)


def mean(values: npt.ArrayLike) -> Statistic:
    """Plain mean over items of ``values`` (items,)."""
    vector = np.asarray(values, dtype=np.float64)
    return ratio(vector, np.ones_like(vector))


def estimate(statistic: Statistic, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Value and percentile interval of a statistic when its items are drawn again with replacement.

    With one item, or where all items agree, the interval has no width: the bootstrap knows no more than the sample.

    Args:
        statistic: its items are the unit of resampling.
        resamples: number of bootstrap samples.
        level: coverage of the interval, in (0, 1).
        seed: the same seed and items give the same interval.

    Raises:
        ValueError: no items, or terms that are not finite.
    """
    items = len(statistic.terms)
    if items == 0:
        raise ValueError("A bootstrap interval needs at least one item, found none.")
    if not np.isfinite(statistic.terms).all():
        raise ValueError("A bootstrap interval needs finite items, found NaN or infinity among them.")
    value = statistic.value
    if items == 1:
        return Estimate(value, value, value, 1)

    def resampled(index: Array, axis: int = -1) -> Array:
        drawn = index.reshape(-1, items)
        offset = np.arange(len(drawn))[:, None] * items
        # Counting how often each item was drawn turns the resampled sums into one matrix product.
        counts = np.bincount((drawn + offset).ravel(), minlength=drawn.size).reshape(drawn.shape)
        return statistic.combine(counts @ statistic.terms).reshape(index.shape[:-1])

    interval = stats.bootstrap(
        (np.arange(items),),
        resampled,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _INDEX_BLOCK // items),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), items)


def paired_difference(
    before: Statistic, after: Statistic, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """After minus before over the same items: every bootstrap sample draws the same items for both.

    Args:
        before, after: item i of one is item i of the other.

    Raises:
        ValueError: the numbers of items differ, or as in `estimate`.
    """
    if len(before.terms) != len(after.terms):
        raise ValueError(
            f"A paired difference needs the same items on both sides, found {len(before.terms)} before and "
            f"{len(after.terms)} after."
        )
    width = before.terms.shape[1]

    def combine(sums: Array) -> Any:
        return after.combine(sums[..., width:]) - before.combine(sums[..., :width])

    both = Statistic(np.concatenate([before.terms, after.terms], axis=1), combine)
    return estimate(both, resamples=resamples, level=level, seed=seed)
