"""Which plots a group of runs gives; what was not measured is not drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.experiments.report import plots
from posttrain.experiments.report.document import Block, Figure, Figures
from posttrain.experiments.report.groups import Group, headline
from posttrain.experiments.results import Points, RunResult

# More plots of one kind for one group would not be looked at.
_MOST = 6
_LOGGED_FIRST = ("loss", "eval_loss", "mean_token_accuracy", "grad_norm")
_BOOKKEEPING = frozenset({"learning_rate", "epoch", "step", "num_tokens", "num_input_tokens_seen", "total_flos"})
_BAND = "Lines are means over seeds, bands reach from the lowest to the highest seed."


@dataclass
class Drawer:
    """Draws with one palette and gives every figure a name of its own."""

    palette: plots.Palette
    drawn: int = 0

    def figure(self, kind: str, alt: str, png: bytes) -> Figure:
        self.drawn += 1
        return Figure(f"{self.drawn:02d}_{kind}", png, alt)

    def learning(self, group: Group) -> list[Block]:
        """What the trainers logged, by optimizer step."""
        names = dict.fromkeys(name for run in group.runs for name, points in run.curves.items() if points)
        wanted = [name for name in _LOGGED_FIRST if name in names]
        wanted += [name for name in names if name not in _LOGGED_FIRST and name not in _BOOKKEEPING]
        figures = self._curves(group, wanted[:_MOST], "learning", lambda run: run.curves)
        loss = " Each objective's loss is its own: compare their shapes, not their heights." if "loss" in names else ""
        return _figures(figures, f"Logged in training.{loss} {_BAND}{_omitted(wanted)}")

    def during(self, group: Group, tuned_for: str | None) -> list[Block]:
        """Test metrics on the way, from the base at step 0."""
        names = dict.fromkeys(name for run in group.runs for name, points in run.during.items() if points)
        first = {f"{source}/{headline(found, tuned_for)}" for source, found in group.sources.items()}
        wanted = sorted(names, key=lambda name: name not in first)
        figures = self._curves(group, wanted[:_MOST], "during", lambda run: run.during)
        return _figures(figures, f"Measured on the test data in the course of training. {_BAND}{_omitted(wanted)}")

    def pass_at_k(self, group: Group) -> list[Block]:
        figures = self._sources(group, "pass_at_k", "pass@k over k", plots.pass_at_k)
        return _figures(figures, f"Chance that at least one of k samples is correct, after training. {_BAND}")

    def forget_retain(self, group: Group) -> list[Block]:
        figures = []
        for x, y in forget_retain_axes(group.metrics)[:_MOST]:
            png = plots.scatter(group.objectives, group.before, (x, y), self.palette)
            figures.append(self.figure("forget_retain", f"{y} over {x}, {group.title}", png))
        return _figures(figures, "What is forgotten against what is kept: small points are seeds, large ones means.")

    def reliability(self, group: Group) -> list[Block]:
        caption = (
            "How often predictions of a given confidence are right; under the diagonal a model is too sure. All seeds "
            "put together, larger points hold more predictions."
        )
        return _figures(self._sources(group, "reliability", "Reliability diagram", plots.reliability), caption)

    def probabilities(self, group: Group) -> list[Block]:
        figures = self._sources(
            group, "probability_histogram", "Histogram of the targets' probabilities", plots.probabilities
        )
        filled = " The filled area is the base before training." if group.before is not None else ""
        return _figures(figures, f"Test tokens by the probability that the model gives them, all seeds.{filled}")

    def cost(self, group: Group) -> list[Block]:
        """Time and memory of training."""
        minutes = _per_objective(group, lambda run: None if run.seconds is None else run.seconds / 60)
        memory = _per_objective(
            group, lambda run: None if run.peak_memory_bytes is None else run.peak_memory_bytes / 2**30
        )
        figures = [
            self.figure(kind, f"{title} per objective, {group.title}", plots.bars(values, self.palette, title, unit))
            for kind, title, unit, values in (
                ("time", "Time of training", "minutes", minutes),
                ("memory", "Peak memory of training", "GiB", memory),
            )
            if values
        ]
        return _figures(figures, "Bars are means, points are single runs.")

    def _curves(
        self, group: Group, names: Sequence[str], kind: str, points: Callable[[RunResult], Mapping[str, Points]]
    ) -> list[Figure]:
        figures = []
        for name in names:
            found = {
                objective: series
                for objective, runs in group.objectives.items()
                if (series := [points(run)[name] for run in runs if points(run).get(name)])
            }
            source, _, metric = name.rpartition("/")
            png = plots.curves(found, self.palette, name if source else metric, metric)
            figures.append(self.figure(kind, f"{name} over optimizer steps, {group.title}", png))
        return figures

    def _sources(self, group: Group, what: str, shows: str, draw: Callable[..., bytes]) -> list[Figure]:
        """A figure for every source that a finished run has ``what`` of."""
        names = [source for run in group.runs for source, found in getattr(run, what).items() if found]
        return [
            self.figure(
                what, f"{shows} on {source}, {group.title}", draw(group.objectives, group.before, source, self.palette)
            )
            for source in dict.fromkeys(names)
        ]


def forget_retain_axes(metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of what measures forgetting and what measures keeping.

    A pair has the same name but for ``forget`` and ``retain`` in its source or its metric; ``forget_quality`` (and
    ``forget_quality_geometric``) goes with ``model_utility`` (``model_utility_geometric``) of the same source.
    """
    found = []
    for metric in metrics:
        source, _, name = metric.rpartition("/")
        utility = f"{source}/{name.replace('forget_quality', 'model_utility')}"
        others = (metric.replace("forget", "retain"), utility if name.startswith("forget_quality") else metric)
        found += [(metric, other) for other in others if other != metric and other in metrics]
    return found


def _figures(figures: Sequence[Figure], caption: str) -> list[Block]:
    return [Figures(figures, caption)] if figures else []


def _omitted(wanted: Sequence[str]) -> str:
    return f" Not drawn: {', '.join(wanted[_MOST:])}." if len(wanted) > _MOST else ""


def _per_objective(group: Group, value: Callable[[RunResult], float | None]) -> dict[str, list[float]]:
    found = {
        objective: [one for run in runs if (one := value(run)) is not None]
        for objective, runs in group.objectives.items()
    }
    return {objective: values for objective, values in found.items() if values}
