"""What every kind of annotation begins with: its rows, and a device for the models that read them."""

from collections.abc import Collection
from typing import Any

import torch
from datasets import Dataset

from posttrain.annotation.writing import check_output
from posttrain.config import DataSource, RunConfig
from posttrain.config.resolve import on_cpu
from posttrain.loading import load_rows, load_tokenizer
from posttrain.prepared import refuse_processes


def rows_to_annotate(
    config: RunConfig, kind: str, *, method: str, needed: Collection[str], written: Collection[str]
) -> tuple[Dataset, Any]:
    """The training data in the form that a method's trainer reads, and the tokenizer.

    Args:
        kind: of annotation, for messages.
        needed: columns the rows must have once they are prepared.
        written: columns that will be added.

    Raises:
        ValueError: no training data or no output, several processes, a streamed set, a needed column that is not there,
            or one to be written that is.
        FileExistsError: the output is there already.
    """
    source, output = config.data.train, config.annotation.output
    if source is None or output is None:
        missing = "data.train" if source is None else "annotation.output"
        raise ValueError(f"{missing} is missing; `annotate {kind}` needs rows and a .jsonl or .parquet file to write.")
    check_output(output)
    refuse_processes("annotate")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    rows = whole_rows(source, tokenizer, key="data.train", method=method, needed=needed)
    taken = [name for name in written if name in rows.column_names]
    if taken:
        raise ValueError(f"data.train has the column {taken[0]!r} already; rename it with data.train.columns.")
    return rows, tokenizer


def whole_rows(source: DataSource, tokenizer: Any, *, key: str, method: str, needed: Collection[str]) -> Dataset:
    """A source's rows for a method's trainer, which must not be streamed and must have the columns ``needed``."""
    rows = load_rows(source, tokenizer, key=key, method=method)
    if not isinstance(rows, Dataset):
        raise ValueError(f"{key}.streaming is true; annotation reads every row, so set it to false.")
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{key} has no column {missing[0]!r}, which this annotation needs; it has {sorted(rows.column_names)}, and "
            f"{key}.columns renames them."
        )
    return rows


def with_columns(rows: Dataset, columns: dict[str, list[Any]]) -> Dataset:
    """The rows with columns added behind their own."""
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def device(config: RunConfig) -> torch.device:
    """Where training would run in one process."""
    accelerator = torch.accelerator.current_accelerator()
    cpu = config.trainer.get("use_cpu") or on_cpu() or accelerator is None
    return torch.device("cpu") if cpu else accelerator  # type: ignore[return-value]
