"""The guard of the output folder and what is written into it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import run_record
from posttrain.config import RunConfig
from posttrain.run_record import guard_output_dir


def checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_a_folder_without_a_run_is_free(tmp_path: Path) -> None:
    assert guard_output_dir(tmp_path / "new") is None
    (tmp_path / "slurm.log").write_text("queued")
    assert guard_output_dir(tmp_path) is None
    assert guard_output_dir(tmp_path, overwrite=True) is None
    assert (tmp_path / "slurm.log").exists()


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "config.json", "model-00001.safetensors", "checkpoint-3"]
)
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, 3) if name.startswith("checkpoint") else (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"already holds a run \({name}\).*resume=true .* overwrite=true"):
        guard_output_dir(tmp_path)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-best").mkdir()
    for name in ("run.json", "model.safetensors", "evaluation.json", "notes.md"):
        (tmp_path / name).write_text("{}")
    assert guard_output_dir(tmp_path, overwrite=True) is None
    assert (tmp_path / "model.safetensors").exists()
    run_record.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "notes.md"]


def test_resuming_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 200, complete=False)
    assert guard_output_dir(tmp_path, resume=True) == str(tmp_path / "checkpoint-100")
    assert guard_output_dir(tmp_path, resume=str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="which is no checkpoint"):
        guard_output_dir(tmp_path, resume=str(tmp_path / "checkpoint-200"))


def test_resuming_without_a_checkpoint_and_a_file_as_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        guard_output_dir(tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        guard_output_dir(tmp_path / "file")


def test_the_record_names_versions_hardware_and_the_command_without_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["some/where/__main__.py", "train", "a.yaml", "trainer.hub_token=hidden", "objective=dft"]
    )
    config = RunConfig(trainer={"output_dir": str(tmp_path / "run"), "hub_token": "hidden"})
    path = run_record.write(config, processes=2, distributed_type="MULTI_GPU", seed=7)
    text = path.read_text() + (tmp_path / "run/config.yaml").read_text()
    assert "hidden" not in text
    record = json.loads(path.read_text())
    assert record["command"] == ["posttrain", "train", "a.yaml", "trainer.hub_token=...", "objective=dft"]
    assert (record["processes"], record["distributed_type"], record["seed"]) == (2, "MULTI_GPU", 7)
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(record["versions"]) >= {"torch", "transformers", "trl", "peft", "accelerate", "deepspeed"}
    assert record["hardware"]["memory_bytes"] > 2**20

    run_record.write(config, seed=8)
    record = json.loads(run_record.write(config, seed=9).read_text())
    assert [earlier["seed"] for earlier in record["earlier"]] == [7, 8]
    assert all("earlier" not in earlier for earlier in record["earlier"])


def test_git_state_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    assert run_record.git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert run_record.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "modified": False}
    (tmp_path / "file").write_text("2")
    state = run_record.git_state(tmp_path)
    assert state is not None and state["modified"] is True
