"""From run folders to results."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain import run_record
from posttrain.experiments.jobs import DONE_FILE, FAILED_FILE
from posttrain.experiments.results import RunResult, Status

Items = dict[str, dict[str, list[float]]]


def read_run(
    folder: Path,
    *,
    name: str,
    objective: str,
    base: str,
    data: str,
    seed: int,
    hyperparameters: Mapping[str, Any],
    before: RunResult | None = None,
) -> RunResult:
    """A run's results as far as its folder holds them; files of one that is not done are left alone.

    Args:
        folder: of the run.
        name, objective, base, data, seed, hyperparameters: as in `RunResult`.
        before: the base's evaluation, which the values during training begin with.
    """
    status, error = status_of(folder)
    found: dict[str, Any] = {"status": status, "error": error}
    if status == "done":
        report = _json(folder / run_record.AFTER_FILE)
        logged = list(json_lines(folder / run_record.METRICS_FILE))
        resources = _json(folder / run_record.RESOURCES_FILE)
        found |= _measured(report, folder / run_record.ITEMS_AFTER_FILE)
        found |= {
            "curves": _curves(logged),
            "during": _during(folder, before, found["metrics"], max((line["step"] for line in logged), default=0)),
            "seconds": resources.get("train_seconds"),
            "peak_memory_bytes": resources.get("peak_memory_bytes"),
        }
    labels: dict[str, Any] = {"name": name, "objective": objective, "base": base, "data": data, "seed": seed}
    return RunResult(**labels, folder=folder, hyperparameters=hyperparameters, **found)


def read_base(folder: Path, *, base: str, data: str, seed: int) -> RunResult:
    """The evaluation of a base without training."""
    status, error = status_of(folder)
    found: dict[str, Any] = {"status": status, "error": error}
    if status == "done":
        report = _json(folder / run_record.EVALUATION_FILE)
        found |= _measured(report, folder / run_record.EVALUATION_ITEMS_FILE)
    return RunResult(name=folder.name, objective="base", base=base, data=data, seed=seed, folder=folder, **found)


def metrics_of(folder: Path) -> dict[str, float]:
    """``source/metric`` -> value of a folder's final evaluation; empty where there is none."""
    return _metrics(_json(folder / run_record.AFTER_FILE) or _json(folder / run_record.EVALUATION_FILE))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none where there is no file; a last line that a kill cut short is left out."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def status_of(folder: Path) -> tuple[Status, str | None]:
    """Of the job that a folder belongs to, and why it failed."""
    if (folder / DONE_FILE).exists():
        return "done", None
    if (folder / FAILED_FILE).exists():
        return "failed", str(_json(folder / FAILED_FILE)["error"])
    return "missing", None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _metrics(report: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{source}/{metric}": float(estimate["value"])
        for source, found in report.get("sources", {}).items()
        for metric, estimate in found["metrics"].items()
        if estimate["value"] is not None and math.isfinite(estimate["value"])
    }


def _measured(report: Mapping[str, Any], items_file: Path) -> dict[str, Any]:
    sources = report.get("sources", {})
    items = _items(items_file, sources)
    return {
        "metrics": _metrics(report),
        "items": items,
        "reliability": {name: one["reliability"] for name, one in sources.items() if one.get("reliability")},
        "probability_histogram": {
            name: one["probability_histogram"] for name, one in sources.items() if one.get("probability_histogram")
        },
        "pass_at_k": {
            name: _pass_at_k(one["samples"], one["samples_correct"]) for name, one in items.items() if "samples" in one
        },
    }


def _items(path: Path, sources: Mapping[str, Any]) -> Items:
    """Source -> number -> one value an item, NaN where the item lacks it."""
    values: dict[str, dict[str, dict[int, float]]] = {name: defaultdict(dict) for name in sources}
    for line in json_lines(path):
        found, row = values[line["source"]], line["row"]
        for name, value in line.items():
            if name not in ("source", "row") and isinstance(value, int | float) and not isinstance(value, bool):
                found[name][row] = float(value)
        if isinstance(line.get("correct"), list):
            found["samples"][row] = float(len(line["correct"]))
            found["samples_correct"][row] = float(sum(line["correct"]))
    return {
        source: {
            name: [one.get(row, math.nan) for row in range(int(sources[source]["rows"]))] for name, one in found.items()
        }
        for source, found in values.items()
    }


def _pass_at_k(samples: Sequence[float], correct: Sequence[float]) -> dict[int, float]:
    """pass@k for every k, 1 - C(n-c, k) / C(n, k) averaged over items (arXiv:2107.03374, Eq. 1).

    Written out here because the evaluation's own needs torch loaded, which reading results does not.
    """
    usable = [(int(n), int(c)) for n, c in zip(samples, correct, strict=True) if n == n]
    return {
        k: sum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in usable) / len(usable)
        for k in range(1, min((n for n, _ in usable), default=0) + 1)
    }


def _curves(logged: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in logged:
        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
                found[name].append((line["step"], float(value)))
    return dict(found)


def _during(
    folder: Path, before: RunResult | None, after: Mapping[str, float], last: int
) -> dict[str, list[tuple[int, float]]]:
    """The evaluations on the way, with the base's in front and the final one behind; empty where there is none."""
    steps = {int(path.stem.rpartition("_")[2]): path for path in folder.glob(run_record.DURING_PATTERN)}
    if not steps:
        return {}
    reports = [(0, dict(before.metrics))] if before is not None else []
    reports += [(step, _metrics(_json(path))) for step, path in sorted(steps.items())]
    reports.append((last, dict(after)))
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, metrics in reports:
        for name, value in metrics.items():
            found[name].append((step, value))
    return dict(found)
