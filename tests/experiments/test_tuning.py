"""The same search for everyone, on rows that are not reported."""

import math
from pathlib import Path

import pytest

from posttrain.experiments.grid import expand
from posttrain.experiments.tuning import best, measure, trials, values_to_try
from tests.experiments import fake

RATES = {"trainer.learning_rate": [1e-4, 1e-3, 1e-2], "trainer.warmup_steps": [0, 10]}


def test_every_objective_tries_the_same_values(tmp_path: Path) -> None:
    config = fake.config(tmp_path, tune={**RATES, "trials": 4, "metric": "nll"}, seeds=[5, 6])
    assert config.tune is not None
    found = trials(config.tune, expand(config), config.seeds)
    tried = {name: [trial.values for trial in found if trial.run.objective == name] for name in ("nll", "probability")}
    assert len(found) == 8 and tried["nll"] == tried["probability"]
    assert len({str(values) for values in tried["nll"]}) == 4
    assert {trial.run.seed for trial in found} == {5}, "one seed"

    first = found[0].run
    assert first.tree["trainer"] == {
        "seed": 5,
        "max_steps": 3,
        "learning_rate": tried["nll"][0]["trainer.learning_rate"],
        "warmup_steps": tried["nll"][0]["trainer.warmup_steps"],
    }
    assert first.tree["evaluation"]["data"] == [{"task": "addition", "split": "validation", "size": 20}]
    assert first.tree["data"]["train"]["seed"] == 15
    assert len({trial.run.name for trial in found}) == 8


def test_all_values_in_order_or_a_seeded_choice(tmp_path: Path) -> None:
    tune = fake.config(tmp_path, tune=RATES).tune
    assert tune is not None
    everything = values_to_try(tune, 0)
    assert everything == [
        {"trainer.learning_rate": rate, "trainer.warmup_steps": steps}
        for rate in (1e-4, 1e-3, 1e-2)
        for steps in (0, 10)
    ]
    tune.trials = 2
    chosen = [values_to_try(tune, seed) for seed in range(8)]
    assert all(len(one) == 2 and one[0] in everything for one in chosen)
    assert chosen[3] == values_to_try(tune, 3) and len({str(one) for one in chosen}) > 1
    tune.trials = 9
    assert values_to_try(tune, 0) == everything


def test_rows_of_a_file_are_held_out_of_training(tmp_path: Path) -> None:
    data = {
        "file": {
            "train": {"path": "train.jsonl", "columns": {"q": "prompt"}, "template": "Q: {prompt}"},
            "evaluation": [{"path": "test.jsonl", "verifier": "exact", "limit": 50, "label": "held-out"}],
        }
    }
    config = fake.config(tmp_path, data=data, tune=RATES)
    assert config.tune is not None
    runs = expand(config)
    tree = trials(config.tune, runs, [0])[0].run.tree
    assert tree["data"]["train"]["split"] == "train[:90%]"
    assert tree["evaluation"]["data"] == [
        {
            "path": "train.jsonl",
            "columns": {"q": "prompt"},
            "template": "Q: {prompt}",
            "verifier": "exact",
            "label": "held-out",
            "limit": 50,
            "split": "train[90%:]",
        }
    ]
    assert "split" not in runs[0].tree["data"]["train"], "the runs themselves train on all rows"

    config.tune.on = [{"path": "mine.jsonl"}]
    given = trials(config.tune, runs, [0])[0].run.tree
    assert given["evaluation"]["data"] == [{"path": "mine.jsonl"}] and "split" not in given["data"]["train"]

    config.tune.on = "validation"
    for change in ({"split": "train[:50]"}, {"streaming": True}):
        runs[0].tree["data"]["train"].update(change)
        with pytest.raises(ValueError, match="no rows can be held out"):
            trials(config.tune, runs, [0])
        del runs[0].tree["data"]["train"][next(iter(change))]


def test_the_best_value_by_the_metrics_own_direction() -> None:
    assert best([0.2, 0.5, 0.5], "pass@1") == 1
    assert best([2.0, math.nan, 1.0, None], "test/nll") == 2
    assert best([None, math.nan], "nll") is None


def test_a_metric_without_a_source_is_the_mean_over_sources() -> None:
    metrics = {"a/nll": 1.0, "b/nll": 2.0, "b/pass@1": 0.5}
    assert measure(metrics, "nll") == 1.5
    assert measure(metrics, "a/nll") == 1.0
    assert measure(metrics, "pass@1") == 0.5
    assert measure(metrics, "entropy") is None


def test_a_metric_without_a_better_side_is_refused(tmp_path: Path) -> None:
    config = fake.config(tmp_path, tune={**RATES, "metric": "entropy"})
    assert config.tune is not None
    with pytest.raises(ValueError, match="neither better nor worse"):
        trials(config.tune, expand(config), [0])


def test_benchmarks_that_have_test_rows_alone_are_not_tuned_on(tmp_path: Path) -> None:
    both = {**fake.SETTINGS["run"]["evaluation"], "harness": {"tasks": ["arc_easy"]}}
    for evaluation in (both, {"harness": {"tasks": ["arc_easy"]}}):
        config = fake.config(tmp_path, run={**fake.SETTINGS["run"], "evaluation": evaluation}, tune=RATES)
        assert config.tune is not None
        runs = expand(config)
        if "data" in evaluation:
            assert trials(config.tune, runs, [0])[0].run.tree["evaluation"]["harness"] is None
        else:
            with pytest.raises(ValueError, match="has no rows; give"):
                trials(config.tune, runs, [0])
