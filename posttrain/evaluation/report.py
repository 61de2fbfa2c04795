"""What an evaluation found: a table, a JSON, per-item results, and the comparison of two of them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from posttrain.evaluation.bootstrap import Estimate, Statistic, paired_difference
from posttrain.metric_direction import direction

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Measure:
    """One metric on one source: its items' terms, the rows they belong to (ascending), and the bootstrapped value.

    A metric of the whole corpus that is no function of sums over items, such as BLEU, has no statistic. One without an
    interval, such as a p-value, has NaN for its ends.
    """

    statistic: Statistic | None
    index: Array
    estimate: Estimate


@dataclass(frozen=True, eq=False)
class SourceReport:
    """One source's results.

    Args:
        rows: number of rows.
        fingerprint: of the rows' text; only reports of the same rows are compared.
        verifier: name of the verifier, None without generation.
        measures: metric name -> measure.
        counts: what was cut, skipped or not judged, such as ``truncated_prompts``.
        not_measured: kind of metric -> why the rows do not allow it.
        items: per row, its texts and per-item numbers.
        correct: (rows, samples) booleans, None without generation.
        reliability: see `calibration.reliability_table`; empty without likelihood.
        probability_histogram: scored tokens by the probability of the target, in equal bins over [0, 1]; empty without
            likelihood.
    """

    rows: int
    fingerprint: str
    verifier: str | None
    measures: dict[str, Measure]
    counts: dict[str, int]
    not_measured: dict[str, str]
    items: list[dict[str, Any]]
    correct: Array | None
    reliability: list[dict[str, float | int | None]]
    probability_histogram: list[int]


@dataclass(frozen=True, eq=False)
class Report:
    """Results by source, with the settings that `evaluate` ran under (``level``, ``resamples``, ``seed``, ...)."""

    settings: dict[str, Any]
    sources: dict[str, SourceReport]

    def to_dict(self) -> dict[str, Any]:
        """Settings and, per source, every metric with value, interval (low, high) and n; ready for JSON."""
        return {"settings": self.settings, "sources": {name: _source_dict(one) for name, one in self.sources.items()}}

    def items(self) -> Iterator[dict[str, Any]]:
        """One dictionary per source and row for a JSON-lines file: completions, answers, verdicts, likelihood sums."""
        for name, source in self.sources.items():
            for index, item in enumerate(source.items):
                yield {"source": name, "row": index, **item}

    def table(self, title: str = "Evaluation") -> Table:
        """One row per source and metric; what was cut, skipped or not measured stands in the caption."""
        table = Table(title=title, caption=_caption(self), caption_justify="left")
        for column in ("source", "metric"):
            table.add_column(column)
        for column in ("value", _level(self), "n"):
            table.add_column(column, justify="right")
        for name, source in self.sources.items():
            for metric, measure in source.measures.items():
                found = measure.estimate
                table.add_row(name, metric, _number(found.value), _interval(found), str(found.n))
            table.add_section()
        return table


@dataclass(frozen=True)
class Comparison:
    """A metric before and after, and the paired difference (after - before) over the items that both measured."""

    before: Estimate
    after: Estimate
    difference: Estimate


def compare(before: Report, after: Report) -> dict[str, dict[str, Comparison]]:
    """Source -> metric -> comparison, for all that both reports measured by item; resampling settings are after's.

    Raises:
        ValueError: the reports share no source, or a source's rows differ between them.
    """
    shared = [name for name in before.sources if name in after.sources]
    if not shared:
        raise ValueError(f"The reports share no source: {list(before.sources)} before, {list(after.sources)} after.")
    settings = {name: after.settings[name] for name in ("resamples", "level", "seed")}
    result: dict[str, dict[str, Comparison]] = {}
    for name in shared:
        old, new = before.sources[name], after.sources[name]
        if old.fingerprint != new.fingerprint:
            raise ValueError(f"Source {name!r} holds other rows before than after; evaluate both on the same rows.")
        result[name] = {}
        for metric in (metric for metric in old.measures if metric in new.measures):
            one, two = old.measures[metric], new.measures[metric]
            if one.statistic is None or two.statistic is None:
                continue
            _, left, right = np.intersect1d(one.index, two.index, return_indices=True)
            if len(left):
                pair = one.statistic.take(left), two.statistic.take(right)
                result[name][metric] = Comparison(one.estimate, two.estimate, paired_difference(*pair, **settings))
    return result


def comparison_table(before: Report, after: Report, title: str = "Before and after") -> Table:
    """Before, after and their paired difference with intervals; a difference whose interval excludes 0 is coloured.

    Raises:
        ValueError: as `compare`.
    """
    level = _level(after)
    table = Table(title=title, caption=_caption(after), caption_justify="left")
    for column in ("source", "metric"):
        table.add_column(column)
    for column in (f"before ({level})", f"after ({level})", f"difference ({level})", "n"):
        table.add_column(column, justify="right")
    for name, metrics in compare(before, after).items():
        for metric, found in metrics.items():
            cells = [f"{_number(one.value)} {_interval(one)}" for one in (found.before, found.after)]
            difference = f"{found.difference.value:+.4g} {_interval(found.difference)}"
            style = _style(f"{name}/{metric}", found.difference)
            cells.append(f"[{style}]{difference}[/{style}]" if style else difference)
            table.add_row(name, metric, *cells, str(found.difference.n))
        for metric, one, two in _without_items(before, after, name):
            cells = [f"{_number(each.value)} {_interval(each)}".strip() for each in (one, two)]
            table.add_row(name, metric, *cells, f"{two.value - one.value:+.4g}", str(two.n))
        table.add_section()
    return table


def _without_items(before: Report, after: Report, source: str) -> list[tuple[str, Estimate, Estimate]]:
    """Metrics of the whole, whose difference has no interval."""
    old, new = before.sources[source].measures, after.sources[source].measures
    shared = (metric for metric in old if metric in new)
    return [
        (metric, old[metric].estimate, new[metric].estimate)
        for metric in shared
        if old[metric].statistic is None or new[metric].statistic is None
    ]


def _style(metric: str, difference: Estimate) -> str:
    way = direction(metric)
    if difference.low <= 0 <= difference.high or way == 0:
        return ""
    return "green" if way * difference.value > 0 else "red"


def _source_dict(source: SourceReport) -> dict[str, Any]:
    return {
        "rows": source.rows,
        "fingerprint": source.fingerprint,
        "verifier": source.verifier,
        "metrics": {name: _estimate_dict(measure.estimate) for name, measure in source.measures.items()},
        "counts": source.counts,
        "not_measured": source.not_measured,
        "reliability": source.reliability,
        "probability_histogram": source.probability_histogram,
    }


def _estimate_dict(found: Estimate) -> dict[str, float | None]:
    """Ready for JSON, which has no NaN: a number without an interval has null for its ends."""
    return {name: None if value != value else value for name, value in asdict(found).items()}


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(found: Estimate) -> str:
    if found.low != found.low:
        return ""
    # Parentheses: square brackets are markup to rich.
    return f"({_number(found.low)}, {_number(found.high)})"


def _level(report: Report) -> str:
    return f"{100 * report.settings['level']:g} % interval"


def _caption(report: Report) -> str | None:
    lines = [
        f"{name}: {count} {what.replace('_', ' ')} ({source.rows} rows in all)"
        for name, source in report.sources.items()
        for what, count in source.counts.items()
        if count
    ]
    lines += [
        f"{name}: no {kind}, {reason}"
        for name, source in report.sources.items()
        for kind, reason in source.not_measured.items()
    ]
    return "\n".join(lines) or None
