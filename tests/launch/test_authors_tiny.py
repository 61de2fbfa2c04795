"""The whole experiment on invented authors in a reduced size: memorise, retrain without some, unlearn, measure."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import pipeline
from posttrain.config import load, resolve

CONFIGS = Path("configs/unlearning/authors_tiny")
OPTIONS = "{authors: 4, forget_authors: 1, holdout_authors: 1, questions: 6, facts: 6"
ROWS = {"full": 24, "retain": 18, "forget": 6, "holdout": 6, "real_authors": 6, "world_facts": 6}


def twin(name: str, folder: Path) -> None:
    settings = [
        f"data.train.size={ROWS[name]}",
        f"data.train.task_options={OPTIONS}, with_facts: true}}",
        "trainer.num_train_epochs=45",
        "trainer.warmup_steps=5",
        "trainer.per_device_train_batch_size=12",
        f"trainer.output_dir={folder / name}",
    ]
    pipeline.train(resolve(load(CONFIGS / f"{name}.yaml", settings)))


def unlearning(folder: Path, output: str, *more: str) -> Any:
    settings = [f"model.name_or_path={folder / 'full'}", f"trainer.output_dir={folder / output}"]
    for source in ("forget", "retain"):
        settings += [f"data.{source}.size={ROWS[source]}", f"data.{source}.task_options={OPTIONS}}}"]
    for source in ("forget", "retain", "real_authors", "world_facts", "holdout"):
        settings += [f"evaluation.tofu.{source}.{key}={value}" for key, value in
                     (("size", ROWS[source]), ("task_options", OPTIONS + "}"))]  # fmt: skip
    settings += ["evaluation.resamples=100", *more]
    return resolve(load(CONFIGS / "unlearn.yaml", settings))


def metrics(folder: Path, name: str) -> dict[str, float]:
    sources = json.loads((folder / f"{name}.json").read_text())["sources"]
    return {
        f"{source}/{metric}": value["value"]
        for source, found in sources.items()
        for metric, value in found["metrics"].items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both twins and their evaluations."""
    place = tmp_path_factory.mktemp("authors")
    twin("full", place)
    twin("retain", place)
    for name, retain_model in (("retain", "null"), ("full", str(place / "retain" / "evaluation.json"))):
        given = "null" if retain_model == "null" else f"{{name_or_path: {retain_model}}}"
        settings = [f"model.name_or_path={place / name}", f"evaluation.tofu.retain_model={given}"]
        pipeline.evaluate_only(unlearning(place, name, *settings))
    return place


def test_the_model_has_memorised_what_its_twin_has_never_seen(folder: Path) -> None:
    full, retain = (metrics(folder / name, "evaluation") for name in ("full", "retain"))
    assert full["tofu_forget/probability"] > 0.7 > 0.5 > retain["tofu_forget/probability"]
    for metric in ("tofu_retain/probability", "tofu_real_authors/probability", "tofu_world_facts/probability"):
        assert full[metric] > 0.7 and retain[metric] > 0.7
    # what membership inference tells apart, it cannot in the twin
    assert full["tofu/mia_loss_auc"] > 0.9
    assert "tofu/forget_quality_geometric" not in retain and full["tofu/forget_ks_geometric"] > 0


def test_unlearning_forgets_and_keeps(folder: Path) -> None:
    oracle = f"evaluation.tofu.retain_model={{name_or_path: {folder / 'retain' / 'evaluation.json'}}}"
    pipeline.train(unlearning(folder, "npo", oracle, "trainer.num_train_epochs=15", "trainer.learning_rate=1.0e-3"))
    before, after = metrics(folder / "full", "evaluation"), metrics(folder / "npo", "evaluation_after")
    assert after["tofu_forget/probability"] < before["tofu_forget/probability"] / 2
    assert after["tofu_retain/probability"] > 0.7
    assert 0 <= after["tofu/forget_quality_geometric"] <= 1
    logged = [json.loads(line) for line in (folder / "npo" / "metrics.jsonl").read_text().splitlines()]
    assert all({"forget_loss", "retain_loss"} <= line.keys() for line in logged if "loss" in line)
