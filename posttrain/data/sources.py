"""Rows from local files, saved folders, the hub or a procedural task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from posttrain.config.inputs import DataSource
from posttrain.config.load import check_source
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preparation import column_names, number_rows
from posttrain.suggest import nearest, unknown

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Rows = Dataset | IterableDataset


def load(source: DataSource, *, key: str = "data") -> Rows:
    """Read a source's rows; its ``format`` and ``template`` are left to `posttrain.data.formats`.

    Each row carries its number (column ``ROW_NUMBER`` of `posttrain.data.collation`), which messages name.

    Args:
        source: what to read.
        key: where it stands in the configuration, for messages.

    Raises:
        ValueError: nothing is at ``path``, it cannot be read, or a split, a task or a column to rename does not exist.
    """
    check_source(source, key)
    rows = _from_task(source, key) if source.task is not None else _from_path(source, key)
    if source.limit is not None:
        rows = rows.take(source.limit) if isinstance(rows, IterableDataset) else rows.select(_first(rows, source.limit))
    if not _has_rows(rows):
        raise ValueError(f"{key} has no rows: {source.task or source.path!r} is empty; give another source.")
    rows = number_rows(rows)
    return rename(rows, source.columns, key)


def columns_of(rows: Rows) -> list[str]:
    """Names of the data's own columns, without the row number."""
    return [name for name in column_names(rows) if name != ROW_NUMBER]


def rename(rows: Rows, columns: Mapping[str, str], key: str) -> Rows:
    """Rename columns, existing name -> new name.

    Raises:
        ValueError: a column does not exist (those that do are listed), or a new name is taken.
    """
    if not columns:
        return rows
    present = columns_of(rows)
    for old, new in columns.items():
        if old not in present:
            match = nearest(old, present)
            hint = f"; did you mean {match!r}?" if match else "."
            raise ValueError(f"{key}.columns renames {old!r}, which is no column{hint} The columns are {present}.")
        if new in present and new not in columns:
            raise ValueError(f"{key}.columns renames {old!r} to {new!r}, which is a column already; rename that too.")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"{key}.columns gives two columns the same name: {dict(columns)}; give each its own.")
    return rows.rename_columns(dict(columns))


def _has_rows(rows: Rows) -> bool:
    return bool(rows.num_rows) if isinstance(rows, Dataset) else next(iter(rows), None) is not None


def _first(rows: Dataset, limit: int) -> range:
    return range(min(limit, len(rows)))


def _from_task(source: DataSource, key: str) -> Dataset:
    from posttrain.data import procedural, procedural_preferences

    assert source.task is not None and source.size is not None
    seed = 0 if source.seed is None else source.seed
    make = procedural_preferences.make if source.task in procedural_preferences.TASKS else procedural.make
    try:
        return make(source.task, size=source.size, seed=seed, split=source.split, **source.task_options)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _from_path(source: DataSource, key: str) -> Rows:
    assert source.path is not None
    path = Path(source.path).expanduser()
    suffix = next((end for end in path.suffixes[-2:] if end in LOADERS), None)
    if path.is_file():
        return _from_file(path, suffix, source, key)
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        return _from_saved(path, source, key)
    if not path.exists() and (suffix or source.path.startswith((".", "/", "~"))):
        raise ValueError(f"{key}.path is {source.path!r}, and there is no such file or folder; check the path.")
    return _read(
        f"{key}.path {source.path!r}", source.path, source.name, split=source.split, streaming=source.streaming
    )


def _from_file(path: Path, suffix: str | None, source: DataSource, key: str) -> Rows:
    if suffix is None:
        raise ValueError(
            f"{key}.path is {source.path!r}; expected a file that ends in {', '.join(LOADERS)} (or with .gz)."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{key}.path is {source.path!r}, and that file is empty; give one with rows.")
    if source.name is not None:
        raise ValueError(f"{key}.name is {source.name!r}, which only a hub set has; set it to null for a file.")
    # a file's rows all belong to the loader's split "train"; what remains of `split` is its slice
    split = "train" + source.split[source.split.find("[") :] if "[" in source.split else "train"
    what = f"{key}.path {source.path!r}"
    return _read(what, LOADERS[suffix], data_files=str(path), split=split, streaming=source.streaming)


def _from_saved(path: Path, source: DataSource, key: str) -> Rows:
    saved = load_from_disk(path)
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            raise ValueError(unknown(f"{key}.split of {source.path!r}", source.split, [str(name) for name in saved]))
        saved = saved[source.split]
    return saved.to_iterable_dataset() if source.streaming else saved


def _read(what: str, *args: Any, **options: Any) -> Rows:
    try:
        return load_dataset(*args, **options)
    except Exception as error:
        # The library raises many types here, several without a word on what was wrong but in their cause.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{what} cannot be read: {reason}") from error
