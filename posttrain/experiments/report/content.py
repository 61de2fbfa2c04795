"""What the report says, section by section; a section without data is left out."""

from collections.abc import Callable, Sequence

import yaml

from posttrain.experiments.report import tables
from posttrain.experiments.report.answer import answer
from posttrain.experiments.report.document import Block, Code, Document, Heading, Section, Text
from posttrain.experiments.report.figures import Drawer
from posttrain.experiments.report.groups import Group, groups
from posttrain.experiments.report.plots import Palette
from posttrain.experiments.results import Comparison

_UNFOLDED_LINES = 12
_SEEDS = "Values are means over seeds with 95 % Student intervals; where a single seed finished, there is no interval."
_ONE_SEED = "One seed: what varies between seeds is unknown, so values have no interval."
_TESTS = (
    "Differences have 95 % intervals from a paired bootstrap over test items, each averaged over the seeds that both "
    "objectives finished, with Student noise added for what varies between seeds; where a metric has no value per "
    "item, from a paired t test over seeds. p values are corrected (Holm) for all differences on one metric in this "
    "report, intervals are not; a verdict asks for a corrected p of at most 0.05. Cohen's d and the rank-biserial "
    "correlation are of the items' differences."
)


def document(comparison: Comparison) -> Document:
    """The whole report, plots drawn."""
    found = groups(comparison)
    tune = comparison.settings.get("tune")
    tuned_for = tune.get("metric") if isinstance(tune, dict) else None
    drawer = Drawer(Palette(list(dict.fromkeys(run.objective for run in comparison.runs))))
    sections = [
        Section("Answer", answer(found, tuned_for)),
        Section("Setting", _setting(comparison)),
        Section("Results", _results(found)),
        Section("Tuning", [tables.trials(comparison)] if comparison.trials else []),
        Section("Failed and missing runs", _unfinished(comparison)),
        Section("Learning curves", _each(found, drawer.learning)),
        Section("During training", _each(found, lambda group: drawer.during(group, tuned_for))),
        Section("pass@k", _each(found, drawer.pass_at_k)),
        Section("Forgetting and keeping", _each(found, drawer.forget_retain)),
        Section("Calibration", _each(found, drawer.reliability)),
        Section("Target probabilities", _each(found, drawer.probabilities)),
        Section("Time and memory", _each(found, drawer.cost)),
        Section("Repeat it", _repeat(comparison)),
    ]
    done = sum(run.status == "done" for run in comparison.runs)
    subtitle = f"{done} of {len(comparison.runs)} runs finished" + (f", {comparison.date}" if comparison.date else "")
    return Document(comparison.question, subtitle, [section for section in sections if section.blocks])


def _setting(comparison: Comparison) -> list[Block]:
    settings = {
        name: value for name, value in comparison.settings.items() if name != "run" and value not in (None, {}, [])
    }
    blocks: list[Block] = []
    if settings:
        blocks.append(tables.pairs("What was compared, and under which budget.", ("setting", "value"), settings))
    if comparison.settings.get("run"):
        run = yaml.safe_dump(comparison.settings["run"], sort_keys=False, allow_unicode=True)
        blocks.append(_code(run, "The configuration that all runs start from"))
    return blocks


def _results(found: Sequence[Group]) -> list[Block]:
    seeds = {len(runs) for group in found for runs in group.objectives.values() if runs}
    if not seeds:
        return []
    blocks: list[Block] = [Text(_ONE_SEED if seeds == {1} else _SEEDS)]
    if any(len(group.objectives) > 1 for group in found):
        blocks.append(Text(_TESTS))
    for group in found:
        for source in group.sources:
            blocks.append(Heading(f"{source} ({group.title})" if len(found) > 1 else source))
            blocks.append(tables.results(group, source))
            if len(group.objectives) > 1:
                blocks.append(tables.differences(group, source))
    return blocks


def _unfinished(comparison: Comparison) -> list[Block]:
    runs = [run for run in comparison.runs if run.status != "done"]
    return [tables.unfinished(runs)] if runs else []


def _repeat(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = [Code(comparison.command)] if comparison.command else []
    for caption, header, values in (
        ("Versions the runs were made with.", ("package", "version"), comparison.versions),
        ("The machine the runs were made on.", ("hardware", "value"), comparison.hardware),
    ):
        if values:
            blocks.append(tables.pairs(caption, header, values))
    return blocks


def _each(found: Sequence[Group], draw: Callable[[Group], list[Block]]) -> list[Block]:
    """The blocks of every group, under its name where there are several."""
    blocks: list[Block] = []
    for group in found:
        drawn = draw(group)
        if drawn and len(found) > 1:
            blocks.append(Heading(group.title))
        blocks.extend(drawn)
    return blocks


def _code(text: str, title: str) -> Block:
    return Code(text, title if text.count("\n") > _UNFOLDED_LINES else "")
