"""Plots of evaluations, drawn without a display."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from posttrain.evaluation.bootstrap import estimate, mean
from posttrain.evaluation.passk import pass_at_k
from posttrain.evaluation.report import Report

# Beyond this many values of k the curve is drawn through points spaced evenly on the logarithmic axis.
_MAX_POINTS = 64


def plot_pass_at_k(before: Report | None, after: Report, path: str | Path) -> Path:
    """Draw pass@k for k = 1..samples with bootstrap bands, one panel per source, and save it (format by suffix).

    Args:
        before: drawn beside ``after``; None draws ``after`` alone.
        after: the report whose sources are drawn.
        path: file to write; its folder must exist.

    Raises:
        ValueError: no source of ``after`` has generated completions.
    """
    names = [name for name, source in after.sources.items() if source.correct is not None]
    if not names:
        raise ValueError("pass@k cannot be drawn: no source was evaluated by generation; add it to metrics.")
    figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for report, label, colour in ((before, "before", "tab:gray"), (after, "after", "tab:blue")):
            source = report.sources.get(name) if report is not None else None
            if report is not None and source is not None and source.correct is not None:
                _curve(panel, source.correct, report, label if before is not None else "", colour)
        panel.set(title=name, xlabel="k", ylabel="pass@k", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
        if before is not None:
            panel.legend()
    figure.savefig(path, dpi=150)
    return Path(path)


def _curve(panel: Axes, correct: npt.NDArray[np.bool_], report: Report, label: str, colour: str) -> None:
    samples = correct.shape[1]
    ks = np.unique(np.geomspace(1, samples, _MAX_POINTS).round().astype(int))
    settings = {name: report.settings[name] for name in ("resamples", "level", "seed")}
    points = [estimate(mean(pass_at_k(correct, int(k))), **settings) for k in ks]
    panel.plot(ks, [point.value for point in points], marker="o", markersize=3, label=label, color=colour)
    bounds = [point.low for point in points], [point.high for point in points]
    panel.fill_between(ks, *bounds, alpha=0.2, color=colour, linewidth=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
