"""The files that a run leaves: a CSV of rows and, beside it, a JSON of where they come from."""

import csv
import datetime
import hashlib
import json
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from posttrain.run_record import git_state, hardware, version_of, versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "launch/results"
COLUMNS = (
    "run", "group", "key", "case", "competitor", "status", "shape", "tokens", "width", "vocab", "dtype", "device",
    "live_share", "rounds", "time_s", "time_min_s", "time_q1_s", "time_q3_s", "time_max_s", "forward_s", "backward_s",
    "best_competitor", "ratio_to_best", "extra_mib", "peak_mib", "needed_units", "needed_share", "done_units",
    "done_share", "matmul_gflops_per_s", "gradient_error", "loss_error", "times_s", "backward_times_s",
)  # fmt: skip
SAME = ("set", "machine", "versions", "kernels", "threads")

Row = dict[str, Any]
MEASURED = "measured"


class OtherRunError(ValueError):
    """The file holds results that the run's rows would not fit to."""


def place(name: str) -> Path:
    """Where a set's CSV lies; that of the smoke set is not for keeping."""
    return (ROOT / "runs/benchmark" if name == "smoke" else RESULTS) / f"kernels_{name}.csv"


def about(name: str, command: str) -> dict[str, Any]:
    """Date, machine, versions and sources of a run that begins now."""
    kernels = hashlib.sha256()
    for path in sorted((ROOT / "posttrain/kernels").rglob("*.py")):
        kernels.update(path.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    git = git_state(ROOT)
    packages = ("triton", "liger-kernel", "cut-cross-entropy")
    return {
        "run": f"{now:%Y%m%d-%H%M%S}-{git['commit'][:7] if git else 'nogit'}",
        "started": now.isoformat(timespec="seconds"),
        "set": name,
        "command": command,
        "machine": hardware() | {"processor": processor()},
        "threads": torch.get_num_threads(),
        "versions": versions() | {package: version_of(package) for package in packages},
        "git": git,
        "kernels": kernels.hexdigest()[:16],
    }


def processor() -> str:
    """The model of the processor, as far as the system tells."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()


def start(path: Path, record: dict[str, Any], *, overwrite: bool = False) -> tuple[str, list[Row]]:
    """The run's name and the rows it has already: of an earlier start of the same run, if there was one.

    Raises:
        OtherRunError: the file holds a run of another machine, other versions or other kernels.
    """
    beside = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not overwrite:
        earlier = json.loads(beside.read_text(encoding="utf-8"))
        # through JSON, as the earlier one went
        now = json.loads(json.dumps(record))
        different = [key for key in SAME if earlier.get(key) != now[key]]
        if different:
            raise OtherRunError(
                f"{path.name} holds run {earlier['run']} with other {', '.join(different)}; pass --overwrite to "
                "replace it"
            )
        return earlier["run"], [row for row in read(path) if row["run"] == earlier["run"]]
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writeheader()
    return record["run"], []


def append(path: Path, rows: Iterable[Row]) -> None:
    """A whole group at once, so that a killed run leaves no part of one."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows with their numbers; what was not measured is None, lists stand for the rounds."""
    texts = {"run", "group", "key", "case", "competitor", "status", "shape", "dtype", "device", "best_competitor"}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: text if name in texts else _number(name, text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(name: str, text: str) -> float | list[float] | None:
    if name.endswith("times_s"):
        return [float(part) for part in text.split()]
    return float(text) if text else None


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and ends, in seconds."""
    low, high = min(times), max(times)
    if len(times) > 1:
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    else:
        first = third = low
    return {
        "time_s": statistics.median(times),
        "time_min_s": low,
        "time_q1_s": first,
        "time_q3_s": third,
        "time_max_s": high,
    }


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of one's time by the other's in the same round."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))
