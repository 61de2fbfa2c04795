"""PreferenceTrainer in two processes under real engines against one process."""

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.trainers.preference_step import logged, rows, step
from tests.trainers.test_distributed import launch
from tests.trainers.test_gradients import TOLERANCE, relative_difference
from tests.trainers.test_preference import OBJECTIVES

DDP = [("sorted", 1, 4, "cached"), ("quantile_and_state", 2, 2, "model")]


@pytest.mark.parametrize(("kind", "batch", "accumulation", "reference"), DDP)
def test_two_ddp_processes_give_the_gradient_of_one(tmp_path, kind, batch, accumulation, reference):
    options = {"reference": reference, "evaluated": True, "ref_seed": 1}
    found = launch(
        tmp_path, "ddp2_cpu.yaml", OBJECTIVES[kind], "float64", batch, accumulation, "preference_step.py", **options
    )
    assert found["num_processes"] == 2 and "MULTI" in found["distributed_type"]
    trainer, expected, _ = step(
        OBJECTIVES[kind], torch.float64, 8, 1, reference=reference, ref_model=tiny.model(torch.float64, seed=1),
        eval_dataset=Dataset.from_list(rows(7, shift=3)),
    )  # fmt: skip
    assert relative_difference(found["gradients"], expected) < TOLERANCE[torch.float64]
    assert found["loss"] == pytest.approx(logged(trainer)[0], rel=1e-6)
    assert found["metrics"]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    for name, values in found["columns"].items():
        assert values == pytest.approx(trainer.train_dataset[name][:], rel=1e-12)


@pytest.mark.parametrize(
    ("stage", "options"), [(2, {"reference": "model", "ref_seed": 1}), (3, {"reference": "cached"})], ids=str
)
def test_two_zero_processes_take_the_step_of_one(tmp_path, stage, options):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    found = launch(tmp_path, f"zero{stage}_cpu.yaml", "dpo", "float32", 2, 2, "preference_step.py", **options)
    assert found["num_processes"] == 2 and "DEEPSPEED" in found["distributed_type"]
    reference = tiny.model(seed=1) if "ref_seed" in options else None
    _, expected, _ = step("dpo", torch.float32, 8, 1, reference=options["reference"], ref_model=reference)
    tied = {name: gradient for name, gradient in found["moved"].items() if name in expected}
    assert relative_difference(tied, expected) < TOLERANCE[torch.float32]
    if reference is None:
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)
