"""One picture out of the CSVs: time and memory by case and competitor, and how they grow."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from launch.benchmark import results
from launch.benchmark.cases import CASES
from launch.benchmark.results import MEASURED, Row, ratio
from launch.benchmark.targets import slope

# The groups in which everybody takes part.
SIDE_BY_SIDE = ("nll", "dpo", "threshold_0.2", "probability_10", "logp_statistics", "kl")
CUT = 2.5
# Competitors in greys and blues, ours in warm colours.
ORDER = (
    ("dense", "#4d4d4d"), ("torch.compile", "#8c8c8c"), ("linear_cross_entropy", "#9ecae1"),
    ("linear_cross_entropy_mean", "#6baed6"), ("trl", "#2171b5"), ("liger", "#74c476"), ("cce", "#238b45"),
    ("cce_exact", "#00441b"), ("posttrain one pass (streamed)", "#d7301f"),
    ("posttrain one pass, 160 MB (streamed)", "#99000d"), ("posttrain budget 0 (streamed)", "#fc8d59"),
    ("posttrain budget auto (streamed)", "#fdbb84"), ("posttrain one pass (triton)", "#7a0177"),
    ("posttrain budget 0 (triton)", "#c51b8a"), ("posttrain budget auto (triton)", "#f768a1"),
)  # fmt: skip


def bars(axis: Axes, rows: Sequence[Row], column: str, title: str) -> None:
    """A group of bars per case: each one's median by dense torch's in the same round, or its extra memory."""
    cases = [name for name in CASES if any(row["case"] == name for row in rows)]
    present = [entry for entry in ORDER if any(row["competitor"] == entry[0] for row in rows)]
    width = 0.8 / max(len(present), 1)
    for i, (name, colour) in enumerate(present):
        places, heights = [], []
        for x, case in enumerate(cases):
            found = [row for row in rows if row["case"] == case and row["competitor"] == name]
            dense = [row for row in rows if row["case"] == case and row["competitor"] == "dense"]
            if found and column == "time_s" and dense:
                heights.append(ratio(found[0]["times_s"], dense[0]["times_s"]))
            elif found and column == "extra_mib":
                heights.append(found[0]["extra_mib"])
            else:
                continue
            places.append(x + (i - (len(present) - 1) / 2) * width)
        axis.bar(places, heights, width, color=colour, label=name)
    axis.set_xticks(range(len(cases)), cases)
    axis.set_title(title)
    if column == "time_s":
        axis.axhline(1, color="black", linewidth=0.6)
        # what takes far longer leaves the picture, with its number, so that the others can be told apart
        axis.set_ylim(0, CUT)
        for bar in axis.patches:
            if bar.get_height() > CUT:
                axis.text(bar.get_x(), CUT * 0.97, f"{bar.get_height():.1f}", fontsize=6, ha="right", va="top")
    else:
        axis.set_yscale("log")


def curves(axis: Axes, rows: Sequence[Row], group: str, size: str, column: str, label: str) -> None:
    """One line a competitor, with its slope in the legend."""
    for name, colour in ORDER:
        found = sorted(
            (row for row in rows if row["group"] == group and row["competitor"] == name), key=lambda row: row[size]
        )
        if len(found) > 1:
            sizes, values = [row[size] for row in found], [row[column] for row in found]
            axis.loglog(sizes, values, "o-", color=colour, label=f"{name}: {slope(sizes, values):.2f}", markersize=3)
    ticks = sorted({row[size] for row in rows if row["group"] == group})
    axis.set_xticks(ticks, [f"{tick / 1024:g}k" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("tokens" if size == "tokens" else "vocabulary")
    axis.set_ylabel(label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6, title="slope", title_fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def draw(rows: Sequence[Row], path: Path) -> None:
    """The picture of one CSV."""
    rows = [row for row in rows if row["status"] == MEASURED]
    models = [name for name in dict.fromkeys(row["shape"] for row in rows) if name != "growth"]
    figure = plt.figure(figsize=(13, 5.5 * len(models) + 5.0), layout="constrained")
    grid = figure.add_gridspec(len(models) + 1, 1, height_ratios=[5.5] * len(models) + [5.0])
    parts = [figure.add_subfigure(grid[i]) for i in range(len(models) + 1)]
    for part, model in zip(parts[:-1], models, strict=True):
        own = [
            row
            for row in rows
            if row["case"] != "two_passes" and row["shape"] == model and row["group"] in SIDE_BY_SIDE
        ]
        first = own[0]
        size = f"{model}, {first['tokens']:.0f} tokens, {first['dtype']}, {first['device']}"
        upper, lower = part.subplots(2, 1)
        bars(upper, own, "time_s", f"{size}: time of forward and backward by dense torch's")
        bars(lower, own, "extra_mib", f"{size}: peak memory beyond inputs and gradients, MiB")
        upper.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    axes = parts[-1].subplots(1, 4)
    grown = [row for row in rows if row["group"].startswith("growth")]
    axis = iter(axes)
    for group, against in (("growth_tokens", "tokens"), ("growth_vocabulary", "vocab")):
        for column, label in (("time_s", "nll: time, s"), ("extra_mib", "nll: extra memory, MiB")):
            curves(next(axis), grown, group, against, column, label)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Draw launch/results/kernels.png of the GPU's CSV where there is one, else of the CPU's."""
    parser = argparse.ArgumentParser(prog="launch/benchmark_kernels.sh plot", description=main.__doc__)
    known = [path for name in ("gpu", "cpu") if (path := results.place(name)).exists()]
    parser.add_argument("--csv", type=Path, default=known[0] if known else None)
    parser.add_argument("--output", type=Path, default=results.RESULTS / "kernels.png")
    arguments = parser.parse_args()
    if arguments.csv is None:
        parser.error("there is no launch/results/kernels_cpu.csv or kernels_gpu.csv yet; measure one first")
    draw(results.read(arguments.csv), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
