"""From the harness's logged samples to measures with items, so that its metrics are compared like all others."""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.evaluation import bootstrap
from posttrain.evaluation.report import Measure, SourceReport

Array = npt.NDArray[Any]
Aggregation = Callable[[Sequence[Any]], Any]

# Resampling a corpus metric means computing it anew each time; the harness, too, stops at 100 for BLEU.
_MOST_CORPUS_RESAMPLES = 100
# Names of the aggregations that are a mean over items.
_MEANS = frozenset({"mean", "nanmean"})


@dataclass(frozen=True, eq=False)
class Leaf:
    """One task's results.

    Args:
        name: of the task.
        aggregation: metric -> how the harness makes one number of the items' values.
        samples: the harness's logged samples, one for each item and filter.
        available: items of the task, of which a limit may have left some out.
    """

    name: str
    aggregation: Mapping[str, Aggregation]
    samples: Sequence[Mapping[str, Any]]
    available: int


@dataclass(frozen=True)
class _Value:
    """One item's value of a metric; `weight` is the item's in the mean over a group."""

    row: int
    value: Any
    weight: float


def report_of(
    leaves: Sequence[Leaf], by_size: Mapping[str, bool], *, resamples: int, level: float, seed: int
) -> SourceReport:
    """One source from one or several tasks.

    A metric's name is the harness's, with the filter behind a comma where there are several. Means, and quotients of
    sums such as word perplexity, keep their items, so that paired differences work; a corpus metric such as BLEU has a
    value and a bootstrap interval of its own. Over several tasks, only means and quotients are formed.

    Args:
        leaves: at least one.
        by_size: of a group: metric -> whether every item weighs alike, rather than every task.
        resamples, level, seed: of the bootstrap.
    """
    items: list[dict[str, Any]] = []
    values: dict[str, list[_Value]] = {}
    aggregations: dict[str, Aggregation] = {}
    for leaf in leaves:
        _read(leaf, by_size, items, values, aggregations, several=len(leaves) > 1)
    interval = {"resamples": resamples, "level": level, "seed": seed}
    measures: dict[str, Measure] = {}
    not_measured: dict[str, str] = {}
    for name, found in values.items():
        measure = _measure(aggregations[name], found, alone=len(leaves) == 1, interval=interval)
        if measure is None:
            not_measured[name] = "it is no mean over the items of its tasks"
        else:
            measures[name] = measure
    available = sum(leaf.available for leaf in leaves)
    return SourceReport(
        rows=len(items),
        fingerprint=_fingerprint(items),
        verifier=f"lm-eval {importlib.metadata.version('lm_eval')}",
        measures=measures,
        counts={"rows_left_out": available - len(items)},
        not_measured=not_measured,
        items=items,
        correct=None,
        reliability=[],
        probability_histogram=[],
    )


def _read(
    leaf: Leaf,
    by_size: Mapping[str, bool],
    items: list[dict[str, Any]],
    values: dict[str, list[_Value]],
    aggregations: dict[str, Aggregation],
    *,
    several: bool,
) -> None:
    """Add a task's items, in the order of its documents, and their values by metric."""
    documents = sorted({sample["doc_id"] for sample in leaf.samples})
    place = {document: len(items) + index for index, document in enumerate(documents)}
    items.extend({"task": leaf.name} if several else {} for _ in documents)
    for sample in leaf.samples:
        row, suffix = place[sample["doc_id"]], "" if sample["filter"] == "none" else f",{sample['filter']}"
        item = items[row]
        item.setdefault("prompt", sample["arguments"][0][0])
        item.setdefault("reference", str(sample["target"]))
        item[f"responses{suffix}"] = sample["filtered_resps"]
        for metric in sample["metrics"]:
            name = metric + suffix
            weight = 1.0 if by_size.get(metric, True) else 1.0 / len(documents)
            values.setdefault(name, []).append(_Value(row, sample[metric], weight))
            aggregations[name] = leaf.aggregation.get(metric, np.mean)
            # Items are compared in pairs by their mean, which makes sense only where the metric is one.
            is_mean = getattr(aggregations[name], "__name__", "") in _MEANS
            if is_mean and np.ndim(sample[metric]) == 0 and not isinstance(sample[metric], str):
                item[name] = float(sample[metric])


def _measure(
    aggregation: Aggregation, found: Sequence[_Value], *, alone: bool, interval: Mapping[str, Any]
) -> Measure | None:
    from lm_eval.api import metrics

    index = np.array([one.row for one in found])
    if aggregation in (metrics.weighted_perplexity, metrics.bits_per_byte):
        sums = np.array([one.value for one in found], dtype=np.float64)
        combine = _bits_per_byte if aggregation is metrics.bits_per_byte else _exp_of_minus_quotient
        statistic = bootstrap.Statistic(sums, combine)
    elif aggregation in (metrics.mean, metrics.nanmean, metrics.perplexity, np.mean):
        numbers = np.array([float(one.value) for one in found])
        kept = ~np.isnan(numbers) if aggregation is metrics.nanmean else np.ones(len(numbers), dtype=bool)
        if not kept.any():
            return None
        weights = np.array([one.weight for one in found])[kept]
        index = index[kept]
        statistic = bootstrap.ratio(numbers[kept] * weights, weights)
        if aggregation is metrics.perplexity:
            statistic = bootstrap.Statistic(statistic.terms, _exp_of_minus_quotient)
    elif alone:
        estimate = _resampled(aggregation, [one.value for one in found], **interval)
        return Measure(None, index, estimate)
    else:
        return None
    return Measure(statistic, index, bootstrap.estimate(statistic, **interval))


def _exp_of_minus_quotient(sums: Array) -> Any:
    return np.exp(-sums[..., 0] / sums[..., 1])


def _bits_per_byte(sums: Array) -> Any:
    return -sums[..., 0] / sums[..., 1] / math.log(2)


def _resampled(
    aggregation: Aggregation, values: Sequence[Any], *, resamples: int, level: float, seed: int
) -> bootstrap.Estimate:
    """Percentile interval of a metric that is no function of sums over items."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(values), size=len(values)) for _ in range(min(resamples, _MOST_CORPUS_RESAMPLES)))
    drawn = [float(aggregation([values[i] for i in draw])) for draw in draws]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return bootstrap.Estimate(float(aggregation(values)), float(low), float(high), len(values))


def _fingerprint(items: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.get('task')}\0{item['prompt']}\0{item['reference']}\0".encode())
    return digest.hexdigest()[:16]
