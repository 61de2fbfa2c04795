"""A comparison's runs, sorted into what can be held against each other: one base and data set each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.experiments.results import Comparison, RunResult
from posttrain.experiments.statistics import Correction, Difference, SeedMean, compare, corrected, over_seeds

# The first of these that a source was measured in is what the answer speaks of, unless tuning was for another.
_FIRST_CHOICES = ("pass@1", "exact_match", "accuracy", "acc", "token_accuracy", "nll")


@dataclass(frozen=True, eq=False)
class Group:
    """All runs on one base and data set.

    Args:
        objectives: label -> finished runs, in the comparison's order; empty where none finished.
        planned: label -> number of runs, finished or not.
        before: the base's own evaluation, None where there is none.
        differences: ``source/metric`` -> each objective but the first against the first.
    """

    base: str
    data: str
    objectives: dict[str, list[RunResult]]
    planned: dict[str, int]
    before: RunResult | None
    differences: dict[str, list[Difference]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.data} · {self.base}"

    @property
    def runs(self) -> list[RunResult]:
        return [run for runs in self.objectives.values() for run in runs]

    @property
    def metrics(self) -> list[str]:
        """Every ``source/metric`` that a run has, in the order of their first appearance."""
        return list(dict.fromkeys(metric for run in self.runs for metric in run.metrics))

    def mean(self, objective: str, metric: str) -> SeedMean | None:
        """Over the seeds that measured it; None where none did, or a value is not finite."""
        values = [run.metrics[metric] for run in self.objectives[objective] if metric in run.metrics]
        return over_seeds(values) if values and all(map(math.isfinite, values)) else None

    @property
    def sources(self) -> dict[str, list[str]]:
        """Source -> its metrics by their names alone."""
        found: dict[str, list[str]] = {}
        for metric in self.metrics:
            source, _, name = metric.rpartition("/")
            found.setdefault(source, []).append(name)
        return found


def groups(comparison: Comparison, *, correction: Correction = "holm", resamples: int = 9999) -> list[Group]:
    """The comparison by base and data set, with the differences to the first objective.

    All differences on one metric, over sources, bases and data sets, are one family of comparisons: a family of
    everything would let metrics that nobody decides by drown the one that somebody does.
    """
    found: dict[tuple[str, str], Group] = {}
    for run in comparison.runs:
        key = (run.base, run.data)
        group = found.setdefault(key, Group(*key, {}, {}, comparison.before.get(key)))
        group.planned[run.objective] = group.planned.get(run.objective, 0) + 1
        finished = group.objectives.setdefault(run.objective, [])
        if run.status == "done":
            finished.append(run)
    result = list(found.values())
    _differences(result, correction, resamples)
    return result


def _differences(found: Sequence[Group], correction: Correction, resamples: int) -> None:
    families: dict[str, list[tuple[Group, Difference]]] = {}
    for group in found:
        for metric in group.metrics:
            family = families.setdefault(metric.rpartition("/")[2], [])
            family.extend((group, one) for one in _against_first(group, metric, resamples))
    for family in families.values():
        adjusted = corrected([difference for _, difference in family], correction)
        for (group, _), difference in zip(family, adjusted, strict=True):
            group.differences.setdefault(difference.metric, []).append(difference)


def _against_first(group: Group, metric: str, resamples: int) -> list[Difference]:
    first, *others = group.objectives
    result = []
    for other in others:
        sides = group.objectives[other], group.objectives[first]
        if all(sides):
            result.append(compare(metric, *sides, resamples=resamples))
        else:
            names = " and ".join(name for name, runs in zip((other, first), sides, strict=True) if not runs)
            result.append(Difference(metric, other, first, gap=f"no run of {names} finished"))
    return result


def headline(names: Sequence[str], tuned_for: str | None) -> str:
    """The one of a source's metrics that decides: what tuning was for, or the first of the usual ones."""
    wanted = (tuned_for.rpartition("/")[2],) if tuned_for else ()
    return next((name for name in (*wanted, *_FIRST_CHOICES) if name in names), names[0])
