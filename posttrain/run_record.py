"""What is written beside a run's results, and the guard of its output folder."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.config.schema import SECRET_KEYS, RunConfig

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
BEFORE_FILE, AFTER_FILE = "evaluation_before.json", "evaluation_after.json"
ITEMS_BEFORE_FILE, ITEMS_AFTER_FILE = "evaluation_before_items.jsonl", "evaluation_after_items.jsonl"
EVALUATION_FILE, EVALUATION_ITEMS_FILE = "evaluation.json", "evaluation_items.jsonl"
# One for each evaluation on the way, named by its optimizer step.
DURING_FILE, DURING_PATTERN = "evaluation_step_{step}.json", "evaluation_step_*.json"
RESOURCES_FILE = "resources.json"
CURVES_FILE, PASS_AT_K_FILE = "training_curves.png", "pass_at_k.png"

RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "flash-attn")

_RUN_FILES = (CONFIG_FILE, RECORD_FILE, METRICS_FILE, BEFORE_FILE, AFTER_FILE, ITEMS_BEFORE_FILE, ITEMS_AFTER_FILE,
              CURVES_FILE, DURING_PATTERN, RESOURCES_FILE)  # fmt: skip
# Left by `evaluate` too, which may come before training and makes no run.
_EVALUATION_FILES = (EVALUATION_FILE, EVALUATION_ITEMS_FILE, PASS_AT_K_FILE)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*")
_MODEL_FILES = ("config.json", "adapter_config.json", *_WEIGHTS)


def versions() -> dict[str, str | None]:
    """Python and the packages that decide a run's numbers; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "posttrain": __version__}
    return found | {name: version_of(name) for name in RECORDED_PACKAGES}


def version_of(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: str | Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, or None outside a checkout or without git."""
    try:
        commit, status = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "modified": bool(status)}


def hardware() -> dict[str, Any]:
    """Processor cores, memory (bytes) and accelerators of this machine."""
    import psutil
    import torch

    devices: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append({"name": found.name, "memory_bytes": found.total_memory})
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices = [{"name": str(kind)} for _ in range(torch.accelerator.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "devices": devices,
    }


def command(without: Sequence[str] = ()) -> list[str]:
    """This process's command, without the place it was started from, with no secret in it.

    Args:
        without: arguments to leave out.
    """
    return ["posttrain", *(_without_secret(argument) for argument in sys.argv[1:] if argument not in without)]


def write(config: RunConfig, *, processes: int = 1, distributed_type: str = "NO", seed: int | None = None) -> Path:
    """Write the resolved configuration and a record of where it ran into the output folder.

    The record of a run that this one resumes stays in it, under ``earlier``.

    Args:
        config: resolved, with ``trainer.output_dir``.
        processes, distributed_type: of the launch.
        seed: of the training; evaluation's stands in the configuration.
    Returns:
        the record's path.
    """
    folder = Path(config.trainer["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    record = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "seed": seed,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "processes": processes,
        "distributed_type": distributed_type,
        "hardware": hardware(),
    }
    path = folder / RECORD_FILE
    if path.exists():
        resumed = json.loads(path.read_text(encoding="utf-8"))
        record["earlier"] = [*resumed.pop("earlier", ()), resumed]
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def guard_output_dir(path: str | Path, *, resume: bool | str = False, overwrite: bool = False) -> str | None:
    """Make sure that a run does not mix with another in its folder; nothing is changed there.

    Args:
        path: the output folder; it need not exist.
        resume: true for the folder's last checkpoint, or a checkpoint's path.
        overwrite: an earlier run may be replaced, which `clear` does.
    Returns:
        the checkpoint to resume from, or None.
    Raises:
        ValueError: the folder holds a run and neither is set, or there is no checkpoint to resume from.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"trainer.output_dir is {str(path)!r}, which is a file; name a folder.")
    if resume:
        return _checkpoint(folder, resume)
    held = _files_of_a_run(folder)
    if held and not overwrite:
        raise ValueError(
            f"trainer.output_dir {str(path)!r} already holds a run ({held[0].name}); name another folder, or set "
            "resume=true to continue that run or overwrite=true to replace it."
        )
    return None


def clear(path: str | Path) -> None:
    """Remove a run's results, checkpoints and model files from its folder; other files stay."""
    folder = Path(path)
    held = _files_of_a_run(folder)
    for file in held:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    if held:
        for name in _EVALUATION_FILES:
            (folder / name).unlink(missing_ok=True)


def remove_model(path: str | Path) -> None:
    """Remove the weights and checkpoints from a run's folder; its results and the tokenizer stay."""
    folder = Path(path)
    for entry in (*_checkpoints(folder), *(entry for pattern in _WEIGHTS for entry in folder.glob(pattern))):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _checkpoint(folder: Path, resume: bool | str) -> str:
    if isinstance(resume, str):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(f"resume is {resume!r}, which is no checkpoint; name a checkpoint folder, or true.")
        return resume
    found = sorted(_checkpoints(folder), key=lambda entry: int(entry.name.rpartition("-")[2]))
    complete = [entry for entry in found if (entry / "trainer_state.json").is_file()]
    if not complete:
        raise ValueError(f"resume is true, and trainer.output_dir {str(folder)!r} holds no checkpoint; start anew.")
    return str(complete[-1])


def _checkpoints(folder: Path) -> list[Path]:
    return [entry for entry in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", entry.name)]


def _files_of_a_run(folder: Path) -> list[Path]:
    patterns = (*_RUN_FILES, *_MODEL_FILES)
    return sorted({entry for pattern in patterns for entry in folder.glob(pattern)}) + _checkpoints(folder)


def _without_secret(argument: str) -> str:
    key, separator, _ = argument.partition("=")
    return f"{key}=..." if separator and key.rpartition(".")[2] in SECRET_KEYS else argument
