"""A child process of a comparison, and the files by which a finished one is known again."""

import datetime
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from posttrain import run_record
from posttrain.config.values import join, read_yaml

RESOLVED_FILE, LOG_FILE = "resolved.yaml", "log.txt"
# Written last, so that it stands for everything before it.
DONE_FILE, FAILED_FILE = "done.json", "failed.json"

Kind = Literal["base", "trial", "run"]
State = Literal["waiting", "running", "done", "failed", "not started"]

_ERROR_LINE = re.compile(
    r"^(posttrain( \(rank \d+\))?: .+|([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception|Interrupt|Exit)\b.*)"
)
# How accelerate and torchrun report that a child of theirs ended badly.
_LAUNCHER_ERRORS = ("CalledProcessError", "ChildFailedError")
_SHOWN_LINES = 12


@dataclass
class Job:
    """One evaluation of a base, one trial or one run.

    Args:
        name: for the table.
        kind: a ``base`` is evaluated; a ``trial`` and a ``run`` are trained and evaluated.
        folder: for everything it writes.
        tree: its configuration without the output folder; None until tuning has chosen it.
        labels: what the table shows: objective, base, data, seed.
        earlier: whether it was finished by an earlier call.
    """

    name: str
    kind: Kind
    folder: Path
    tree: dict[str, Any] | None
    labels: Mapping[str, str] = field(default_factory=dict)
    state: State = "waiting"
    error: str | None = None
    started: float | None = None
    seconds: float | None = None
    earlier: bool = False

    @property
    def command(self) -> str:
        """Of posttrain."""
        return "evaluate" if self.kind == "base" else "train"

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps, where the configuration says how many."""
        steps = ((self.tree or {}).get("trainer") or {}).get("max_steps")
        return int(steps) if steps is not None and int(steps) > 0 else None

    def is_done(self) -> bool:
        """Whether the folder holds its finished results."""
        return (self.folder / DONE_FILE).exists()

    def has_results(self) -> bool:
        """Whether the child has written what it was run for."""
        name = run_record.EVALUATION_FILE if self.kind == "base" else run_record.AFTER_FILE
        return (self.folder / name).exists()

    def write_resolved(self) -> Path:
        """Write the configuration that the child reads, and take away the marks of an earlier attempt.

        Checkpoints of an attempt with another configuration go as well: to resume them would mix the two.
        """
        assert self.tree is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (DONE_FILE, FAILED_FILE):
            (self.folder / name).unlink(missing_ok=True)
        trainer = {**(self.tree.get("trainer") or {}), "output_dir": str(self.folder)}
        path = self.folder / RESOLVED_FILE
        text = yaml.safe_dump({**self.tree, "trainer": trainer}, sort_keys=False, allow_unicode=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            run_record.remove_model(self.folder)
        path.write_text(text, encoding="utf-8")
        return path

    def mark_done(self, seconds: float) -> None:
        """The last thing written into the folder."""
        assert self.tree is not None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = {"fingerprint": fingerprint(self.tree), "finished": now, "wall_seconds": seconds}
        (self.folder / DONE_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def mark_failed(self, error: str) -> None:
        """Leave the reason, for a report that is written later."""
        (self.folder / FAILED_FILE).write_text(json.dumps({"error": error}, indent=2) + "\n", encoding="utf-8")

    def options(self) -> list[str]:
        """What to do with the remains of an earlier attempt: go on from its last checkpoint, or replace them."""
        complete = [entry for entry in self.folder.glob("checkpoint-*") if (entry / "trainer_state.json").is_file()]
        return ["resume=true"] if complete and self.command == "train" else ["overwrite=true"]


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Of a run's configuration."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(job: Job, ignored: Sequence[str] = ()) -> list[str]:
    """``key: old -> new`` for what a finished job's folder was made with and what it would be made with now.

    Args:
        ignored: dotted keys that may differ.
    """
    if job.tree is None or not job.is_done():
        return []
    if json.loads((job.folder / DONE_FILE).read_text(encoding="utf-8"))["fingerprint"] == fingerprint(job.tree):
        return []
    stored = read_yaml((job.folder / RESOLVED_FILE).read_text(encoding="utf-8"), str(job.folder / RESOLVED_FILE))
    # by way of YAML, which reads the text 1e-4 as a number
    new_tree = read_yaml(yaml.safe_dump(job.tree, allow_unicode=True), "the configuration")
    old, new = dict(_flat(stored)), dict(_flat(new_tree))
    skipped = {"trainer.output_dir", *ignored}
    keys = [key for key in {**old, **new} if key not in skipped and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in keys]


def failure(folder: Path) -> tuple[str, list[str]]:
    """Why a job failed, out of its log: the error in one line, and the last lines up to it."""
    log = folder / LOG_FILE
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    # a progress bar writes its states over each other
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if _ERROR_LINE.match(lines[index]) and not any(name in lines[index] for name in _LAUNCHER_ERRORS):
            return lines[index], lines[max(0, index + 1 - _SHOWN_LINES) : index + 1]
    return f"it ended without an error message, after {lines[-1]!r}" if lines else "its log is empty", lines[
        -_SHOWN_LINES:
    ]


def child_command(job: Job, options: Sequence[str]) -> list[str]:
    """``accelerate launch`` of posttrain on the job's configuration.

    Args:
        options: of accelerate.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    return [*launcher, "-m", "posttrain", job.command, str(job.folder / RESOLVED_FILE), *job.options()]


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _flat(value, join(key, name))
    elif isinstance(tree, list) and any(isinstance(entry, Mapping | list) for entry in tree):
        for index, value in enumerate(tree):
            yield from _flat(value, join(key, index))
    else:
        yield key, tree
