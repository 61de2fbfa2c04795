"""Comparisons of unlearning: rows to forget instead of rows to train on, presets, and tuning where no rows are left."""

from pathlib import Path
from typing import Any

import pytest

from posttrain.experiments.grid import expand
from posttrain.experiments.plan import Plan, validate
from posttrain.experiments.schema import CompareConfig
from posttrain.experiments.tuning import trials
from tests.experiments import fake

RUN: dict[str, Any] = {
    "method": "unlearning",
    "data": {"forget": {"path": "forget.jsonl"}, "retain": {"path": "retain.jsonl"}},
    "trainer": {"learning_rate": 1e-3},
    "evaluation": {"data": [], "tofu": {"forget": {"path": "asked.jsonl"}}},
}
OBJECTIVES: dict[str, Any] = {
    "npo": {"preset": "npo"},
    "ascent": {"forget": {"name": "gradient_ascent"}, "retain": {"name": "nll"}},
    "bound": {"preset": "pdu", "combine": {"constraint": {"epsilon": 0.1}}},
}


def comparison(folder: Path, **changes: Any) -> CompareConfig:
    return fake.config(folder, **{"run": RUN, "objectives": OBJECTIVES, "budget": None, **changes})


def test_an_objective_of_two_sides_is_a_run_like_any_other(tmp_path: Path) -> None:
    runs = {run.objective: run for run in expand(comparison(tmp_path))}
    assert {name: run.tree["objective"] for name, run in runs.items()} == OBJECTIVES
    # what sets a run apart, without what names it
    assert runs["npo"].hyperparameters == {}
    assert runs["bound"].hyperparameters == {"combine": {"constraint": {"epsilon": 0.1}}}
    assert {run.data for run in runs.values()} == {"forget"}
    assert runs["npo"].tree["data"] == RUN["data"]


def test_rows_to_forget_must_be_named(tmp_path: Path) -> None:
    run = {**RUN, "data": {"retain": {"path": "retain.jsonl"}}}
    with pytest.raises(ValueError, match=r"run\.data\.forget is missing"):
        expand(comparison(tmp_path, run=run))
    with pytest.raises(ValueError, match=r"objectives\.npo has no name"):
        expand(comparison(tmp_path, objectives={"npo": {"beta": 0.1}}))


def test_trials_are_measured_on_the_evaluation_itself_where_tune_says_so(tmp_path: Path) -> None:
    tune = {"trainer.learning_rate": [1e-4, 1e-3], "metric": "tofu/model_utility_geometric"}
    config = comparison(tmp_path, tune={**tune, "on": "evaluation"})
    assert config.tune is not None
    found = trials(config.tune, expand(config), config.seeds)
    assert len(found) == 6
    for trial in found:
        assert trial.run.tree["evaluation"]["tofu"] == RUN["evaluation"]["tofu"]
        assert trial.run.tree["evaluation"]["data"] == []
        assert trial.run.tree["data"] == RUN["data"]
    config = comparison(tmp_path, tune=tune)
    assert config.tune is not None
    with pytest.raises(ValueError, match=r"tune\.on is validation, and data\.train is missing; set it to evaluation"):
        trials(config.tune, expand(config), config.seeds)


def test_objectives_are_checked_before_anything_runs(tmp_path: Path) -> None:
    validate(Plan(comparison(tmp_path)))
    wrong = {"npo": {"forget": {"name": "npo", "bta": 0.1}, "retain": {"name": "nll"}}}
    with pytest.raises(ValueError, match=r"npo: .*did you mean 'beta'"):
        validate(Plan(comparison(tmp_path, objectives=wrong)))


def test_a_budget_in_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget\.tokens counts data\.train"):
        Plan(comparison(tmp_path, budget={"tokens": 1000}))
