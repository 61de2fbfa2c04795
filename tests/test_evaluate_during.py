"""Evaluations between optimizer steps look, and change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import from_tree, resolve
from posttrain.pipeline import train
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with dropout, so that a disturbed random state would show, and rows."""
    path = tmp_path_factory.mktemp("during")
    tiny.model(attention_dropout=0.3).save_pretrained(path / "base")
    tiny.tokenizer().save_pretrained(path / "base")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    return path


def run(folder: Path, name: str, *, every: int | None, bf16: bool) -> dict[str, Any]:
    """The final evaluation of four steps."""
    tree = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": {"path": str(folder / "rows.jsonl")}},
        "trainer": {"output_dir": str(folder / name), "max_steps": 4, "logging_steps": 1, "save_strategy": "no",
                    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": bf16, "disable_tqdm": True,
                    "activation_checkpointing": False, "report_to": "none"},
        "evaluation": {"data": [{"path": str(folder / "rows.jsonl"), "verifier": "exact", "label": "s"}],
                       "samples": 2, "k": [1], "max_new_tokens": 4, "resamples": 20, "before": False, "every": every},
    }  # fmt: skip
    train(resolve(from_tree(tree)))
    found: dict[str, Any] = json.loads((folder / name / "evaluation_after.json").read_text())
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_training_goes_on_as_if_it_had_not_been_looked_at(folder: Path, bf16: bool) -> None:
    plain = run(folder, f"plain-{bf16}", every=None, bf16=bf16)
    looked = run(folder, f"looked-{bf16}", every=2, bf16=bf16)
    assert looked == plain
    steps = sorted(path.name for path in (folder / f"looked-{bf16}").glob("evaluation_step_*.json"))
    assert steps == ["evaluation_step_2.json"], "the last step has evaluation_after.json"
    during = json.loads((folder / f"looked-{bf16}" / steps[0]).read_text())
    assert during["sources"]["s"]["metrics"]["nll"] != plain["sources"]["s"]["metrics"]["nll"]
    assert json.loads((folder / f"looked-{bf16}" / "resources.json").read_text())["train_seconds"] > 0


def test_a_number_of_steps_below_one_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.every is 0"):
        run(folder, "zero", every=0, bf16=False)
