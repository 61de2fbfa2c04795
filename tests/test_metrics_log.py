"""metrics.jsonl and the curves drawn from it."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttrain.metrics_log import MetricsLog, plot_curves, read


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True)


def log(path: Path, args: TrainingArguments, start: int, steps: range, *, main: bool = True) -> None:
    callback, control = MetricsLog(path), TrainerControl()
    state = TrainerState(global_step=start, is_world_process_zero=main)
    callback.on_train_begin(args, state, control)
    for step in steps:
        state.global_step, state.epoch = step, step / 4
        callback.on_log(args, state, control, logs={"loss": 1.0 / step})
        callback.on_log(args, state, control, logs={})


def test_each_log_is_one_line_and_a_new_run_starts_anew(tmp_path: Path, args: TrainingArguments) -> None:
    path = tmp_path / "folder" / "metrics.jsonl"
    assert read(path) == []
    log(path, args, 0, range(1, 5))
    assert read(path)[1] == {"step": 2, "epoch": 0.5, "loss": 0.5} and len(read(path)) == 4
    log(path, args, 2, range(3, 6))
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5]
    log(path, args, 0, range(1, 2))
    assert [line["step"] for line in read(path)] == [1]


def test_other_processes_write_nothing(tmp_path: Path, args: TrainingArguments) -> None:
    log(tmp_path / "metrics.jsonl", args, 0, range(1, 3), main=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_was_logged_is_drawn(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0 / step, "eval_loss": 2.0 / step, "entropy": 0.5} for step in (1, 2, 3)]
    assert plot_curves([*lines, {"step": 3, "train_runtime": 1.0}], tmp_path / "a.png") == tmp_path / "a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot_curves([{"step": 3, "train_runtime": 1.0}], tmp_path / "b.png") is None
    assert not (tmp_path / "b.png").exists()


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read(path) == [{"step": 1, "loss": 2.0}]
