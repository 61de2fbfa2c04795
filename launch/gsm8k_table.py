"""Collects the runs of launch/gsm8k.sh into launch/results/gsm8k.md and .json."""

import json
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = {
    "nll": "nll, 1 process",
    "probability_power": "probability_power (alpha 0.5), 1 process",
    "nll_ddp2": "nll, DDP, 2 processes",
    "nll_zero2": "nll, ZeRO-2, 2 processes",
    "nll_zero3": "nll, ZeRO-3, 2 processes",
}
# the command names folders of one machine
KEPT = ("started", "seed", "versions", "git", "processes", "distributed_type", "hardware")
METRICS = ("nll", "mean_target_probability", "token_accuracy", "pass@1")


def measures(run: Path, when: str) -> dict[str, dict]:
    """Metric -> value, low, high and n of one evaluation."""
    (source,) = json.loads((run / f"evaluation_{when}.json").read_text())["sources"].values()
    return source["metrics"]


def cell(found: dict | None) -> str:
    """``value [low, high]``; None where the run was not evaluated so."""
    if found is None:
        return "not measured"
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def main() -> None:
    """Write the table of every run that has finished."""
    lines = [f"| run | engine | {' | '.join(METRICS)} |", "|---|---|" + "---|" * len(METRICS)]
    record = {"date": date.today().isoformat(), "runs": {}}
    for folder, label in RUNS.items():
        run = ROOT / "runs/gsm8k" / folder
        if not (run / "evaluation_after.json").exists():
            continue
        about = json.loads((run / "run.json").read_text())
        if "base" not in record["runs"] and (run / "evaluation_before.json").exists():
            before = measures(run, "before")
            record["runs"]["base"] = before
            lines.append(f"| base | | {' | '.join(cell(before.get(metric)) for metric in METRICS)} |")
        after = measures(run, "after")
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in losses if "loss" in entry]
        record["runs"][folder] = {"after": after, "about": {key: about[key] for key in KEPT}, "train_losses": losses}
        engine = f"{about['distributed_type']} x {about['processes']}"
        lines.append(f"| {label} | {engine} | {' | '.join(cell(after.get(metric)) for metric in METRICS)} |")
    table = "\n".join(lines) + "\n"
    results = ROOT / "launch/results"
    (results / "gsm8k.md").write_text(table)
    (results / "gsm8k.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    main()
