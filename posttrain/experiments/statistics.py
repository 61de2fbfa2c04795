"""Which differences between objectives outlast other seeds and other test items, and how to say so.

Two things vary between one comparison and its repetition: the seeds that trained the models and the items that tested
them. Items are many, so they are resampled (`scipy.stats.bootstrap`), each with its value averaged over the seeds.
Seeds are three to five, too few to resample: three of three drawn with replacement lose a third of the variance and the
heavy tails. What varies between seeds beyond the items' noise is therefore estimated as in a two-way analysis of
variance and added to every bootstrap draw as Student noise with seeds - 1 degrees of freedom.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from posttrain.experiments.results import RunResult

Array = npt.NDArray[np.float64]
Correction = Literal["holm", "benjamini-hochberg", "none"]

# Means over tokens, whose items count with their number of tokens.
PER_TOKEN = frozenset({"nll", "mean_target_probability", "token_accuracy", "entropy"})

# Bounds the (resamples, items) block of one bootstrap to about 16 MB.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class SeedMean:
    """Mean over ``n`` seeds with its Student interval; ``low`` and ``high`` are None for one seed, which has none."""

    value: float
    low: float | None
    high: float | None
    n: int


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> SeedMean:
    """Mean and Student interval of one value per seed.

    Raises:
        ValueError: no values, or a value that is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError(
            f"A mean over seeds needs finite values, found {list(values)}; leave out the runs without one."
        )
    value = float(found.mean())
    if found.size == 1:
        return SeedMean(value, None, None, 1)
    half = float(stats.sem(found) * stats.t.ppf((1 + level) / 2, found.size - 1))
    return SeedMean(value, value - half, value + half, found.size)


@dataclass(frozen=True)
class Difference:
    """``objective`` minus ``baseline`` on one metric, in the metric's unit, over seeds and items that both have.

    Args:
        value, low, high: mean difference and its interval; None where nothing could be tested.
        p: two-sided, for no difference; ``corrected_p`` after `corrected`, the same before.
        cohens_d: mean over standard deviation of the items' differences; None without items or spread.
        rank_biserial: (favourable - unfavourable rank sums) / (their sum) of the items' differences, in [-1, 1].
        items, seeds: what the difference was taken over; ``items`` is 0 where only the seeds' means could be compared.
        gap: why there is no test, in words; None where there is one.
    """

    metric: str
    objective: str
    baseline: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected_p: float | None = None
    cohens_d: float | None = None
    rank_biserial: float | None = None
    items: int = 0
    seeds: int = 0
    gap: str | None = None


def paired_items(
    objective: npt.ArrayLike,
    baseline: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    resamples: int = 9999,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The fields of a `Difference` from per-item values: bootstrap over items with Student noise between seeds.

    With d (seeds, items) the differences, MS_s and MS_e the mean squares of seeds and residual, the seeds' share of the
    variance of the mean is max(0, MS_s - MS_e) / (seeds * items). For one seed it is unknown and left out.

    Args:
        objective, baseline: (seeds, items) of the same seeds and items; an item with NaN anywhere is left out.
        weights: (items,), such as each item's number of tokens; the difference is the weighted mean. The effect sizes
            count items alike.
        resamples: bootstrap draws; the smallest p value is 2 / (resamples + 1).

    Raises:
        ValueError: the shapes differ, or fewer than two items are complete.
    """
    ours, theirs = np.asarray(objective, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(
            f"Paired items need two (seeds, items) arrays of one shape, found {ours.shape} and {theirs.shape}."
        )
    difference = ours - theirs
    weight = np.ones(difference.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    complete = np.isfinite(difference).all(axis=0) & (weight > 0)
    difference, weight = difference[:, complete], weight[complete]
    seeds, items = difference.shape
    if items < 2:
        raise ValueError(f"A bootstrap over items needs two items that all seeds measured, found {items}.")
    per_item = difference.mean(axis=0)
    drawn = _draws(difference, weight, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + float(min((drawn <= 0).sum(), (drawn >= 0).sum()))) / (resamples + 1))
    return {
        "value": float(np.average(per_item, weights=weight)),
        "low": float(low),
        "high": float(high),
        "p": p,
        "corrected_p": p,
        "cohens_d": cohens_d(per_item),
        "rank_biserial": rank_biserial(per_item),
        "items": items,
        "seeds": seeds,
    }


def _draws(difference: Array, weight: Array, resamples: int, rng: np.random.Generator) -> Array:
    """What the weighted mean of (seeds, items) differences could have been with other items and seeds, (resamples,)."""
    seeds, items = difference.shape
    per_item = difference.mean(axis=0)
    drawn: Array = stats.bootstrap(
        (per_item * weight, weight),
        _quotient,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BLOCK // items),
        method="percentile",
        rng=rng,
    ).bootstrap_distribution
    if seeds == 1:
        return drawn
    error = _seed_error(difference * weight / weight.mean())
    return drawn + error * stats.t.rvs(seeds - 1, size=resamples, random_state=rng)


def _quotient(top: Array, bottom: Array, axis: int = -1) -> Any:
    return top.sum(axis=axis) / bottom.sum(axis=axis)


def _seed_error(difference: Array) -> float:
    seeds, items = difference.shape
    rows = difference.mean(axis=1)
    residual = difference - difference.mean(axis=0) - rows[:, None] + difference.mean()
    between = items * rows.var(ddof=1)
    within = (residual**2).sum() / ((seeds - 1) * (items - 1))
    return float(np.sqrt(max(0.0, between - within) / (seeds * items)))


def paired_seeds(objective: Sequence[float], baseline: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """The fields of a `Difference` from one value per seed, for metrics without items: a paired Student test.

    Args:
        objective, baseline: one value per seed, in one order of at least two seeds.
    """
    ours, theirs = np.asarray(objective, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    found = over_seeds((ours - theirs).tolist(), level=level)
    # Without spread the test divides by zero; its limit is certainty.
    p = float(found.value == 0) if np.ptp(ours - theirs) == 0 else float(stats.ttest_rel(ours, theirs).pvalue)
    bounds = {"value": found.value, "low": found.low, "high": found.high}
    return {**bounds, "p": p, "corrected_p": p, "seeds": found.n}


def cohens_d(differences: npt.ArrayLike) -> float | None:
    """Paired Cohen's d: mean over standard deviation (n - 1) of the differences; None where they have no spread."""
    found = np.asarray(differences, dtype=np.float64)
    spread = float(found.std(ddof=1))
    return float(found.mean()) / spread if spread > 0 else None


def rank_biserial(differences: npt.ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation (Kerby, 2014): positive minus negative rank sum over their total.

    Zeros are left out as in Wilcoxon's test; 0 where nothing is left.
    """
    found = np.asarray(differences, dtype=np.float64)
    found = found[found != 0]
    if found.size == 0:
        return 0.0
    ranks = stats.rankdata(np.abs(found))
    return float((np.sign(found) * ranks).sum() / ranks.sum())


def compare(
    metric: str,
    objective: Sequence[RunResult],
    baseline: Sequence[RunResult],
    *,
    resamples: int = 9999,
    level: float = 0.95,
) -> Difference:
    """Two objectives on one ``source/metric``, over the seeds that both finished: by items where both have them.

    Args:
        objective, baseline: the runs of each on one base and data set, at least one.
    """
    empty = Difference(metric, objective[0].objective, baseline[0].objective)
    ours, theirs = ({run.seed: run for run in runs if metric in run.metrics} for runs in (objective, baseline))
    lacking = [runs[0].objective for runs, found in ((objective, ours), (baseline, theirs)) if not found]
    if lacking:
        return replace(empty, gap=f"{' and '.join(lacking)} did not measure it")
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return replace(empty, gap="no seed finished in both")
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    values = [[run.metrics[metric] for run in side] for side in zip(*pairs, strict=True)]
    if not np.isfinite(values).all():
        return replace(empty, seeds=len(seeds), gap="a value is not finite")
    source, _, name = metric.rpartition("/")
    tables = [run.items.get(source, {}) for pair in pairs for run in pair]
    lengths = {len(table[name]) for table in tables if name in table}
    if len(lengths) > 1:
        return replace(empty, seeds=len(seeds), gap="they were tested on different items")
    if lengths and all(name in table for table in tables):
        items = [[run.items[source][name] for run in side] for side in zip(*pairs, strict=True)]
        weights = tables[0].get("tokens") if name in PER_TOKEN else None
        if np.isfinite(items).all(axis=(0, 1)).sum() > 1:
            return replace(empty, **paired_items(*items, weights=weights, resamples=resamples, level=level))
    if len(seeds) == 1:
        return replace(empty, value=values[0][0] - values[1][0], seeds=1, gap="one seed and no values per item")
    return replace(empty, **paired_seeds(*values, level=level))


def corrected(differences: Sequence[Difference], method: Correction = "holm") -> list[Difference]:
    """The same differences with p values corrected for being many; those without a test do not count.

    Holm by default: it bounds the chance of a single false "better" under any dependence, and differences of several
    objectives to one baseline do depend on each other. Benjamini-Hochberg bounds only the share of false ones.
    """
    tested = [found for found in differences if found.p is not None]
    if not tested:
        return list(differences)
    adjusted = iter(correct([float(found.p) for found in tested if found.p is not None], method))
    return [found if found.p is None else replace(found, corrected_p=next(adjusted)) for found in differences]


def correct(p_values: Sequence[float], method: Correction = "holm") -> list[float]:
    """p values corrected for their number, in their order.

    Raises:
        ValueError: an unknown method, or a p value outside [0, 1].
    """
    found = np.asarray(p_values, dtype=np.float64)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"p values lie in [0, 1], found {list(p_values)}.")
    if method == "none" or found.size == 0:
        return found.tolist()
    if method == "benjamini-hochberg":
        return [float(p) for p in stats.false_discovery_control(found)]
    if method != "holm":
        raise ValueError(f"correction must be holm, benjamini-hochberg or none, found {method!r}.")
    order = np.argsort(found, kind="stable")
    stepped = np.maximum.accumulate(found[order] * np.arange(found.size, 0, -1))
    result = np.empty_like(found)
    result[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in result]
