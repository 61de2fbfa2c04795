"""``posttrain annotate``: from a kind's name to its function."""

import pytest

from posttrain import annotation
from posttrain.cli.annotate import KINDS, annotate
from tests.annotation.runs import configuration, read_rows, save_model


def test_every_kind_has_a_public_function():
    assert set(KINDS.values()) == {name for name in annotation.__all__ if name.startswith("annotate_")}
    assert all(callable(getattr(annotation, name)) for name in KINDS.values())


def test_a_kind_runs_from_a_file(tmp_path, capsys):
    rows = [{"prompt": "a=", "completion": "1.2", "label": True}]
    base, policy = save_model(tmp_path / "base"), save_model(tmp_path / "policy", seed=1)
    config = configuration(tmp_path, "binary_feedback", base, rows, steps={"policy": {"name_or_path": policy}})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    annotate("step-rewards", str(tmp_path / "run.yaml"), ["annotation.steps.separator=."])
    assert str(tmp_path / "annotated.jsonl") in capsys.readouterr().out
    assert read_rows(tmp_path / "annotated.jsonl")[0][0]["step_ends"] == [2, 3]


def test_an_unknown_kind_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="reward-margins"):
        annotate("reward-margin", "none.yaml", [])
