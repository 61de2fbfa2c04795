"""Numbers and plots of finished unlearning comparisons, from runs/compare to launch/results/unlearning.

NAME.json holds what is drawn, so that the plots can be made again without the runs: each run's metrics, those of the
untouched model and of the oracle (the twin that never saw the rows to forget), every trial of the tuning, and retain
loss and dual variable by step where a constraint combines the two sides. NAME.md is the table, NAME.png the scatter of
forget quality against model utility, NAME_constraint.png the constraint.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from posttrain.experiments import engine, schema
from posttrain.experiments.plan import Plan
from posttrain.experiments.reading import metrics_of
from posttrain.experiments.results import Comparison, RunResult

ROOT = Path(__file__).parents[1]
CONFIGS = Path("configs/compare/unlearning")
METRICS = {
    "tofu/forget_quality_geometric": "forget quality (p)",
    "tofu/forget_ks_geometric": "KS distance",
    "tofu/model_utility_geometric": "model utility",
    "tofu/balance_geometric": "balance",
    "tofu_forget/probability": "forget probability",
    "tofu_forget/rouge_l_recall": "forget ROUGE-L",
    "tofu_forget/extraction_strength": "extraction strength",
    "tofu_forget/exact_memorization": "exact memorization",
    "tofu_retain/probability": "retain probability",
    "tofu/mia_min_k_auc": "Min-K AUC",
    "tofu/privleak": "PrivLeak",
}
TRIED = (*tuple(METRICS)[:7], "tofu_retain/probability")
RELEARNED, ROUNDED, STATES = "audit_forget_relearning", "audit_forget_rounding", "audit_forget_states"
AUDIT = {
    f"{RELEARNED}/probability_shown_epoch0": "before relearning",
    f"{RELEARNED}/probability_shown_epoch3": "shown rows after it",
    f"{RELEARNED}/probability_unshown_epoch3": "other rows after it",
    f"{RELEARNED}/relearning_robustness_probability_shown": "relearning robustness",
    f"{ROUNDED}/probability_unrounded": "unrounded",
    f"{ROUNDED}/probability_int4_group128": "4-bit weights",
    f"{STATES}/cka_original_layer4": "CKA to the untouched model",
    f"{STATES}/cka_retrained_layer4": "CKA to the oracle",
    f"{STATES}/group_told_layer4": "author told by neighbours",
}
QUALITY, UTILITY = "tofu/forget_quality_geometric", "tofu/model_utility_geometric"
CURVES = ("retain_loss", "dual")
# p-values below are drawn here
FLOOR = 1e-12
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>phd"

Tree = dict[str, Any]


def record(
    comparison: Comparison, oracle: Mapping[str, float], audits: Path | None = None, trials: Sequence[Tree] = ()
) -> Tree:
    """What is drawn and told, ready for JSON; whatever a run lacks is absent.

    Args:
        comparison: as read from its folder.
        oracle: ``source/metric`` -> value of the twin.
        audits: folder of audits, one folder each.
        trials: of the tuning, as `tried` gives them.
    """
    untouched: dict[str, float] = {}
    for found in comparison.before.values():
        untouched.update(found.metrics)
    return {
        "question": comparison.question,
        "date": comparison.date,
        "versions": dict(comparison.versions),
        "hardware": dict(comparison.hardware),
        "marks": {"untouched": _chosen(untouched), "oracle": _chosen(oracle)},
        "runs": [_run(run) for run in comparison.runs],
        "trials": list(trials),
        "audit": {folder.name: metrics_of(folder) for folder in sorted(audits.iterdir())} if audits else {},
    }


def tried(plan: Plan, comparison: Comparison) -> list[Tree]:
    """Every trial of the tuning: what it tried, what came of it, and whether it was taken."""
    taken = [(row["objective"], row["hyperparameters"]) for row in comparison.trials if row["chosen"]]
    return [
        {
            "objective": trial.run.objective,
            "hyperparameters": dict(trial.values),
            "chosen": (trial.run.objective, dict(trial.values)) in taken,
            "metrics": _chosen(metrics_of(job.folder)),
        }
        for trial, job in plan.trials
    ]


def _chosen(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in METRICS if name in metrics}


def _run(run: RunResult) -> Tree:
    found: Tree = {
        "objective": run.objective,
        "seed": run.seed,
        "status": run.status,
        "hyperparameters": dict(run.hyperparameters),
        "metrics": _chosen(run.metrics),
    }
    if run.error is not None:
        found["error"] = run.error
    if run.seconds is not None:
        found["seconds"] = run.seconds
    if "dual" in run.curves:
        found["curves"] = {name: [list(point) for point in run.curves[name]] for name in CURVES if name in run.curves}
    return found


def by_objective(found: Mapping[str, Any]) -> dict[str, list[Tree]]:
    """Objective -> its finished runs, in the order of the comparison."""
    groups: dict[str, list[Tree]] = {}
    for run in found["runs"]:
        if run["status"] == "done":
            groups.setdefault(run["objective"], []).append(run)
    return groups


def mean(runs: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Over the runs that have it; NaN where none does. P-values are averaged as logarithms."""
    values = [run["metrics"][metric] for run in runs if metric in run["metrics"]]
    if not values:
        return math.nan
    if metric == QUALITY:
        return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / len(values))
    return sum(values) / len(values)


def table(found: Mapping[str, Any]) -> str:
    """A Markdown table: untouched model and oracle, then every objective's mean over seeds."""
    rows = [(name, [{"metrics": metrics}]) for name, metrics in found["marks"].items()]
    rows += [(f"{name} ({len(runs)})", list(runs)) for name, runs in by_objective(found).items()]
    lines = [
        f"# {found['question']}",
        "",
        f"Mean over the seeds (their number in brackets; of p-values the geometric mean). {found['date']}.",
        "",
        *_table(rows, METRICS),
    ]
    if found.get("audit"):
        order = [name for name in (*found["marks"], *by_objective(found)) if name in found["audit"]]
        order += [name for name in found["audit"] if name not in order]
        audited = [(name, [{"metrics": found["audit"][name]}]) for name in order]
        lines += ["", "Audit, seed 0; probabilities are those of the answers to forget.", "", *_table(audited, AUDIT)]
    if found.get("trials"):
        rows = [(_trial(one), [one]) for one in found["trials"]]
        intro = "Trials of the tuning (bold: taken), by learning rate and epochs."
        lines += ["", intro, "", *_table(rows, {name: METRICS[name] for name in TRIED})]
    failed = [f"{run['objective']}, seed {run['seed']}" for run in found["runs"] if run["status"] != "done"]
    if failed:
        lines += ["", "Not finished: " + "; ".join(failed) + "."]
    return "\n".join(lines) + "\n"


def _trial(found: Mapping[str, Any]) -> str:
    values = ", ".join(f"{value:g}" for value in found["hyperparameters"].values())
    mark = "**" if found["chosen"] else ""
    return f"{mark}{found['objective']}, {values}{mark}"


def _table(rows: Sequence[tuple[str, Sequence[Tree]]], metrics: Mapping[str, str]) -> list[str]:
    lines = ["| | " + " | ".join(metrics.values()) + " |", "|---|" + "---:|" * len(metrics)]
    for name, runs in rows:
        lines.append(f"| {name} | " + " | ".join(_shown(mean(runs, metric), metric) for metric in metrics) + " |")
    return lines


def _shown(value: float, metric: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1e}" if metric == QUALITY and value < 0.001 else f"{value:.3f}"


def scatter(found: Mapping[str, Any]) -> Figure:
    """Forget quality over model utility: a small mark a seed, a large one the mean of an objective."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, runs) in enumerate(by_objective(found).items()):
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        points = [_point(run["metrics"]) for run in runs if {QUALITY, UTILITY} <= run["metrics"].keys()]
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), s=14, alpha=0.4, linewidths=0, **style)
        middle = mean(runs, UTILITY), max(mean(runs, QUALITY), FLOOR)
        axes.scatter(*middle, s=70, edgecolors="white", linewidths=0.6, label=name, zorder=3, **style)
    for name, marker in (("untouched", "X"), ("oracle", "*")):
        metrics = {QUALITY: 1.0, **found["marks"][name]} if name == "oracle" else found["marks"][name]
        if {QUALITY, UTILITY} <= metrics.keys():
            axes.scatter(*_point(metrics), s=220, marker=marker, color="black", label=name, zorder=4)
    axes.set_yscale("log")
    axes.axhline(0.05, color="#6E7781", linewidth=0.8, linestyle="--")
    axes.set_xlabel("model utility")
    axes.set_ylabel(f"forget quality: KS p against the oracle (drawn at {FLOOR:g} at least)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def _point(metrics: Mapping[str, float]) -> tuple[float, float]:
    return metrics[UTILITY], max(metrics[QUALITY], FLOOR)


def constraint(found: Mapping[str, Any]) -> Figure | None:
    """Retain loss with its bound, and the dual variable, over optimizer steps; None where no run has them."""
    groups = {name: [run for run in runs if "curves" in run] for name, runs in by_objective(found).items()}
    groups = {name: runs for name, runs in groups.items() if runs}
    if not groups:
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for place, (name, runs) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        for number, run in enumerate(runs):
            for axes, curve in ((above, "retain_loss"), (below, "dual")):
                steps, values = zip(*run["curves"][curve], strict=True)
                axes.plot(steps, values, color=colour, alpha=0.8, linewidth=1.2, label=name if number == 0 else None)
        epsilon = _epsilon(runs[0])
        if epsilon is not None:
            above.axhline(epsilon, color=colour, linestyle="--", linewidth=0.9)
    above.set_yscale("log")
    above.set_ylabel("retain loss, nats a token")
    below.set_ylabel("dual variable")
    below.set_xlabel("optimizer step")
    above.legend(title="dashed: the bound", title_fontsize=8, frameon=False, fontsize=8)
    return figure


def _epsilon(run: Mapping[str, Any]) -> float | None:
    bound = (run["hyperparameters"].get("combine") or {}).get("constraint", {}).get("epsilon")
    return None if bound is None else float(bound)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of a file in configs/compare/unlearning")
    parser.add_argument("--oracle", type=Path, help="folder of the twin's evaluation; without it, draw NAME.json again")
    parser.add_argument("--audits", type=Path, help="folder of audits, one folder each")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/results/unlearning")
    given = parser.parse_args(arguments)
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / f"{given.name}.json"
    if given.oracle is not None:
        plan = Plan(schema.load(CONFIGS / f"{given.name}.yaml"))
        comparison = engine.read(plan, f"launch/tofu_tiny.sh {given.name}")
        found = record(comparison, metrics_of(given.oracle), given.audits, tried(plan, comparison))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(table(found), encoding="utf-8")
    scatter(found).savefig(path.with_suffix(".png"), dpi=110)
    drawn = constraint(found)
    if drawn is not None:
        drawn.savefig(given.results / f"{given.name}_constraint.png", dpi=110)


if __name__ == "__main__":
    main()
