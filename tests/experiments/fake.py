"""A comparison's settings and children that write what a run writes, without training anything."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.experiments.jobs import Job
from posttrain.experiments.plan import Plan
from posttrain.experiments.runner import Runner, Slot
from posttrain.experiments.schema import CompareConfig, load

# Its nll is the distance of the learning rate's exponent from a best one that the objective's name decides, so that
# tuning has something to find. An objective called `broken` fails, and a seed of 9 never ends.
CHILD = r"""
import json, math, pathlib, sys, time, yaml
folder, command = pathlib.Path(sys.argv[1]), sys.argv[2]
tree = yaml.safe_load((folder / "resolved.yaml").read_text())
with (folder.parent / "started.txt").open("a") as file:
    file.write(folder.name + "\n")
if tree["model"].get("name_or_path") == "unfit":
    sys.exit("posttrain: max_new_tokens=128 leaves no room for a prompt")
source = tree["evaluation"]["data"][0]
if command == "evaluate":
    nll, name = 3.0, "evaluation"
else:
    if tree["trainer"]["seed"] == 9:
        time.sleep(60)
    objective = tree["objective"] if isinstance(tree["objective"], str) else tree["objective"]["name"]
    if objective == "broken":
        print("Traceback (most recent call last):\n  File x\nRuntimeError: CUDA out of memory. Tried to allocate 2 GiB")
        sys.exit(1)
    best = {"nll": -3, "probability": -4}.get(objective, -2)
    nll = 1 + abs(math.log10(float(tree["trainer"].get("learning_rate", 1e-3))) - best)
    name = "evaluation_after"
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    (folder / "model.safetensors").write_text("weights")
report = {"settings": {}, "sources": {source["task"]: {"rows": 2, "split": source["split"],
          "metrics": {"nll": {"value": nll, "low": nll, "high": nll, "n": 2}}}}}
(folder / f"{name}.json").write_text(json.dumps(report))
items = [{"source": source["task"], "row": row, "nll": nll, "tokens": 3} for row in range(2)]
(folder / f"{name}_items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
"""

SETTINGS: dict[str, Any] = {
    "run": {
        "data": {"train": {"task": "addition", "size": 100, "seed": 10}},
        "trainer": {"learning_rate": 1e-3},
        "evaluation": {"data": [{"task": "addition", "split": "test", "size": 20}]},
    },
    "budget": {"steps": 3},
    "objectives": {"nll": "nll", "probability": "probability"},
    "seeds": [0],
}


def config(folder: Path, **changes: Any) -> CompareConfig:
    """`SETTINGS` with whole keys replaced, through a YAML file as a user would write it."""
    path = folder / "compare.yaml"
    # JSON is YAML
    path.write_text(json.dumps({"output_dir": str(folder / "out"), **SETTINGS, **changes}))
    return load(path)


def plan(folder: Path, **changes: Any) -> Plan:
    """The jobs of `config`."""
    return Plan(config(folder, **changes))


class Silent:
    """Shows nothing, but remembers the states it was told."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def update(self, jobs: Sequence[Job]) -> None:
        self.seen.append({job.name: job.state for job in jobs})


def runner(keep: Sequence[int] = (), display: Any = None, places: int = 2) -> Runner:
    """Runs `CHILD` for every job."""

    def command(job: Job, slot: Slot) -> list[str]:
        return [sys.executable, "-c", CHILD, str(job.folder), job.command]

    return Runner([Slot(None)] * places, display or Silent(), command=command, keep=keep)


def started(folder: Path, kind: str) -> list[str]:
    """Names of the jobs that were started, in order: of ``before``, ``trials`` or ``runs``."""
    path = folder / "out" / kind / "started.txt"
    return path.read_text().split() if path.exists() else []
