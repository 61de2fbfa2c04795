"""Base, nll, probability and direct_coverage on the quickstart's task: pass@1 and pass@8 over seeds.

Each run is the quickstart with another objective and seed, launched as a user would. A finished run is not repeated, so
the script goes on where it stopped. Writes launch/results/objectives_quickstart.{json,md}.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from scipy import stats

import posttrain
from posttrain.run_record import versions

ROOT = Path(__file__).parents[1]
OBJECTIVES = {
    "nll": "{name: nll}",
    "probability": "{name: probability}",
    "direct_coverage": "{name: direct_coverage, n: 8}",
}
METRICS = ("pass@1", "pass@8")


def run(objective: str, seed: int, folder: Path, extra: list[str]) -> dict[str, dict[str, float]]:
    """Train and evaluate one seed; metric -> value, before and after."""
    output = folder / f"{objective}-seed{seed}"
    # the base is the same for every objective: one evaluation a seed is enough
    moments = ("before", "after") if objective == "nll" else ("after",)
    results = {when: output / f"evaluation_{when}.json" for when in moments}
    if not all(path.exists() for path in results.values()):
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu1.yaml",
            "-m", "posttrain", "train", "configs/quickstart.yaml", f"objective={OBJECTIVES[objective]}",
            f"trainer.seed={seed}", f"data.train.seed={100 + seed}", f"evaluation.seed={seed}",
            f"trainer.output_dir={output}", f"evaluation.before={str('before' in moments).lower()}", "overwrite=true",
            *extra,
        ]  # fmt: skip
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    found = {}
    for when, path in results.items():
        (source,) = json.loads(path.read_text())["sources"].values()
        found[when] = {metric: source["metrics"][metric]["value"] for metric in METRICS}
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % Student interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan
    return sum(values) / len(values), float(half)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/objectives_table")
    parser.add_argument("--results", type=Path, default=ROOT / "launch/results")
    arguments, extra = parser.parse_known_args()
    rows: dict[str, dict[str, list[float]]] = {"base": {metric: [] for metric in METRICS}}
    for seed in range(arguments.seeds):
        for objective in OBJECTIVES:
            found = run(objective, seed, arguments.folder, extra)
            for metric in METRICS:
                rows.setdefault(objective, {}).setdefault(metric, []).append(found["after"][metric])
                if objective == "nll":
                    rows["base"][metric].append(found["before"][metric])
    record = {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "posttrain": posttrain.__version__,
        "versions": versions(),
        "overrides": extra,
        "values": rows,
    }
    (arguments.results / "objectives_quickstart.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [f"| objective | {' | '.join(METRICS)} |", "|---|" + "---|" * len(METRICS)]
    for name, metrics in rows.items():
        cells = []
        for metric in METRICS:
            mean, half = interval(metrics[metric])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (arguments.results / "objectives_quickstart.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
