"""The script behind the table of shared prompts, at tiny sizes."""

import pytest
import torch

from launch import benchmark_shared_prefix as benchmark


def test_every_trainer_takes_the_same_step_and_stands_in_the_table():
    rows = benchmark.measure(benchmark.SMOKE, "cpu", 1, lambda line: None)
    assert [row["trainer"] for row in rows] == 3 * [benchmark.TRL, benchmark.SEPARATE, benchmark.SHARED]
    assert {row["prompt_to_completion"] for row in rows} == {"4:1", "1:1", "1:4"}
    assert all(0 <= row["gradient_difference"] < 1e-4 and set(row) == set(benchmark.COLUMNS) for row in rows)
    for _, separate, shared in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert shared["positions"] < separate["positions"] and shared["pairs"] == separate["pairs"] == 2
    table = benchmark.report(rows, benchmark.SMOKE, "cpu", 1, 1_000_000)
    assert table.count("\n| ") == 10 and "commit" in table


def test_a_wrong_gradient_is_not_timed():
    class Trainer:
        def __init__(self, factor):
            self.model = torch.nn.Linear(2, 1, bias=False)
            torch.nn.init.constant_(self.model.weight, 1.0)
            self.factor = factor

        def compute_loss(self, model, batch):
            return self.factor * model(batch["input_ids"]).sum()

    batch = {"input_ids": torch.ones(2, 2)}
    contenders = {
        name: benchmark.Contender(Trainer(factor), batch) for name, factor in ((benchmark.TRL, 1.0), ("x", 1.1))
    }
    with pytest.raises(RuntimeError, match=r"gradients differ from TRL's.*'x'"):
        benchmark._compare(contenders)
