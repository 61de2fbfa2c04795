"""Collects the runs of `launch/preference_experiments.sh real` into launch/results/preference/real.md and .json."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/preference/real"
NAMES = ("dpo", "dpo_2", "simpo", "orpo", "mmpo", "kto", "bco")
METRICS = ("reward_accuracy", "logratio_margin", "chosen_logp_change", "rejected_logp_change", "margin_nll")
# the command names folders of one machine
KEPT = ("started", "seed", "versions", "git", "processes", "distributed_type", "hardware")
# What loading says of rows that it skips, or that contradict themselves; the numbers of rows are left out.
COUNTED = re.compile(r"((?:Skipped )?\d+ of \d+ rows of (?:the )?\S+ ?\S*.*?): rows? [\d, .]+")


def said_of_rows(log: Path) -> list[str]:
    """Counts that a run logged, each once (processes repeat them)."""
    text = re.sub(r"\s+", " ", log.read_text(encoding="utf-8")) if log.exists() else ""
    return list(dict.fromkeys(COUNTED.findall(text)))


def read(name: str) -> dict[str, Any] | None:
    """One run, None where it has not finished."""
    folder = RUNS / name
    if not (folder / "evaluation_after.json").exists():
        return None
    about = json.loads((folder / "run.json").read_text())
    reports = [json.loads((folder / f"evaluation_{when}.json").read_text()) for when in ("before", "after")]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ((source, found),) = reports[1]["sources"].items()
    return {
        "data": source,
        "metrics": found["metrics"],
        "counts": found["counts"],
        "before": reports[0]["sources"][source]["metrics"],
        "losses": [line["loss"] for line in logged if "loss" in line],
        "resources": json.loads((folder / "resources.json").read_text()),
        "rows": said_of_rows(RUNS / f"{name}.log"),
        "about": {key: about[key] for key in KEPT if key in about},
    }


def cell(found: dict[str, float] | None) -> str:
    if found is None:
        return "no such model"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def main() -> None:
    found = {name: run for name in NAMES if (run := read(name)) is not None}
    lines = [
        "# Real data, 100 steps each",
        "",
        "A Llama of 260K parameters pretrained on children's stories. Held-out pairs after training against before, "
        "with bootstrap intervals; a margin of log-ratios as a probability has a meaning for some objectives alone.",
        "",
        f"| objective | data | processes | loss, first and last 10 steps | {' | '.join(METRICS)} | pairs | seconds |",
        "|" + "---|" * (len(METRICS) + 6),
    ]
    for name, run in found.items():
        metrics = run["metrics"]
        losses = f"{run['losses'][0]:.4f}, {run['losses'][-1]:.4f}"
        cells = [name.partition("_")[0], run["data"], str(run["about"]["processes"]), losses]
        cells += [cell(metrics.get(metric)) for metric in METRICS]
        cells += [str(metrics["chosen_logp_change"]["n"]), f"{run['resources']['train_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if "dpo" in found and "dpo_2" in found:
        pairs = zip(found["dpo"]["losses"], found["dpo_2"]["losses"], strict=True)
        largest = max(abs(one - two) / abs(one) for one, two in pairs)
        lines += ["", f"dpo's training losses on one and on two processes agree to {largest:.1e}, relatively."]
    lines += ["", "What was said of the rows:", ""]
    lines += [f"- {name}: {sentence}" for name, run in found.items() for sentence in run["rows"]]
    target = ROOT / "launch/results/preference"
    target.mkdir(parents=True, exist_ok=True)
    (target / "real.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"date": date.today().isoformat(), "runs": found}
    (target / "real.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
