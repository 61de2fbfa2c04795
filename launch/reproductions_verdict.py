"""Says of each reproduced claim whether it holds, from the finished comparisons in runs/reproductions.

A claim is a list of parts, a part a list of expected differences between two objectives on one metric. All differences
of a claim are tested together (`posttrain.experiments.statistics`, Holm's correction at 5 %). A part, and a claim,
holds where every expected difference is found, does not hold where one comes out significantly otherwise, and cannot be
told apart in between. Where two are expected to be the same, the whole interval must lie within 0.05.

Writes launch/results/reproductions/NAME.{json,md,png} and README.md, a table of them.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from posttrain.experiments import engine, schema
from posttrain.experiments.plan import Plan
from posttrain.experiments.results import Comparison, RunResult
from posttrain.experiments.statistics import Difference, compare, corrected, over_seeds
from posttrain.experiments.verdicts import outcome, verdict

ROOT = Path(__file__).parents[1]
CONFIGS = Path("configs/compare/reproductions")
BASE = "base"
# A difference in pass@k that counts as none: where equality is expected, not finding a difference is not enough.
MARGIN = 0.05

Expected = Literal["better", "worse", "same", "not worse"]
Verdict = Literal["holds", "does not hold", "cannot be told apart"]


@dataclass(frozen=True)
class Expectation:
    """`objective` stands to `baseline` as `expected` says, on `metric` of `data`."""

    data: str
    metric: str
    objective: str
    baseline: str
    expected: Expected


@dataclass(frozen=True)
class Claim:
    """A paper's claim: the parts, by what they say, and what is shown beside them."""

    text: str
    paper: str
    parts: dict[str, list[Expectation]]
    metrics: tuple[str, ...]
    draw: Callable[[Comparison, "Claim"], Figure]


def against(baseline: str, data: str, metric: str, expected: dict[str, Expected]) -> list[Expectation]:
    return [Expectation(data, metric, objective, baseline, one) for objective, one in expected.items()]


def judge(found: Difference, expected: Expected) -> Verdict:
    """One difference against what was expected of it; ``same`` and ``not worse`` allow for `MARGIN`."""
    if found.low is None or found.high is None:
        return "cannot be told apart"
    said = outcome(found)
    if expected in ("same", "not worse"):
        if found.low > -MARGIN and (found.high < MARGIN or expected == "not worse"):
            return "holds"
        against = ("worse",) if expected == "not worse" else ("worse", "better")
        return "does not hold" if said in against else "cannot be told apart"
    return "holds" if said == expected else "cannot be told apart" if said == "open" else "does not hold"


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a whole from those on its parts."""
    found = set(verdicts)
    return "holds" if found == {"holds"} else "does not hold" if "does not hold" in found else "cannot be told apart"


def select(comparison: Comparison, objective: str, data: str) -> list[RunResult]:
    """The runs of an objective on a data set; a base counts once for each seed, for it has nothing random."""
    if objective != BASE:
        return [run for run in comparison.runs if (run.objective, run.data) == (objective, data)]
    (base,) = [run for (_, name), run in comparison.before.items() if name == data]
    return [dataclasses.replace(base, seed=seed) for seed in comparison.settings["seeds"]]


def full_name(runs: Sequence[RunResult], metric: str) -> str:
    """``source/metric`` of a data set's only source."""
    return next((name for run in runs for name in run.metrics if name.rpartition("/")[2] == metric), metric)


def test(comparison: Comparison, claim: Claim) -> list[tuple[str, Expectation, Difference]]:
    """Every expectation of the claim with the difference that was found."""
    rows = [(part, one) for part, expectations in claim.parts.items() for one in expectations]
    differences = []
    for _, one in rows:
        ours, theirs = (select(comparison, name, one.data) for name in (one.objective, one.baseline))
        differences.append(compare(full_name([*ours, *theirs], one.metric), ours, theirs))
    return [(*row, difference) for row, difference in zip(rows, corrected(differences), strict=True)]


def means(comparison: Comparison, claim: Claim) -> list[dict[str, Any]]:
    """A row for the base and each objective of every data set: mean and half-width of the interval over seeds."""
    rows = []
    for data in dict.fromkeys(run.data for run in comparison.runs):
        for objective in [BASE, *dict.fromkeys(run.objective for run in comparison.runs)]:
            runs = [run for run in select(comparison, objective, data) if run.metrics]
            row: dict[str, Any] = {"data": data, "objective": objective, "runs": 1 if objective == BASE else len(runs)}
            row["settings"] = {key: runs[0].hyperparameters[key] for key in runs[0].hyperparameters} if runs else {}
            for metric in claim.metrics:
                values = [run.metrics[name] for run in runs if (name := full_name(runs, metric)) in run.metrics]
                if values:
                    found = over_seeds(values)
                    half = None if objective == BASE or found.high is None else found.high - found.value
                    row[metric] = {"value": found.value, "half_width": half}
            rows.append(row)
    return rows


def draw_points(comparison: Comparison, claim: Claim) -> Figure:
    """The claim's first metric: a panel for each data set, a point with its interval for each objective."""
    metric, rows = claim.metrics[0], means(comparison, claim)
    data = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(3.6 * len(data), 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        shown = [row for row in rows if row["data"] == name and metric in row]
        base = next((row[metric]["value"] for row in shown if row["objective"] == BASE), None)
        shown = [row for row in shown if row["objective"] != BASE]
        for place, row in enumerate(shown):
            panel.errorbar(place, row[metric]["value"], row[metric]["half_width"], fmt="o", capsize=4)
        if base is not None:
            panel.axhline(base, color="gray", linestyle=":", label="base")
            panel.legend(frameon=False)
        panel.set(title=name, ylabel=f"{metric} (95 % over seeds)" if name == data[0] else "")
        panel.set_xticks(range(len(shown)), [row["objective"] for row in shown], rotation=25, ha="right")
        panel.margins(x=0.2)
    return figure


def draw_reliability(panel: Any, run: RunResult, **style: Any) -> None:
    """Accuracy by confidence of the next token on the run's only source."""
    (rows,) = run.reliability.values()
    bins = [row for row in rows if row["count"]]
    panel.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], marker="o", **style)


def draw_coverage(comparison: Comparison, claim: Claim) -> Figure:
    """pass@1 and pass@32 in the course of the long runs, and the reliability of the answers' tokens after them."""
    long = [name for name in dict.fromkeys(run.objective for run in comparison.runs) if "400" in name]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    one, many, sure = figure.subplots(1, 3)
    for place, objective in enumerate(long):
        runs = [run for run in comparison.runs if run.objective == objective and run.during]
        label, colour = objective.partition("(")[0], f"C{place}"
        for panel, metric in ((one, "pass@1"), (many, "pass@32")):
            name = full_name(runs, metric)
            for run in runs:
                panel.plot(*zip(*run.during[name], strict=True), color=colour, alpha=0.3, linewidth=0.8)
            steps = [step for step, _ in runs[0].during[name]]
            mean = [sum(run.during[name][at][1] for run in runs) / len(runs) for at in range(len(steps))]
            panel.plot(steps, mean, color=colour, marker="o", markersize=3, label=label)
            panel.set(xlabel="optimizer steps", ylabel=metric)
        draw_reliability(sure, runs[0], color=colour, label=label)
    for base in comparison.before.values():
        draw_reliability(sure, base, color="gray", linestyle=":", label=BASE)
    sure.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    sure.set(xlabel="confidence of the next token", ylabel="accuracy", title="reliability after training, seed 0")
    one.legend(frameon=False)
    sure.legend(frameon=False)
    return figure


PRIOR_LEANING = ("probability", "power10", "threshold")
NLL, LONG, SHORT = "nll", "(max_steps=400)", "(max_steps=100)"
SUMS = "three_term_sum"
CLAIMS: dict[str, Claim] = {
    "capability_continuum": Claim(
        "Prior-leaning objectives win on a task that the base knows, nll on one that it does not, nothing in between.",
        "arXiv:2510.00526",
        {
            "strong: prior-leaning objectives beat nll": against(
                NLL, "strong", "pass@1", dict.fromkeys(PRIOR_LEANING, "better")
            ),
            "intermediate: no difference": against(NLL, "intermediate", "pass@1", dict.fromkeys(PRIOR_LEANING, "same")),
            "weak: nll beats prior-leaning objectives": against(
                NLL, "weak", "pass@1", dict.fromkeys(PRIOR_LEANING, "worse")
            ),
        },
        ("pass@1", "pass@8", "nll", "mean_target_probability"),
        draw_points,
    ),
    "pass_at_n": Claim(
        "With longer nll training pass@1 rises while pass@32 falls; direct coverage with n = 32 keeps pass@32.",
        "arXiv:2502.07154",
        {
            "longer nll training raises pass@1": against(NLL + SHORT, SUMS, "pass@1", {NLL + LONG: "better"}),
            "longer nll training lowers pass@32": against(NLL + SHORT, SUMS, "pass@32", {NLL + LONG: "worse"}),
            "direct coverage has the higher pass@32 after long training": against(
                NLL + LONG, SUMS, "pass@32", {"direct_coverage" + LONG: "better"}
            ),
            "direct coverage keeps its own and the base's pass@32": [
                *against("direct_coverage" + SHORT, SUMS, "pass@32", {"direct_coverage" + LONG: "not worse"}),
                *against(BASE, SUMS, "pass@32", {"direct_coverage" + LONG: "not worse"}),
            ],
        },
        ("pass@1", "pass@8", "pass@32", "nll", "expected_calibration_error"),
        draw_coverage,
    ),
    "teacher_logits": Claim(
        "Ground truth plus a teacher's top-5 beats ground truth alone and plain KL distillation, at equal data.",
        "arXiv:2505.24461",
        {
            "logits_finetuning beats nll": against(NLL, "annotated", "pass@1", {"logits_finetuning": "better"}),
            "logits_finetuning beats forward_kl": against(
                "forward_kl", "annotated", "pass@1", {"logits_finetuning": "better"}
            ),
        },
        ("pass@1", "pass@8", "nll", "expected_calibration_error"),
        draw_points,
    ),
    "label_noise": Claim(
        "With wrong labels in the training data, bounded or thresholded losses beat nll, and focal falls behind it.",
        "arXiv:1805.07836; arXiv:2510.00526; arXiv:1708.02002",
        {
            f"{percent} % noise: {text}": against(NLL, f"noise{percent}", "pass@1", expected)
            for percent in (20, 40)
            for text, expected in (
                ("probability and threshold beat nll", {"probability": "better", "threshold": "better"}),
                ("focal falls behind nll", {"focal": "worse"}),
            )
        },
        ("pass@1", "pass@8", "nll", "mean_target_probability", "expected_calibration_error"),
        draw_points,
    ),
}


def record(comparison: Comparison, claim: Claim) -> dict[str, Any]:
    """Everything that the verdict rests on, ready for JSON."""
    rows = test(comparison, claim)
    tests = [
        {
            "part": part,
            "data": one.data,
            "expected": one.expected,
            "verdict": judge(found, one.expected),
            "found": verdict(found),
            **dataclasses.asdict(found),
        }
        for part, one, found in rows
    ]
    parts = {part: together(row["verdict"] for row in tests if row["part"] == part) for part in claim.parts}
    return {
        "claim": claim.text,
        "paper": claim.paper,
        "verdict": together(parts.values()),
        "parts": parts,
        "tests": tests,
        "means": means(comparison, claim),
        "failed_runs": {run.name: run.error for run in comparison.runs if run.status != "done"},
        "date": comparison.date,
        "versions": dict(comparison.versions),
        "hardware": dict(comparison.hardware),
    }


def markdown(name: str, found: dict[str, Any], metrics: Sequence[str]) -> str:
    """The record as a page."""
    lines = [f"# {name}: {found['verdict']}", "", f"{found['claim']} ({found['paper']})", ""]
    lines += ["| part | verdict | differences (95 % intervals, Holm's correction over all of them) |", "|---|---|---|"]
    for part, said in found["parts"].items():
        words = "<br>".join(f"{row['metric']}: {row['found']}" for row in found["tests"] if row["part"] == part)
        lines.append(f"| {part} | {said} | {words} |")
    head = ["data", "objective", "settings", *metrics, "runs"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found["means"]:
        settings = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["settings"].items())
        cells = [
            row["data"],
            row["objective"],
            settings,
            *(cell(row.get(metric)) for metric in metrics),
            str(row["runs"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Mean over seeds ± half-width of the 95 % Student interval; the base was evaluated once.", ""]
    if found["failed_runs"]:
        lines += [f"Failed: {name}, {error}." for name, error in found["failed_runs"].items()] + [""]
    lines += [f"![{name}]({name}.png)", "", f"Configuration: `{CONFIGS / name}.yaml`. To repeat it:", ""]
    lines += [f"```bash\nlaunch/reproductions.sh {name}\n```", ""]
    return "\n".join(lines)


def cell(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "not measured"
    half = "" if found["half_width"] is None else f" ± {found['half_width']:.3f}"
    return f"{found['value']:.3f}{half}"


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
    parser.add_argument("names", nargs="*", help=f"{', '.join(CLAIMS)}; all where none is given")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/results/reproductions")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or CLAIMS:
        claim = CLAIMS[name]
        plan = Plan(schema.load(CONFIGS / f"{name}.yaml"))
        plan.refuse_changes()
        comparison = engine.read(plan, f"launch/reproductions.sh {name}")
        missing = [run.name for run in comparison.runs if run.status == "missing"]
        if missing:
            parser.error(f"{len(missing)} runs of {name} are not finished; go on with launch/reproductions.sh {name}.")
        found = record(comparison, claim)
        (arguments.results / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        page = markdown(name, found, claim.metrics)
        (arguments.results / f"{name}.md").write_text(page, encoding="utf-8")
        claim.draw(comparison, claim).savefig(arguments.results / f"{name}.png", dpi=110)
        print(f"{name}: {found['verdict']}")
        for part, said in found["parts"].items():
            print(f"  {part}: {said}")
    (arguments.results / "README.md").write_text(summary(arguments.results), encoding="utf-8")


if __name__ == "__main__":
    main()
