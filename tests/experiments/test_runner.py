"""Where runs are placed, and with what they are launched."""

from pathlib import Path

import pytest

from posttrain.experiments.jobs import Job, child_command
from posttrain.experiments.runner import Slot, slots
from tests.experiments import fake


def test_cores_are_shared_out_among_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    places = slots(fake.config(tmp_path, devices=["cpu"], parallel=3))
    assert places == [Slot("cpu", 2)] * 3
    assert places[0].environment() == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    assert {"--cpu", "2"} <= set(places[0].options())


def test_one_run_at_a_time_on_each_device(tmp_path: Path) -> None:
    (one,), (two,) = slots(fake.config(tmp_path, devices=[1])), slots(fake.config(tmp_path, devices=["2,3"]))
    assert one.environment() == {"CUDA_VISIBLE_DEVICES": "1"} and one.processes == 1
    assert two.environment() == {"CUDA_VISIBLE_DEVICES": "2,3"} and two.processes == 2
    assert "--multi_gpu" in two.options() and "--multi_gpu" not in one.options()
    (free,) = slots(fake.config(tmp_path))
    assert "CUDA_VISIBLE_DEVICES" not in free.environment() and "--cpu" not in free.options()


def test_accelerates_own_file_decides_where_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "ddp.yaml"
    file.write_text("num_processes: 4")
    (place,) = slots(fake.config(tmp_path, devices=[0], launch=str(file)))
    assert place.processes == 4 and place.options() == ["--config_file", str(file)]
    with pytest.raises(ValueError, match="there is no such file"):
        slots(fake.config(tmp_path, launch="nowhere.yaml"))


def test_every_run_has_as_many_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different numbers of processes, 1 and 2"):
        slots(fake.config(tmp_path, devices=[0, "1,2"]))


def test_the_remains_of_an_attempt_are_replaced_or_gone_on_from(tmp_path: Path) -> None:
    job = Job("a", "run", tmp_path / "a", {"trainer": {"max_steps": 4}})
    job.write_resolved()
    assert child_command(job, [])[-4:] == ["posttrain", "train", str(tmp_path / "a/resolved.yaml"), "overwrite=true"]
    (tmp_path / "a/checkpoint-2").mkdir()
    assert job.options() == ["overwrite=true"], "a checkpoint that was being written"
    (tmp_path / "a/checkpoint-2/trainer_state.json").write_text("{}")
    assert job.options() == ["resume=true"]
    job.write_resolved()
    assert job.options() == ["resume=true"], "the same configuration goes on"
    Job("a", "run", tmp_path / "a", {"trainer": {"max_steps": 5}}).write_resolved()
    assert job.options() == ["overwrite=true"], "another one does not take its checkpoints over"


def test_equal_tokens_are_counted_from_the_rows(tmp_path: Path) -> None:
    from posttrain.experiments.plan import Plan

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "abcde", "completion": "fg"}\n')
    from tests import tiny

    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tiny.config().save_pretrained(tmp_path / "base")
    run = {
        "model": {"name_or_path": str(tmp_path / "base")},
        "data": {"train": {"path": str(rows)}},
        "trainer": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        "evaluation": {"data": [{"path": str(rows)}]},
    }
    # rows of 4 and 8 tokens with their ends, 6 on average; a step reads 3 rows x 2 micro-batches x 2 processes
    config = fake.config(tmp_path, run=run, budget={"tokens": 720}, objectives={"nll": "nll"})
    made = Plan(config, processes=2)
    assert made.runs[0].tree["trainer"]["max_steps"] == 10 and made.steps == {("base", "rows"): 10}
    run["trainer"]["packing"] = True  # type: ignore[index]
    with pytest.raises(ValueError, match="cannot be counted with trainer"):
        Plan(fake.config(tmp_path, run=run, budget={"tokens": 720}))
