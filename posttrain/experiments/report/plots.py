"""The report's plots, drawn without a display; one objective has one colour and marker in all of them."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from posttrain.experiments.results import Points, RunResult

# Okabe and Ito's palette, told apart by colour-blind eyes, without its yellow, which white swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_BEFORE = "#6E7781"
_BASE = "before training"
_STYLE: Any = {
    "font.size": 10,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.09,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Longer curves are averaged over intervals: noise from step to step hides what differs between objectives.
_MAX_POINTS = 40

Runs = Mapping[str, Sequence[RunResult]]


@dataclass
class Palette:
    """Objective -> colour, marker and dash, handed out in the order of the comparison."""

    order: list[str] = field(default_factory=list)

    def place(self, objective: str) -> int:
        if objective not in self.order:
            self.order.append(objective)
        return self.order.index(objective)

    def line(self, objective: str) -> dict[str, Any]:
        place = self.place(objective)
        return {
            "color": _COLOURS[place % len(_COLOURS)],
            # shifted by one each time round: no two objectives share both colour and marker
            "marker": _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)],
            "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)],
        }

    def colour(self, objective: str) -> str:
        return str(self.line(objective)["color"])


def curves(runs: Mapping[str, Sequence[Points]], palette: Palette, title: str, label: str) -> bytes:
    """Mean over seeds by optimizer step, with a band from the lowest to the highest seed.

    Args:
        runs: objective -> one curve a seed.
    """
    with mpl.rc_context(_STYLE):
        figure, panel = _figure()
        for objective, found in runs.items():
            steps, values = _by_step(found)
            _band(panel, steps, values, objective, palette)
        panel.set(title=_short(title, 54), xlabel="optimizer step", ylabel=_short(label, 40))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return _png(figure, panel)


def pass_at_k(runs: Runs, before: RunResult | None, source: str, palette: Palette) -> bytes:
    """pass@k over k, on a logarithmic axis, with the band of the seeds."""
    with mpl.rc_context(_STYLE):
        figure, panel = _figure()
        if before is not None and source in before.pass_at_k:
            found = before.pass_at_k[source]
            panel.plot(list(found), list(found.values()), color=_BEFORE, linestyle=(0, (4, 3)), label=_BASE)
        largest = 1
        for objective, members in runs.items():
            series = [list(run.pass_at_k[source].items()) for run in members if run.pass_at_k.get(source)]
            if series:
                steps, values = _by_step(series)
                largest = max(largest, int(steps.max()))
                _band(panel, steps, values, objective, palette)
        panel.set_xscale("log", base=2)
        panel.set_xticks([2**power for power in range(int(math.log2(largest)) + 1)])
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(title=_short(source, 54), xlabel="k (samples)", ylabel="pass@k")
        return _png(figure, panel)


def scatter(runs: Runs, before: RunResult | None, axes: tuple[str, str], palette: Palette) -> bytes:
    """One metric against another: a small point for each seed, a large one for their mean."""
    x, y = axes
    with mpl.rc_context(_STYLE):
        figure, panel = _figure()
        if before is not None and x in before.metrics and y in before.metrics:
            panel.scatter(before.metrics[x], before.metrics[y], s=90, marker="*", color=_BEFORE, label=_BASE)
        for objective, members in runs.items():
            both = [run.metrics for run in members if x in run.metrics and y in run.metrics]
            points = np.array([(metrics[x], metrics[y]) for metrics in both])
            if len(points):
                look = palette.line(objective)
                del look["linestyle"]
                panel.scatter(points[:, 0], points[:, 1], s=14, alpha=0.5, linewidths=0, **look)
                panel.scatter(
                    points[:, 0].mean(), points[:, 1].mean(), s=60, edgecolors="white", label=objective, **look
                )
        panel.set(xlabel=_short(x, 50), ylabel=_short(y, 40))
        return _png(figure, panel)


def reliability(runs: Runs, before: RunResult | None, source: str, palette: Palette) -> bytes:
    """Accuracy over confidence, seeds put together, larger points for bins with more predictions."""
    with mpl.rc_context(_STYLE):
        figure, panel = _figure(height=4.2)
        panel.plot([0, 1], [0, 1], color="#B0B7BE", linewidth=1, zorder=1)
        panel.annotate("calibrated", (0.03, 0.05), rotation=45, color=_BEFORE, fontsize=8, rotation_mode="anchor")
        if before is not None and before.reliability.get(source):
            confidence, accuracy, _ = _bins([before.reliability[source]])
            panel.plot(confidence, accuracy, color=_BEFORE, linestyle=(0, (4, 3)), label=_BASE)
        for objective, members in runs.items():
            tables = [run.reliability[source] for run in members if run.reliability.get(source)]
            if tables:
                confidence, accuracy, share = _bins(tables)
                look = palette.line(objective)
                panel.plot(confidence, accuracy, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
                marker = look["marker"]
                panel.scatter(
                    confidence, accuracy, s=8 + 90 * share, color=look["color"], marker=marker, label=objective
                )
        panel.set(title=_short(source, 54), xlabel="confidence (top-1 probability)", ylabel="accuracy of tokens")
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        return _png(figure, panel)


def probabilities(runs: Runs, before: RunResult | None, source: str, palette: Palette) -> bytes:
    """Share of test tokens by the probability of their target, all seeds together, the base's filled behind."""
    with mpl.rc_context(_STYLE):
        figure, panel = _figure()
        if before is not None and any(before.probability_histogram.get(source, ())):
            share = _share([before.probability_histogram[source]])
            edges = np.linspace(0, 1, len(share) + 1)
            panel.stairs(share, edges, fill=True, color="#D0D7DE", label=_BASE)
        for objective, members in runs.items():
            counts = [run.probability_histogram[source] for run in members if run.probability_histogram.get(source)]
            if counts:
                share, look = _share(counts), palette.line(objective)
                del look["marker"]
                panel.stairs(share, np.linspace(0, 1, len(share) + 1), linewidth=1.6, label=objective, **look)
        panel.set_yscale("log")
        panel.set(
            title=_short(source, 54), xlabel="probability of the target token", ylabel="share of tokens (log scale)"
        )
        return _png(figure, panel)


def bars(values: Mapping[str, Sequence[float]], palette: Palette, title: str, label: str) -> bytes:
    """A bar for each objective's mean, a point for each run."""
    with mpl.rc_context(_STYLE):
        figure, panel = _figure(height=1.2 + 0.42 * len(values))
        for place, (objective, found) in enumerate(values.items()):
            mean = sum(found) / len(found)
            panel.barh(place, mean, color=palette.colour(objective), alpha=0.8, height=0.62)
            panel.plot(found, [place] * len(found), "o", color="#1F2328", markersize=3)
            panel.annotate(
                f"{mean:.3g}", (max(found), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
            )
        panel.set_yticks(range(len(values)), ["\n".join(textwrap.wrap(_short(name, 44), 24)) for name in values])
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set(title=_short(title, 54), xlabel=label)
        panel.margins(x=0.14)
        panel.set_xlim(left=0)
        return _png(figure, None)


def _figure(height: float = 3.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure, legend_of: Axes | None) -> bytes:
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        if labels:
            short = [_short(label, 44) for label in labels]
            columns = max(1, min(len(short), 64 // (max(map(len, short)) + 6)))
            rows = math.ceil(len(short) / columns)
            figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))
            figure.legend(handles, short, loc="outside lower center", ncols=columns)
    buffer = io.BytesIO()
    # Without the date and version that matplotlib writes, a report made again is the same file.
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _short(text: str, length: int) -> str:
    """At most ``length`` characters; names differ at their ends more often than in their middles."""
    if len(text) > length:
        text = text[: (length - 1) // 2] + "…" + text[len(text) - length // 2 :]
    # A dollar would start a formula.
    return text.replace("$", r"\$")


def _by_step(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (steps,) and values (curves, steps), NaN where a curve has none; long ones are averaged over intervals."""
    steps = np.unique([step for curve in curves for step, _ in curve]).astype(float)
    edges = steps
    if len(steps) > _MAX_POINTS:
        edges = np.linspace(steps[0], steps[-1], _MAX_POINTS + 1)[:-1]
        steps = edges + (edges[1] - edges[0]) / 2
    sums, counts = np.zeros((2, len(curves), len(steps)))
    for row, curve in enumerate(curves):
        for step, value in curve:
            if math.isfinite(value):
                place = int(np.searchsorted(edges, step, side="right")) - 1
                sums[row, place] += value
                counts[row, place] += 1
    return steps, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _band(panel: Axes, steps: np.ndarray, values: np.ndarray, objective: str, palette: Palette) -> None:
    measured = np.isfinite(values).any(axis=0)
    steps, values = steps[measured], values[:, measured]
    if not len(steps):
        return
    look = palette.line(objective)
    every = max(1, len(steps) // 8)
    panel.plot(steps, np.nanmean(values, axis=0), label=objective, markersize=4, markevery=every, linewidth=1.5, **look)
    if len(values) > 1:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        panel.fill_between(steps, low, high, color=look["color"], alpha=0.16, linewidth=0)


def _bins(
    tables: Sequence[Sequence[Mapping[str, float | int | None]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and share of predictions of every bin that holds some, over all tables."""
    sums = np.zeros((len(tables[0]), 3))
    for table in tables:
        for row, one in zip(sums, table, strict=True):
            count = one["count"] or 0
            row += count, count * (one["confidence"] or 0.0), count * (one["accuracy"] or 0.0)
    sums = sums[sums[:, 0] > 0]
    return sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0], sums[:, 0] / sums[:, 0].sum()


def _share(counts: Sequence[Sequence[int]]) -> np.ndarray:
    total = np.sum(np.asarray(counts, dtype=float), axis=0)
    return np.where(total > 0, total / max(total.sum(), 1.0), np.nan)
