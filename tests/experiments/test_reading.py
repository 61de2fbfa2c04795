"""From the files of a run to its result."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.experiments.jobs import failure
from posttrain.experiments.reading import read_base, read_run

IDENTITY: dict[str, Any] = {"name": "a", "objective": "a", "base": "b", "data": "d", "seed": 0, "hyperparameters": {}}


def report(value: float, **extra: Any) -> dict[str, Any]:
    return {"sources": {"s": {"rows": 3, "metrics": {"pass@1": {"value": value}}, **extra}}}


def lines(*found: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of 4 steps, evaluated after steps 2 and 3 (written out of order)."""
    (tmp_path / "done.json").write_text("{}")
    histogram = [0, 5]
    bins = [{"low": 0.0, "high": 1.0, "count": 0, "confidence": None, "accuracy": None}]
    after = report(0.75, probability_histogram=histogram, reliability=bins)
    after["sources"]["s"]["metrics"]["perplexity"] = {"value": math.inf}
    (tmp_path / "evaluation_after.json").write_text(json.dumps(after))
    (tmp_path / "evaluation_step_3.json").write_text(json.dumps(report(0.5)))
    (tmp_path / "evaluation_step_2.json").write_text(json.dumps(report(0.25)))
    (tmp_path / "evaluation_after_items.jsonl").write_text(
        lines(
            {"source": "s", "row": 0, "prompt": "1", "correct": [True, False, False], "pass@1": 1 / 3, "nll": 0.5},
            {"source": "s", "row": 1, "prompt": "2", "correct": [False, False, False], "pass@1": 0.0},
            {"source": "s", "row": 2, "prompt": "3", "correct": [True, True, False], "pass@1": 2 / 3, "nll": 1.5},
        )
    )
    (tmp_path / "metrics.jsonl").write_text(
        lines({"step": 2, "epoch": 0.1, "loss": 2.0}, {"step": 4, "epoch": 0.2, "loss": 1.0}) + '{"step": 5, "lo'
    )
    (tmp_path / "resources.json").write_text(json.dumps({"train_seconds": 1.5, "peak_memory_bytes": 7}))
    return tmp_path


def test_a_finished_run_is_read_whole(folder: Path) -> None:
    before = read_base(folder, base="b", data="d", seed=0)
    assert before.metrics == {}, "a base has no evaluation_after.json"
    (folder / "evaluation.json").write_text(json.dumps(report(0.1)))
    before = read_base(folder, base="b", data="d", seed=0)
    found = read_run(folder, **IDENTITY, before=before)
    assert found.status == "done" and found.seconds == 1.5 and found.peak_memory_bytes == 7
    assert found.metrics == {"s/pass@1": 0.75}, "an infinite value is a gap"
    assert found.during == {"s/pass@1": [(0, 0.1), (2, 0.25), (3, 0.5), (4, 0.75)]}
    assert found.curves == {"loss": [(2, 2.0), (4, 1.0)]}
    assert found.probability_histogram == {"s": [0, 5]} and found.reliability["s"][0]["accuracy"] is None

    items = found.items["s"]
    assert items["pass@1"] == [1 / 3, 0.0, 2 / 3] and items["samples_correct"] == [1, 0, 2]
    assert items["nll"][0] == 0.5 and math.isnan(items["nll"][1]), "the item was not scored"
    # by hand, of 3 samples with 1, 0 and 2 correct: 2 without a correct one are drawn in 1 of 3, 3 of 3, 0 of 3 ways
    assert found.pass_at_k["s"] == pytest.approx({1: 1 / 3, 2: (2 / 3 + 0 + 1) / 3, 3: 2 / 3})


def test_an_unfinished_run_is_missing_and_a_failed_one_says_why(folder: Path) -> None:
    (folder / "done.json").unlink()
    found = read_run(folder, **IDENTITY)
    assert found.status == "missing" and found.metrics == {} and found.curves == {}
    (folder / "failed.json").write_text(json.dumps({"error": "RuntimeError: no"}))
    found = read_run(folder, **IDENTITY)
    assert (found.status, found.error) == ("failed", "RuntimeError: no")


def test_learning_curves_need_evaluations_on_the_way(folder: Path) -> None:
    for path in folder.glob("evaluation_step_*.json"):
        path.unlink()
    assert read_run(folder, **IDENTITY).during == {}


LAUNCHER = """Traceback (most recent call last):
  File "launch.py", line 1, in simple_launcher
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)
subprocess.CalledProcessError: Command '['python', '-m', 'posttrain']' returned non-zero exit status 2.
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (f"50%|##\rposttrain: data.train has no rows.\n{LAUNCHER}", "posttrain: data.train has no rows."),
        (
            f"  File x\ntorch.OutOfMemoryError: CUDA out of memory.\n{LAUNCHER}",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("loading\n 10%|#\r 20%|##\n", "it ended without an error message, after ' 20%|##'"),
        ("", "its log is empty"),
    ],
)
def test_the_error_is_found_in_the_log(tmp_path: Path, log: str, error: str) -> None:
    (tmp_path / "log.txt").write_text(log, newline="")
    assert failure(tmp_path)[0] == error
