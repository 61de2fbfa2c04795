"""From a comparison's YAML to the runs it names."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.experiments.grid import expand
from posttrain.experiments.schema import load
from tests.experiments import fake


def test_a_grid_is_every_objective_on_every_base_data_set_and_seed(tmp_path: Path) -> None:
    config = fake.config(
        tmp_path,
        objectives={"nll": "nll", "power": {"name": "probability_power", "grid": {"alpha": [2, 0.5]}}},
        bases={"tiny": "tiny-base", "half": {"name_or_path": "tiny-base", "dtype": "bfloat16"}},
        data={"easy": {}, "hard": {"train": {"size": 7}, "evaluation": [{"path": "hard.jsonl"}]}},
        seeds=[0, 3],
    )
    runs = expand(config)
    assert len(runs) == 3 * 2 * 2 * 2
    assert list(dict.fromkeys(run.objective for run in runs)) == ["nll", "power(alpha=2)", "power(alpha=0.5)"]
    assert len({run.name for run in runs}) == len(runs)

    by_name = {run.name: run for run in runs}
    run = by_name["power-alpha-2-half-hard-seed3"]
    assert run.tree["objective"] == {"name": "probability_power", "alpha": 2} and run.hyperparameters == {"alpha": 2}
    assert run.tree["model"] == {"name_or_path": "tiny-base", "dtype": "bfloat16"}
    assert run.tree["trainer"] == {"learning_rate": 1e-3, "seed": 3, "max_steps": 3}
    # the seed of a task's rows moves along; evaluation stays the same
    assert run.tree["data"]["train"] == {"task": "addition", "size": 7, "seed": 13}
    assert run.tree["evaluation"]["data"] == [{"path": "hard.jsonl"}]
    assert by_name["nll-tiny-easy-seed0"].tree["evaluation"] == fake.SETTINGS["run"]["evaluation"]
    assert by_name["nll-tiny-easy-seed0"].tree["data"]["train"]["seed"] == 10


def test_a_source_with_other_rows_replaces_the_one_of_run(tmp_path: Path) -> None:
    (run, *_) = expand(fake.config(tmp_path, data={"file": {"train": {"path": "rows.jsonl"}}}))
    assert run.tree["data"]["train"] == {"path": "rows.jsonl"}, "a file has no task, size or seed"


def test_each_seed_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    config = fake.config(tmp_path, data={"file": {"train": {"path": "rows-{seed}.jsonl"}}}, seeds=[0, 7])
    assert [run.tree["data"]["train"]["path"] for run in expand(config)][:2] == ["rows-0.jsonl", "rows-7.jsonl"]


def test_vary_and_overrides_are_in_the_label_and_the_hyperparameters(tmp_path: Path) -> None:
    config = fake.config(
        tmp_path,
        objectives={"nll": "nll", "mix": [{"name": "nll"}, {"name": "entropy", "weight": 0.1}]},
        vary={"trainer.learning_rate": [1e-3, 1e-4]},
        overrides_for={"mix": {"objective.1.weight": 0.2}, "nll(learning_rate=0.0001)": {"trainer.warmup_steps": 5}},
    )
    runs = {run.objective: run for run in expand(config)}
    labels = [f"{name}(learning_rate={rate})" for name in ("nll", "mix") for rate in ("0.001", "0.0001")]
    assert list(runs) == labels
    mixed = runs["mix(learning_rate=0.0001)"]
    assert mixed.tree["objective"][1] == {"name": "entropy", "weight": 0.2}
    assert mixed.tree["trainer"]["learning_rate"] == 1e-4
    assert mixed.hyperparameters == {"trainer.learning_rate": 1e-4, "objective.1.weight": 0.2}
    assert runs["nll(learning_rate=0.0001)"].tree["trainer"]["warmup_steps"] == 5
    assert "warmup_steps" not in runs["nll(learning_rate=0.001)"].tree["trainer"]


def test_include_lies_under_run_and_overrides_over_it(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(fake.SETTINGS["run"]))
    (tmp_path / "configs" / "mine.yaml").write_text(
        yaml.safe_dump({"run": {"include": "../base.yaml", "trainer": {"warmup_steps": 2}}, "objectives": {"a": "nll"}})
    )
    config = load(tmp_path / "configs" / "mine.yaml", ["run.trainer.logging_steps=5", "seeds=[4]"])
    assert config.run["trainer"] == {"learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 5}
    assert config.run["data"] == fake.SETTINGS["run"]["data"] and "include" not in config.run
    assert config.seeds == [4] and config.output_dir == "runs/compare/mine"

    (tmp_path / "base.yaml").write_text("include: base.yaml")
    with pytest.raises(ValueError, match="includes itself"):
        load(tmp_path / "configs" / "mine.yaml")


def test_variables_stay_for_the_runs_to_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "there"))
    changes = {"run": {**fake.SETTINGS["run"], "data": {"train": {"path": "${PLACE}/a.jsonl"}}}}
    config = fake.config(tmp_path, output_dir="${PLACE}/out", **changes)
    assert config.output_dir == str(tmp_path / "there/out")
    assert expand(config)[0].tree["data"]["train"]["path"] == "${PLACE}/a.jsonl"


RUN = fake.SETTINGS["run"]
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"objectives": {}}, "objectives is empty, so that the comparison has no run"),
    ({"seeds": []}, "seeds is empty"),
    ({"bases": {}}, "bases is empty"),
    ({"objectives": {"p": {"name": "probability_power", "grid": {"alpha": []}}}}, "grid.alpha is empty"),
    ({"objectives": {"p": {"name": "probability_power", "grid": {"alpha": 2}}}}, "list of its values"),
    ({"objectives": {"p": {"alpha": 2}}}, "objectives.p has no name"),
    ({"vary": {"trainer.learning_rate": []}}, "vary.trainer.learning_rate is empty"),
    ({"seeds": [1, 1]}, "two runs have the name 'nll-tiny-base-addition-seed1'"),
    ({"objectives": {"a b": "nll", "a-b": "nll"}}, "two runs have the name"),
    ({"objectives": {"p": {"name": "probability_power", "grid": {"alpha": [2, 2.0]}}}}, "two runs have the name"),
    ({"overrides_for": {"nl": {"trainer.seed": 1}}}, "did you mean 'nll'"),
    ({"overrides_for": {"nll": {"trainer.max_steps": 9}}}, "budget is equal for all"),
    ({"vary": {"trainer.per_device_train_batch_size": [1, 2]}}, "budget is equal for all"),
    ({"tune": {"trainer.gradient_accumulation_steps": [1, 2]}}, "budget is equal for all"),
    ({"overrides_for": {"nll": {"evaluation.temperature": 0.5}}}, "all runs are evaluated alike"),
    ({"data": {"a": {"trian": {}}}}, "did you mean 'train'"),
    ({"run": {**RUN, "data": {}}}, "run.data.train is missing"),
    ({"run": {**RUN, "evaluation": {}}}, "run.evaluation.data is missing"),
    ({"run": {**RUN, "model": {"name_or_path": "x", "token": "hf_abc"}}}, "model.token is written out"),
    ({"budget": {}}, "neither of steps and tokens"),
    ({"budget": {"steps": 1, "tokens": 1}}, "both of steps and tokens"),
    ({"budget": {"steps": 0}}, "budget.steps is 0"),
    ({"parallel": 0}, "parallel is 0"),
    ({"devices": []}, "devices is empty"),
    ({"tune": {"metric": "nll"}}, "tune names nothing to try"),
    ({"tune": {"trainer.learning_rate": 1e-3}}, "list of values to try"),
    ({"tune": {"trainer.learning_rate": [1], "trials": 0}}, "tune.trials is 0"),
    ({"tune": {"trainer.learning_rate": [1], "on": "test"}}, "tune.on is 'test'"),
    ({"tune": {"trainer.learning_rate": [1]}, "vary": {"trainer.learning_rate": [1]}}, "both tune and vary"),
    ({"objektives": {}}, "did you mean 'objectives'"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        expand(fake.config(tmp_path, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs/compare").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_examples_are_comparisons(path: Path) -> None:
    runs = expand(load(path))
    assert len({run.objective for run in runs}) >= 3 and len({run.seed for run in runs}) >= 3
