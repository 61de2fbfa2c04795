"""What a comparison says, in one paragraph."""

from collections.abc import Sequence

from posttrain.experiments.report.document import Block, Cell, Mark, Table, Text
from posttrain.experiments.report.groups import Group, headline
from posttrain.experiments.statistics import Difference
from posttrain.experiments.verdicts import Outcome, number, outcome, signed, verdict
from posttrain.metric_direction import direction


def answer(groups: Sequence[Group], tuned_for: str | None) -> list[Block]:
    """The conclusion; where there are several test sets, the verdicts behind it as a table."""
    questions = [
        (group, f"{source}/{headline(names, tuned_for)}") for group in groups for source, names in group.sources.items()
    ]
    if not questions:
        return [Text("No run has finished and been evaluated yet: there is nothing to compare.", lead=True)]
    differences = [one for group, metric in questions for one in group.differences.get(metric, [])]
    if not differences:
        return [Text("Only one objective was run: there is nothing to compare it with.", lead=True)]
    if len(questions) == 1:
        return [Text(_sentence(*questions[0]), lead=True)]
    return [Text(_conclusion(differences), lead=True), _verdicts(questions)]


def _conclusion(differences: Sequence[Difference]) -> str:
    """How each objective fares against the first over all test sets."""
    first = " or ".join(dict.fromkeys(one.baseline for one in differences))
    found: dict[str, list[Outcome]] = {}
    for one in differences:
        found.setdefault(one.objective, []).append(outcome(one))
    seen = {kind for kinds in found.values() for kind in kinds}
    if seen == {"untested"}:
        return f"Nothing can be said yet: no objective could be compared with {first}."
    if seen <= {"untested", "open"}:
        return f"No objective can be told apart from {first} here."
    alike: dict[tuple[Outcome, ...], list[str]] = {}
    for name, kinds in found.items():
        alike.setdefault(tuple(sorted(kinds)), []).append(name)
    metrics = {one.metric.rpartition("/")[2] for one in differences}
    by = f", by {metrics.pop()}" if len(metrics) == 1 else ""
    return f"Against {first}{by}: " + "; ".join(_tally(names, kinds) for kinds, names in alike.items()) + "."


# For one objective and for several.
_WORDS: dict[Outcome, tuple[str, str]] = {
    "better": ("is better", "are better"),
    "worse": ("is worse", "are worse"),
    "different": ("differs", "differ"),
    "open": ("cannot be told apart", "cannot be told apart"),
    "untested": ("could not be compared", "could not be compared"),
}
_MARKS: dict[Outcome, Mark] = {"better": "better", "worse": "worse"}


def _tally(names: Sequence[str], kinds: Sequence[Outcome]) -> str:
    """Objectives that fared alike, and how, on how many test sets."""
    subject = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
    parts = [(words[len(names) > 1], kinds.count(kind)) for kind, words in _WORDS.items() if kind in kinds]
    if len(parts) > 1:
        told = ", ".join(f"{words} on {count} of {len(kinds)} test sets" for words, count in parts)
    elif len(kinds) > 1:
        told = f"{parts[0][0]} on {'both' if len(kinds) == 2 else f'all {len(kinds)}'} test sets"
    else:
        told = parts[0][0]
    return f"{subject} {told}"


def _sentence(group: Group, metric: str) -> str:
    source, _, name = metric.rpartition("/")
    told = "; ".join(verdict(one) for one in group.differences.get(metric, []))
    best = _leader(group, metric)
    ending = f" The best mean is {best.text}'s, {best.detail}." if best.text else ""
    return f"On {source}, by {name}: {told}.{ending}"


def _verdicts(questions: Sequence[tuple[Group, str]]) -> Table:
    """Objective by test set: how each stands to the first."""
    objectives = list(dict.fromkeys(one for group, _ in questions for one in group.objectives))
    first = objectives[0]
    columns = []
    for group, metric in questions:
        against = {one.objective: _short(one) for one in group.differences.get(metric, [])}
        against[first] = _own(group, first, metric)
        columns.append([against.get(objective, Cell("–", mark="gap")) for objective in objectives])
    best = [_leader(group, metric) for group, metric in questions]
    rows = [[Cell(objective), *cells] for objective, *cells in zip(objectives, *columns, strict=True)]
    several = len({id(group) for group, _ in questions}) > 1
    header = ["objective", *(_test_set(group, metric, several) for group, metric in questions)]
    caption = (
        f"Differences to {first} on the metric that decides, with 95 % intervals. Verdicts go by p values "
        "corrected for many comparisons, so an interval that leaves out 0 may not be enough."
    )
    return Table(caption, header, [*rows, [Cell("best mean"), *best]])


def _test_set(group: Group, metric: str, named: bool) -> str:
    source, _, name = metric.rpartition("/")
    return f"{source}, {name}" + (f" ({group.title})" if named else "")


def _own(group: Group, objective: str, metric: str) -> Cell:
    mean = group.mean(objective, metric) if objective in group.objectives else None
    return Cell("–", mark="gap") if mean is None else Cell(number(mean.value))


def _short(one: Difference) -> Cell:
    found = outcome(one)
    if one.value is None or one.low is None or one.high is None:
        return Cell("no test", one.gap or "", "gap")
    interval = f"{signed(one.value)} [{signed(one.low)}, {signed(one.high)}]"
    if found == "open" and one.low * one.high > 0:
        interval += f", p {one.corrected_p:.2g}"
    return Cell("cannot be told apart" if found == "open" else found, interval, _MARKS.get(found, ""))


def _leader(group: Group, metric: str) -> Cell:
    """The objective with the best mean, which need not be told apart from the next."""
    means = {objective: group.mean(objective, metric) for objective in group.objectives}
    values = {objective: mean.value for objective, mean in means.items() if mean is not None}
    way = direction(metric)
    if way == 0 or len(values) < 2:
        return Cell("")
    best = max(values, key=lambda objective: way * values[objective])
    return Cell(best, number(values[best]))
