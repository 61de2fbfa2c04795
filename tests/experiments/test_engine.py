"""What is run, what is not run again, and what a failure stops: with children that train nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.experiments import engine
from posttrain.experiments.plan import Plan, validate
from posttrain.experiments.results import Comparison
from posttrain.experiments.runner import Runner, Slot
from tests.experiments import fake

RATES = {"trainer.learning_rate": [1e-2, 1e-3, 1e-4]}


def compare(folder: Path, **changes: Any) -> Comparison:
    made = fake.plan(folder, **changes)
    made.refuse_changes()
    engine.execute(made, fake.runner)
    return engine.read(made, "posttrain compare x.yaml")


def test_bases_then_trials_then_runs_with_the_chosen_values(tmp_path: Path) -> None:
    found = compare(tmp_path, tune={**RATES, "metric": "nll"}, seeds=[0, 1], keep_models=False)
    assert [run.status for run in found.runs] == ["done"] * 4
    rates = {(run.objective, run.seed): run.hyperparameters["trainer.learning_rate"] for run in found.runs}
    assert rates == {("nll", 0): 1e-3, ("nll", 1): 1e-3, ("probability", 0): 1e-4, ("probability", 1): 1e-4}
    assert [run.metrics for run in found.runs] == [{"addition/nll": 1.0}] * 4
    assert found.before["tiny-base", "addition"].metrics == {"addition/nll": 3.0}

    assert [row["value"] for row in found.trials if row["objective"] == "nll"] == [2.0, 1.0, 2.0]
    assert [row["hyperparameters"] for row in found.trials if row["chosen"]] == [
        {"trainer.learning_rate": 1e-3},
        {"trainer.learning_rate": 1e-4},
    ]
    splits = {
        (path.parent.parent.name, json.loads(path.read_text())["sources"]["addition"]["split"])
        for path in tmp_path.glob("out/*/*/evaluation_after.json")
    }
    assert splits == {("trials", "validation"), ("runs", "test")}
    assert list(tmp_path.glob("out/*/*/model.safetensors")) == []
    assert found.settings["steps"] == {"tiny-base/addition": 3} and found.settings["budget"] == {"steps": 3}
    assert "output_dir" not in found.settings and str(tmp_path) not in str(found.settings)


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(tmp_path: Path) -> None:
    compare(tmp_path, seeds=[0])
    marker = tmp_path / "out/runs/nll-tiny-base-addition-seed0/done.json"
    marker.unlink()
    display = fake.Silent()
    again = fake.plan(tmp_path, seeds=[0, 1])
    engine.execute(again, lambda keep: fake.runner(keep, display))
    names = [f"{name}-tiny-base-addition-seed{seed}" for name in ("nll", "probability") for seed in (0, 1)]
    assert fake.started(tmp_path, "before") == ["tiny-base-addition"]
    assert sorted(fake.started(tmp_path, "runs")) == sorted([*names, "nll-tiny-base-addition-seed0"])
    assert set(display.seen[-1].values()) == {"done"}
    assert again.jobs["probability-tiny-base-addition-seed0"].earlier


def test_a_failure_is_reported_stops_nothing_and_is_tried_again(tmp_path: Path) -> None:
    changes = {"objectives": {"bad": {"name": "broken"}, "nll": "nll"}}
    found = compare(tmp_path, **changes)
    bad, good = found.runs
    assert (bad.status, good.status) == ("failed", "done")
    assert bad.error == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert bad.metrics == {} and bad.seconds is None, "a gap, not zero"
    compare(tmp_path, **changes)
    assert fake.started(tmp_path, "runs").count("bad-tiny-base-addition-seed0") == 2
    # a report that is written later knows too
    assert engine.read(fake.plan(tmp_path, **changes), "").runs[0].error == bad.error


def test_a_child_that_ends_well_without_an_evaluation_has_failed(tmp_path: Path) -> None:
    made = fake.plan(tmp_path, objectives={"nll": "nll"})
    engine.execute(made, lambda keep: Runner([Slot(None)], fake.Silent(), command=lambda job, slot: ["true"]))
    assert made.before["tiny-base", "addition"].error == "it ended well and left no evaluation"


def test_runs_whose_trials_all_failed_are_not_started(tmp_path: Path) -> None:
    found = compare(tmp_path, objectives={"bad": {"name": "broken"}, "nll": "nll"}, tune=RATES)
    assert [run.status for run in found.runs] == ["failed", "done"]
    assert "every trial failed: RuntimeError" in str(found.runs[0].error)
    assert fake.started(tmp_path, "runs") == ["nll-tiny-base-addition-seed0"]
    assert [(row["status"], row["value"]) for row in found.trials[:3]] == [("failed", None)] * 3


def test_a_trial_without_the_metric_is_a_gap(tmp_path: Path) -> None:
    found = compare(tmp_path, tune={**RATES, "metric": "pass@1"})
    assert {row["value"] for row in found.trials} == {None}
    assert "has no pass@1" in str(found.runs[0].error)


def test_what_a_base_cannot_do_is_found_before_training(tmp_path: Path) -> None:
    found = compare(tmp_path, bases={"tiny": "tiny-base", "unfit": "unfit"})
    status = {(run.objective, run.base): run.status for run in found.runs}
    assert {status[name, "tiny"] for name in ("nll", "probability")} == {"done"}
    assert {status[name, "unfit"] for name in ("nll", "probability")} == {"failed"}
    (error,) = {run.error for run in found.runs if run.base == "unfit"}
    assert error is not None and "the base cannot be evaluated: posttrain: max_new_tokens=128 leaves no room" in error
    assert [name for name in fake.started(tmp_path, "runs") if "unfit" in name] == []


def test_changed_settings_under_old_results_are_refused_with_the_difference(tmp_path: Path) -> None:
    tune = {**RATES, "metric": "nll"}
    compare(tmp_path, tune=tune)
    files = sorted(tmp_path.glob("out/**/*"))
    run = {**fake.SETTINGS["run"], "trainer": {"learning_rate": 1e-3, "warmup_steps": 4}}
    for changes, words in (
        ({"run": run, "tune": tune}, "trainer.warmup_steps: not set -> 4"),
        ({"budget": {"steps": 4}, "tune": tune}, "trainer.max_steps: 3 -> 4"),
        ({"tune": {**tune, "trials": 2}}, "tune.trials: None -> 2"),
        ({"tune": {**tune, "trainer.learning_rate": [1e-2, 1e-3, 1e-5]}}, "trainer.learning_rate: 0.0001 -> 1e-05"),
        ({"objectives": {"nll": "probability"}, "tune": tune}, "objective: nll -> probability"),
    ):
        with pytest.raises(ValueError) as error:
            compare(tmp_path, **changes)
        assert words in str(error.value) and "name another folder" in str(error.value)
    assert sorted(tmp_path.glob("out/**/*")) == files, "refused before anything is written"
    # what does not change a finished run may change
    compare(tmp_path, tune=tune, question="Another one?", seeds=[0, 1], parallel=3)


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path) -> None:
    first = fake.plan(tmp_path)
    with engine._locked(first), pytest.raises(ValueError, match="in use by another comparison"):
        compare(tmp_path)


def test_an_interrupt_stops_the_children_and_the_next_call_goes_on(tmp_path: Path) -> None:
    """From outside, as Ctrl-C comes: one run is finished, another would sleep for a minute."""
    code = """
import signal
import sys
from pathlib import Path
from posttrain.experiments import engine
from tests.experiments import fake
# a suite that runs in the background of a shell has it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
plan = fake.plan(Path(sys.argv[1]), objectives={"nll": "nll"}, seeds=[0, 9])
try:
    engine.execute(plan, fake.runner)
except KeyboardInterrupt:
    sys.exit(130)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = tmp_path / "out/runs/nll-tiny-base-addition-seed0/done.json"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) as parent:
        # generous: a busy machine takes long to import torch three times
        until = time.monotonic() + 120
        while not (done.exists() and len(fake.started(tmp_path, "runs")) == 2) and time.monotonic() < until:
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(90) == 130
    # the child held the folder's lock: were it alive, this would be refused
    found = compare(tmp_path, objectives={"nll": "nll"}, seeds=[0])
    assert [run.status for run in found.runs] == ["done"]
    assert fake.started(tmp_path, "runs").count("nll-tiny-base-addition-seed0") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": {"a": "nll", "b": "probabilty"}}, "b: Unknown objective: 'probabilty'; did you mean"),
        ({"objectives": {"p": {"name": "probability_power", "alfa": 2}}}, "did you mean 'alpha'"),
        ({"overrides_for": {"nll": {"trainer.learning_rat": 1}}}, "did you mean 'trainer.learning_rate'"),
        ({"objectives": {"f": {"name": "focal", "gamma": -1}}}, "f: "),
    ],
)
def test_a_mistake_in_a_run_is_found_before_anything_runs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    made: Plan = fake.plan(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        validate(made)
    assert words in str(error.value)


def test_an_objective_that_takes_one_of_two_columns_is_no_mistake(tmp_path: Path) -> None:
    validate(fake.plan(tmp_path, objectives={"mmpo": "mmpo", "kto": "kto", "madpo": {"name": "madpo", "tau": 6.9}}))
    with pytest.raises(ValueError, match="mmpo: gamma"):
        validate(fake.plan(tmp_path, objectives={"mmpo": {"name": "mmpo", "gamma": -1.0}}))
