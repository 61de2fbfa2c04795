"""Results, differences, trials and failures as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from posttrain.experiments.report.document import Cell, Mark, Table
from posttrain.experiments.report.groups import Group
from posttrain.experiments.results import Comparison, RunResult
from posttrain.experiments.statistics import Difference, SeedMean
from posttrain.experiments.verdicts import Outcome, number, outcome, signed
from posttrain.metric_direction import direction

_ARROWS = {1: " ↑", -1: " ↓", 0: ""}
_GAP = Cell("not measured", mark="gap")


def results(group: Group, source: str) -> Table:
    """Objective by metric on one source, the base's own numbers above."""
    names = group.sources[source]
    metrics = [f"{source}/{name}" for name in names]
    best = {metric: _best(group, metric) for metric in metrics}
    rows = [] if group.before is None else [_before(group.before, metrics)]
    for objective, runs in group.objectives.items():
        seeds = Cell(f"{len(runs)} of {group.planned[objective]}")
        cells = [_value(group, objective, metric, "best" if objective in best[metric] else "") for metric in metrics]
        rows.append([Cell(objective), seeds, *cells])
    header = ["objective", "seeds", *(name + _ARROWS[direction(f"{source}/{name}")] for name in names)]
    caption = f"{_place(group, source)}: means over seeds. ↑ higher is better, ↓ lower is better, ★ best mean."
    return Table(caption, header, rows)


def _before(run: RunResult, metrics: Sequence[str]) -> list[Cell]:
    values = [Cell(number(run.metrics[metric])) if metric in run.metrics else _GAP for metric in metrics]
    return [Cell("before training"), Cell("–"), *values]


def _value(group: Group, objective: str, metric: str, mark: Mark) -> Cell:
    mean = group.mean(objective, metric)
    runs = group.objectives[objective]
    having = sum(metric in run.metrics for run in runs)
    if mean is None:
        return Cell("not finite", mark="gap") if having else _GAP
    detail = "" if mean.low is None or mean.high is None else f"[{number(mean.low)}, {number(mean.high)}]"
    if having < len(runs):
        detail = f"{detail} {having} of {len(runs)} seeds".strip()
    elif mean.n == 1:
        detail = "one seed"
    return Cell(number(mean.value), detail, mark)


def _best(group: Group, metric: str) -> set[str]:
    means = {objective: group.mean(objective, metric) for objective in group.objectives}
    found: dict[str, SeedMean] = {objective: mean for objective, mean in means.items() if mean is not None}
    way = direction(metric)
    if way == 0 or len(found) < 2:
        return set()
    top = max(way * mean.value for mean in found.values())
    return {objective for objective, mean in found.items() if way * mean.value == top}


_WORDS: dict[Outcome, tuple[str, Mark]] = {
    "better": ("better", "better"),
    "worse": ("worse", "worse"),
    "different": ("different", ""),
    "open": ("cannot be told apart", ""),
    "untested": ("no test", "gap"),
}


def differences(group: Group, source: str) -> Table:
    """Each objective against the first, metric by metric."""
    first = next(iter(group.objectives))
    found = [one for name in group.sources[source] for one in group.differences.get(f"{source}/{name}", [])]
    rows = [_difference(one) for one in found]
    header = ["metric", "objective", f"minus {first}", "corrected p", "Cohen's d", "rank-biserial", "verdict"]
    return Table(f"{_place(group, source)}: differences to {first}.", header, rows)


def _difference(one: Difference) -> list[Cell]:
    words, mark = _WORDS[outcome(one)]
    name = one.metric.rpartition("/")[2] + _ARROWS[direction(one.metric)]
    interval = "" if one.low is None or one.high is None else f"[{signed(one.low)}, {signed(one.high)}]"
    basis = f"{one.items} items, " if one.items else ""
    detail = one.gap or basis + (f"{one.seeds} seeds" if one.seeds > 1 else "one seed")
    return [
        Cell(name),
        Cell(one.objective),
        Cell("–", mark="gap") if one.value is None else Cell(signed(one.value), interval),
        _number_or_gap(one.corrected_p),
        _number_or_gap(one.cohens_d),
        _number_or_gap(one.rank_biserial),
        Cell(words, detail, mark),
    ]


def _number_or_gap(value: float | None) -> Cell:
    return Cell("–", mark="gap") if value is None else Cell(f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}")


def trials(comparison: Comparison) -> Table:
    """What tuning tried, and what it chose."""
    keys = list(dict.fromkeys(key for trial in comparison.trials for key in trial.get("hyperparameters", {})))
    rows = []
    for trial in comparison.trials:
        values = trial.get("hyperparameters", {})
        score = trial.get("value")
        found = Cell(str(trial.get("error") or trial.get("status", "no value")), mark="gap")
        rows.append(
            [
                Cell(str(trial.get("objective", ""))),
                Cell(str(trial.get("data", ""))),
                Cell(str(trial.get("base", ""))),
                *(Cell(plain(values[key])) if key in values else Cell("–", mark="gap") for key in keys),
                Cell(str(trial.get("metric", ""))),
                found if score is None else Cell(number(score), mark="best" if trial.get("chosen") else ""),
                Cell("chosen" if trial.get("chosen") else ""),
            ]
        )
    header = ["objective", "data", "base", *keys, "metric", "value", ""]
    return Table("Trials of tuning, one seed each, on data that the results above do not use.", header, rows)


def unfinished(runs: Sequence[RunResult]) -> Table:
    """Runs without a result, and why."""
    rows = [
        [
            Cell(run.name),
            Cell(run.objective),
            Cell(str(run.seed)),
            Cell("failed" if run.status == "failed" else "not ended yet", mark="gap"),
            Cell(run.error or ""),
        ]
        for run in runs
    ]
    caption = "These runs have no part in the tables and plots."
    return Table(caption, ["run", "objective", "seed", "status", "error"], rows)


def pairs(caption: str, header: tuple[str, str], values: Mapping[str, Any]) -> Table:
    """Names and their values as two columns."""
    return Table(caption, header, [[Cell(str(name)), Cell(plain(value))] for name, value in values.items()])


def plain(value: Any, top: bool = True) -> str:
    """A setting in one line, as YAML writes it but for the outermost brackets; ``{nll: nll}`` is just ``nll``."""
    if isinstance(value, str):
        return value
    if top and isinstance(value, Mapping):
        named = (str(key) if key == one else f"{key}: {plain(one, top=False)}" for key, one in value.items())
        return "; ".join(named)
    if top and isinstance(value, list | tuple):
        return ", ".join(plain(one, top=False) for one in value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _place(group: Group, source: str) -> str:
    return f"{source} ({group.title})"
