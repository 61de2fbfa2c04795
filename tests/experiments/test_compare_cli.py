"""One comparison as a user runs it: real launches of a model that trains in a moment."""

import json
from pathlib import Path

import pytest
import yaml

from posttrain.cli import main
from tests import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    rows = str(tmp_path / "rows.jsonl")
    settings = {
        "question": "Which one learns eight rows?",
        "run": {
            "model": {"name_or_path": str(tmp_path / "base")},
            "data": {"train": {"path": rows}},
            "trainer": {"logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "report_to": "none"},
            "evaluation": {
                "data": [{"path": rows, "verifier": "exact", "label": "held-out"}],
                "samples": 2,
                "k": [1, 2],
                "max_new_tokens": 4,
                "resamples": 20,
                "every": 1,
            },
        },
        "budget": {"steps": 2},
        "objectives": {"nll": "nll", "power": {"name": "probability_power", "grid": {"alpha": [2]}}},
        "output_dir": str(tmp_path / "out"),
        "devices": ["cpu"],
        "keep_models": False,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_comparison_from_one_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(file), "--dry-run", "seeds=[0]"]) == 0
    listed = capsys.readouterr().out
    assert "power-alpha-2-base-rows-seed0" in listed and "3 jobs, 1 at a time." in listed
    assert not (file.parent / "out").exists()

    assert main(["compare", str(file)]) == 0, capsys.readouterr().err
    folder = file.parent / "out"
    report = (folder / "report.md").read_text()
    assert "Which one learns eight rows?" in report and "power(alpha=2)" in report
    assert (folder / "report.html").stat().st_size > 0
    for name in ("nll", "power-alpha-2"):
        run = folder / "runs" / f"{name}-base-rows-seed0"
        after = json.loads((run / "evaluation_after.json").read_text())["sources"]["held-out"]
        during = json.loads((run / "evaluation_step_1.json").read_text())["sources"]["held-out"]
        before = json.loads((folder / "before/base-rows/evaluation.json").read_text())["sources"]["held-out"]
        nll = [one["metrics"]["nll"]["value"] for one in (before, during, after)]
        assert nll[0] != nll[1] != nll[2]
        assert sum(after["probability_histogram"]) == sum(int(row["count"]) for row in after["reliability"]) > 0
        resources = json.loads((run / "resources.json").read_text())
        assert resources["train_seconds"] > 0 and resources["peak_memory_bytes"] > 2**20
        assert not (run / "evaluation_before.json").exists(), "the base is evaluated once"
        assert not (run / "model.safetensors").exists()
    capsys.readouterr()

    assert main(["compare", str(file), "budget.steps=3"]) == 2
    assert "trainer.max_steps: 2 -> 3" in capsys.readouterr().err
    (folder / "report.md").unlink()
    assert main(["compare", str(file), "--report-only"]) == 0
    assert (folder / "report.md").exists()
