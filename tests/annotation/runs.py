"""What the tests of several annotations build: a saved model, a file of rows, a configuration."""

import json
from pathlib import Path
from typing import Any

from posttrain.config import RunConfig, from_tree, resolve
from tests import tiny


def save_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A tiny model with its tokenizer in a folder."""
    tiny.model(seed=seed, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of an annotated file, and what is written beside it."""
    about = path.with_name(path.name + ".about.json")
    return [json.loads(line) for line in path.read_text().splitlines()], json.loads(about.read_text())


def configuration(folder: Path, method: str, model: str, rows: list[dict[str, Any]], **annotation: Any) -> RunConfig:
    """A resolved configuration on the CPU whose annotation goes to ``annotated.jsonl`` in the folder."""
    tree = {
        "method": method,
        "model": {"name_or_path": model},
        "data": {"train": {"path": write_rows(folder / "rows.jsonl", rows)}},
        "annotation": {"output": str(folder / "annotated.jsonl"), **annotation},
        "trainer": {"output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": "none"},
    }
    return resolve(from_tree(tree))
