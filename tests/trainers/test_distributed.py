"""Two processes under real engines against one process; every run proves which engine it ran under."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.trainers.step import step
from tests.trainers.test_gradients import OBJECTIVES, TOLERANCE, relative_difference

ROOT = Path(__file__).parents[2]


def launch(tmp_path, accelerate_config, objective, dtype, batch, accumulation, script="step.py", **options):
    """Run step.py (or another script beside it) under a committed accelerate configuration and read what it wrote."""
    out = tmp_path / "result.pt"
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "launch/accelerate" / accelerate_config),
        str(ROOT / "tests/trainers" / script), str(out), json.dumps(objective), dtype, str(batch), str(accumulation),
        json.dumps(options),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    # an engine may die at exit after its work is done (seen about once in 130 launches): the result file decides
    assert out.exists(), result.stderr[-4000:]
    return torch.load(out, weights_only=False)


def one_pass(kind, setting):
    """The engine forms gradients in the forward, the one process in the backward, where an objective allows both."""
    return {"kernel": {"one_pass": setting}} if kind == "token" else {}


@pytest.mark.parametrize("kind", ["token", "sequence", "quantile"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_two_ddp_processes_give_the_gradient_of_one(tmp_path, kind, batch, accumulation):
    found = launch(tmp_path, "ddp2_cpu.yaml", OBJECTIVES[kind], "float64", batch, accumulation, **one_pass(kind, True))
    assert found["num_processes"] == 2 and "MULTI" in found["distributed_type"]
    trainer, expected, _ = step(OBJECTIVES[kind], torch.float64, batch=8, accumulation=1, **one_pass(kind, False))
    assert relative_difference(found["gradients"], expected) < TOLERANCE[torch.float64]
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert found["loss"] == pytest.approx(logged, rel=1e-6)


def test_the_gradient_tolerance_is_reported_over_all_processes(tmp_path):
    options = {"kernel": {"gradient_tolerance": 0.9}, "train_sampling_strategy": "sequential"}
    logs = launch(tmp_path, "ddp2_cpu.yaml", "nll", "float64", 4, 1, **options)["logs"]
    halves = [step("nll", torch.float64, 4, 1, rows=part, **options)[0] for part in (tiny.rows()[:4], tiny.rows()[4:])]
    alone = [half.state.log_history[0] for half in halves]
    for key in ("gradient_tolerance/head_bound", "gradient_tolerance/hidden_bound"):
        assert logs[key] == pytest.approx(max(entry[key] for entry in alone), rel=1e-9)
    assert len({entry["gradient_tolerance/head_bound"] for entry in alone}) == 2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["token", "quantile"])
def test_two_zero_processes_take_the_step_of_one(tmp_path, stage, kind):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    found = launch(tmp_path, f"zero{stage}_cpu.yaml", OBJECTIVES[kind], "float32", 2, 2, **one_pass(kind, True))
    assert found["num_processes"] == 2 and "DEEPSPEED" in found["distributed_type"]
    _, expected, _ = step(OBJECTIVES[kind], torch.float32, batch=8, accumulation=1, **one_pass(kind, False))
    tied = {name: gradient for name, gradient in found["moved"].items() if name in expected}
    assert relative_difference(tied, expected) < TOLERANCE[torch.float32]
