"""Says of each claim about preference and binary feedback whether it holds, from the comparisons in runs/preference.

Claims, tests and verdicts are made as in `reproductions_verdict`: all expected differences of one claim are tested
together (Holm), a part holds where every expected difference is found. That one objective is "no better" than another
means that the other is at most 0.05 worse; "as good" means at most 0.05 worse itself. Writes
launch/results/preference/NAME.{json,md,png} and README.md.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from reproductions_verdict import ROOT, Claim, Expectation, against, cell, means, record

from posttrain.experiments import engine, schema
from posttrain.experiments.plan import Plan
from posttrain.experiments.results import Comparison, RunResult

CONFIGS = Path("configs/compare/preference")
METRICS = (
    "reward_accuracy",
    "pass@1",
    "margin_nll",
    "margin_brier_score",
    "margin_calibration_error",
    "logratio_margin",
    "chosen_logp_change",
    "rejected_logp_change",
)
# The files that a comparison's runs read, and what of their annotation is told.
ANNOTATED = {"graded": ("pairs-*",), "topics": ("split-*", "mixed-*")}
SAID = (
    "pairs", "wrong_labels", "reward_model_agrees_with_the_truth", "auc", "balanced_accuracy", "mean_undesirable_weight"
)  # fmt: skip
WORDS, PAIRS = "reverse_word", "graded_pairs"


def no_better(objective: str, baseline: str, data: str, metric: str) -> list[Expectation]:
    """`objective` does not lead `baseline`."""
    return against(objective, data, metric, {baseline: "not worse"})


def as_good(baseline: str, data: str, objectives: Sequence[str]) -> list[Expectation]:
    """None more than 0.05 behind the baseline in the order of held-out pairs."""
    return against(baseline, data, "reward_accuracy", dict.fromkeys(objectives, "not worse"))


def reliability(runs: Sequence[RunResult], bins: int = 8) -> tuple[list[float], list[float]]:
    """Probability of the completion that the margin prefers, by the margin and in truth, bin by bin."""
    sums: dict[int, list[float]] = {}
    for run in runs:
        beta = float(run.hyperparameters.get("beta", math.nan))
        items = next(iter(run.items.values()), {})
        for margin, truth in zip(
            items.get("logratio_margin", ()), items.get("preference_probability", ()), strict=False
        ):
            if math.isfinite(beta * margin):
                confidence = 1 / (1 + math.exp(-abs(beta * margin)))
                total = sums.setdefault(min(int((2 * confidence - 1) * bins), bins - 1), [0.0, 0.0, 0.0])
                for place, value in enumerate((1.0, confidence, truth if margin > 0 else 1 - truth)):
                    total[place] += value
    # a bin of a few pairs shows nothing
    kept = [total for _, total in sorted(sums.items()) if total[0] >= 20]
    return [total[1] / total[0] for total in kept], [total[2] / total[0] for total in kept]


def draw_accuracy(panel: Any, comparison: Comparison, claim: Claim, data: str, source: str) -> None:
    """The order of held-out pairs on one source: a point with its interval for each objective."""
    rows = [row for row in means(comparison, claim) if row["data"] == data and row["objective"] != "base"]
    metric = f"{source}/reward_accuracy" if f"{source}/reward_accuracy" in claim.metrics else "reward_accuracy"
    shown = [row for row in rows if metric in row]
    for place, row in enumerate(shown):
        panel.errorbar(place, row[metric]["value"], row[metric]["half_width"], fmt="o", capsize=4, color=f"C{place}")
    panel.set_xticks(range(len(shown)), [row["objective"] for row in shown], rotation=35, ha="right")
    panel.set(title=f"{data}: {source}", ylabel="reward accuracy (95 % over seeds)")
    panel.margins(x=0.15)


def draw_pairs(comparison: Comparison, claim: Claim) -> Figure:
    """The order of held-out pairs, and the reliability of margins as probabilities."""
    (data,) = {run.data for run in comparison.runs}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, comparison, claim, data, WORDS)
    for place, objective in enumerate(dict.fromkeys(run.objective for run in comparison.runs)):
        runs = [run for run in comparison.runs if run.objective == objective and run.items]
        confidence, truth = reliability(runs)
        if confidence:
            right.plot(confidence, truth, marker="o", markersize=3, color=f"C{place}", label=objective)
    right.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.6)
    right.set(xlabel="probability by the margin", ylabel="true probability", title="reliability of margins, all seeds")
    right.legend(frameon=False, fontsize=8)
    return figure


def draw_topics(comparison: Comparison, claim: Claim) -> Figure:
    """The order of held-out pairs by data set and topic."""
    data = list(dict.fromkeys(run.data for run in comparison.runs))
    figure = Figure(figsize=(9, 4 * len(data)), layout="constrained")
    for panels, name in zip(figure.subplots(len(data), 2, squeeze=False), data, strict=True):
        for panel, source in zip(panels, (WORDS, "addition"), strict=True):
            draw_accuracy(panel, comparison, claim, name, source)
    return figure


CALIBRATION = ("margin_nll", "margin_brier_score", "margin_calibration_error")
ACCURACY = "reward_accuracy"
NOISY = "noisy_pairs"
WEIGHTED = {name: f"{name}_weighted" for name in ("bco_class_means", "bco_running_mean")}
CLAIMS: dict[str, Claim] = {
    "graded": Claim(
        "Under wrong labels margins help: mmpo is better calibrated than dpo, and madpo orders pairs better by what a "
        "reward model knows.",
        "arXiv:2410.03145; arXiv:2510.05342",
        {
            "mmpo is better calibrated than dpo": [
                one for metric in CALIBRATION for one in against("dpo", NOISY, metric, {"mmpo": "better"})
            ],
            "madpo is ahead of dpo": against("dpo", NOISY, ACCURACY, {"madpo": "better", "madpo_oracle": "better"}),
            "madpo is ahead of beta_dpo": against("beta_dpo", NOISY, ACCURACY, {"madpo": "better"}),
            "shuffled margins are no better than dpo": no_better("madpo_shuffled", "dpo", NOISY, ACCURACY),
        },
        METRICS,
        draw_pairs,
    ),
    "binary": Claim(
        "Feedback on single completions does what pairs do, also with nine of ten desirable completions dropped.",
        "arXiv:2402.01306; arXiv:2404.04656",
        {
            "kto and bco are as good as dpo on balanced labels": as_good(
                "dpo", PAIRS, ["kto", "bco_running_mean", "bco_class_means"]
            ),
            "kto with its weights is still as good with 90 % dropped": as_good("dpo", PAIRS, ["kto_dropped"]),
            "bco is still as good with 90 % dropped": as_good(
                "dpo", PAIRS, ["bco_running_mean_dropped", "bco_class_means_dropped"]
            ),
            "kto's baseline and bco's shift do no harm": [
                *no_better("apo_zero_unpaired", "kto", PAIRS, ACCURACY),
                *no_better("implicit_reward_ce", "bco_class_means", PAIRS, ACCURACY),
            ],
        },
        METRICS,
        draw_pairs,
    ),
    "topics": Claim(
        "Density weights help bco where desirable and undesirable completions answer other prompts, and only there.",
        "arXiv:2404.04656",
        {
            "they help on what desirable completions answer": [
                one
                for plain, weighted in WEIGHTED.items()
                for one in against(plain, "split", f"{WORDS}/{ACCURACY}", {weighted: "better"})
            ],
            "they change nothing where the topics are mixed": [
                one
                for plain, weighted in WEIGHTED.items()
                for source in (WORDS, "addition")
                for one in against(plain, "mixed", f"{source}/{ACCURACY}", {weighted: "same"})
            ],
        },
        tuple(f"{source}/{metric}" for source in (WORDS, "addition") for metric in METRICS[:3]),
        draw_topics,
    ),
}


def markdown(name: str, found: dict[str, Any], metrics: Sequence[str]) -> str:
    """The record as a page."""
    lines = [f"# {name}: {found['verdict']}", "", f"{found['claim']} ({found['paper']})", ""]
    lines += ["| part | verdict | differences (95 % intervals, Holm's correction over all of them) |", "|---|---|---|"]
    for part, said in found["parts"].items():
        words = "<br>".join(f"{row['metric']}: {row['found']}" for row in found["tests"] if row["part"] == part)
        lines.append(f"| {part} | {said} | {words} |")
    lines += [
        "",
        f"| data | objective | learning rate | {' | '.join(metrics)} | runs |",
        "|" + "---|" * (len(metrics) + 4),
    ]
    for row in found["means"]:
        rate = row["settings"].get("trainer.learning_rate", "")
        cells = [row["data"], row["objective"], str(rate), *(cell(row.get(metric)) for metric in metrics)]
        lines.append("| " + " | ".join([*cells, str(row["runs"])]) + " |")
    lines += ["", "Mean over seeds ± half-width of the 95 % Student interval; the base was evaluated once.", ""]
    if found["failed_runs"]:
        lines += [f"Failed: {run}, {error}." for run, error in found["failed_runs"].items()] + [""]
    lines += [f"- {file}: {about}" for file, about in found["rows"].items()] + [""]
    lines += [f"![{name}]({name}.png)", "", f"Configuration: `{CONFIGS / name}.yaml`. To repeat it:", ""]
    return "\n".join([*lines, f"```bash\nlaunch/preference_experiments.sh {name}\n```", ""])


def about_rows(name: str) -> dict[str, Any]:
    """What annotation said of the runs' files: how good the reward model or the classifier is."""
    found = {}
    for pattern in ANNOTATED.get(name, ()):
        for about in sorted(Path("runs/preference/data").glob(f"{pattern}.jsonl.about.json")):
            said = json.loads(about.read_text(encoding="utf-8"))
            found[about.name.removesuffix(".about.json")] = {key: said[key] for key in SAID if key in said}
    return found


def summary(folder: Path) -> str:
    """A table of all claims that have been judged."""
    lines = ["| claim | verdict | its parts |", "|---|---|---|"]
    for name in CLAIMS:
        if (folder / f"{name}.json").exists():
            found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            parts = "; ".join(f"{part}: {said}" for part, said in found["parts"].items())
            lines.append(f"| {found['claim']} ([{name}]({name}.md)) | **{found['verdict']}** | {parts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CLAIMS)
    parser.add_argument("--results", type=Path, default=ROOT / "launch/results/preference")
    arguments = parser.parse_args()
    name, folder = arguments.name, arguments.results
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(schema.load(CONFIGS / f"{name}.yaml"))
    plan.refuse_changes()
    comparison = engine.read(plan, f"launch/preference_experiments.sh {name}")
    missing = [run.name for run in comparison.runs if run.status == "missing"]
    if missing:
        parser.error(
            f"{len(missing)} runs of {name} are not finished; go on with launch/preference_experiments.sh {name}."
        )
    claim = CLAIMS[name]
    found = {**record(comparison, claim), "rows": about_rows(name)}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(name, found, claim.metrics), encoding="utf-8")
    claim.draw(comparison, claim).savefig(folder / f"{name}.png", dpi=110)
    (folder / "README.md").write_text(summary(folder), encoding="utf-8")
    print(f"{name}: {found['verdict']}")
    for part, said in found["parts"].items():
        print(f"  {part}: {said}")


if __name__ == "__main__":
    main()
