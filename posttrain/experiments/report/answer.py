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
    names = {one.metric.rpartition("/")[2] for one in differences}
    by = f", by {names.pop()}" if len(names) == 1 else ""
    return f"Against {first}{by}: " + "; ".join(f"{name} {_tally(kinds)}" for name, kinds in found.items()) + "."


_MARKS: dict[Outcome, Mark] = {"better": "better", "worse": "worse"}
_WORDS: dict[Outcome, str] = {
    "better": "is better",
    "worse": "is worse",
    "different": "differs",
    "open": "cannot be told apart",
    "untested": "could not be compared",
}


def _tally(kinds: Sequence[Outcome]) -> str:
    parts = [(words, kinds.count(kind)) for kind, words in _WORDS.items() if kind in kinds]
    if len(parts) > 1:
        return ", ".join(f"{words} on {count} of {len(kinds)} test sets" for words, count in parts)
    words = parts[0][0]
    return words if len(kinds) == 1 else f"{words} on {'both' if len(kinds) == 2 else f'all {len(kinds)}'} test sets"


def _sentence(group: Group, metric: str) -> str:
    source, _, name = metric.rpartition("/")
    told = "; ".join(verdict(one) for one in group.differences.get(metric, []))
    best = _leader(group, metric)
    ending = f" The best mean is {best.text}'s, {best.detail}." if best.text else ""
    return f"On {source}, by {name}: {told}.{ending}"


def _verdicts(questions: Sequence[tuple[Group, str]]) -> Table:
    """Test set by objective: how each stands to the first."""
    objectives = list(dict.fromkeys(one for group, _ in questions for one in group.objectives))
    rows = []
    for group, metric in questions:
        source, _, name = metric.rpartition("/")
        against = {one.objective: _short(one) for one in group.differences.get(metric, [])}
        cells = [against.get(objective, Cell("–", mark="gap")) for objective in objectives[1:]]
        rows.append([Cell(source, group.title), Cell(name), *cells, _leader(group, metric)])
    header = ["test set", "metric", *objectives[1:], "best mean"]
    caption = (
        f"Differences to {objectives[0]} on the metric that decides, with 95 % intervals. Verdicts go by p values "
        "corrected for many comparisons, so an interval that leaves out 0 may not be enough."
    )
    return Table(caption, header, rows)


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
