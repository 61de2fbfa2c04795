"""Annotated rows to a file, never over another one."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def check_output(path: str | Path, *, key: str = "annotation.output") -> Path:
    """The path, if columns may be written there; ``key`` is where it stands in the configuration.

    Raises:
        ValueError: another suffix than .jsonl or .parquet.
        FileExistsError: the file is there already; annotations are not overwritten.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{key} is {str(path)!r}; give a file that ends in .jsonl or .parquet.")
    if path.exists():
        raise FileExistsError(f"{key} {str(path)!r} exists already; remove it or name another file.")
    return path


def write(dataset: Dataset, path: str | Path, about: dict[str, Any], *, key: str = "annotation.output") -> Path:
    """Write the annotated rows and, beside them, an ``.about.json`` on where they come from; see `check_output`."""
    path = check_output(path, key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        dataset.to_parquet(partial)
    else:
        dataset.to_json(partial, force_ascii=False)
    partial.rename(path)
    path.with_name(path.name + ".about.json").write_text(json.dumps(about, indent=2) + "\n")
    return path
