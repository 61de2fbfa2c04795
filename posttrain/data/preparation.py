"""Tokenised rows to trainable rows: truncation, counted skips and packing, with every side column kept."""

import copy
import logging
from collections.abc import Collection
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import pack_dataset

from posttrain.data.collation import ROW_NUMBER

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset


def column_names(dataset: AnyDataset) -> list[str]:
    """Column names, read off the first row where a streaming data set does not know them."""
    return list(dataset.column_names or next(iter(dataset)))


def number_rows(dataset: AnyDataset) -> AnyDataset:
    """Add the row's number in the data set as given, which messages name later."""
    if ROW_NUMBER in column_names(dataset):
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.add_column(ROW_NUMBER, list(range(len(dataset))))
    return dataset.map(lambda row, index: {ROW_NUMBER: index}, with_indices=True)


def finish(
    dataset: AnyDataset,
    *,
    name: str,
    columns: Collection[str],
    max_length: int | None,
    truncation_mode: str,
    packing: str | None,
    shuffle_seed: int | None,
) -> AnyDataset:
    """Truncate, skip rows without a trained token, shuffle and pack.

    Args:
        dataset: rows with ``input_ids`` and ``labels``.
        name: for messages, such as ``train``.
        columns: side columns to keep; a list is cut with the tokens it runs beside.
        max_length: tokens; None for no truncation.
        truncation_mode: ``keep_start`` or ``keep_end``.
        packing: TRL's packing strategy, or None.
        shuffle_seed: shuffle (before packing) with this seed, or not at all.

    Raises:
        ValueError: no row has a trained token left, or a streaming set is to be packed with side columns.
    """
    keep = ["input_ids", "labels", ROW_NUMBER, *columns]
    dataset = dataset.select_columns([column for column in keep if column in column_names(dataset)])
    if max_length is not None:
        # rows to be packed are cut from the end, like TRL's: a pack is filled from the sequences' starts
        end = truncation_mode == "keep_end" and not packing
        dataset = dataset.map(_truncate, fn_kwargs={"max_length": max_length, "keep_end": end})
    dataset = _skip_untrained(dataset, name, max_length)
    if shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    return _pack(dataset, name, columns, max_length, packing) if packing else dataset


def _truncate(row: dict[str, Any], max_length: int, keep_end: bool) -> dict[str, Any]:
    length = len(row["input_ids"])
    cut = slice(-max_length, None) if keep_end else slice(None, max_length)
    return {
        column: value[cut] if isinstance(value, list) and len(value) == length else value
        for column, value in row.items()
    }


def _is_trained(labels: list[int]) -> bool:
    return any(label != -100 for label in labels[1:])


def _skip_untrained(dataset: AnyDataset, name: str, max_length: int | None) -> AnyDataset:
    """Drop rows in which no token is trained, and say how many and which."""
    cause = f"its completion is empty or was truncated to nothing (max_length is {max_length})"
    if not isinstance(dataset, Dataset):
        return dataset.filter(_CountedFilter(name, cause))
    kept = [position for position, labels in enumerate(dataset["labels"]) if _is_trained(labels)]
    skipped = len(dataset) - len(kept)
    if not kept:
        raise ValueError(
            f"no row of the {name} data has a trained token, each because {cause}; raise trainer.max_length or check "
            "the completions."
        )
    if skipped:
        remaining = set(kept)
        rows = [row for position, row in enumerate(dataset[ROW_NUMBER]) if position not in remaining]
        logger.warning(
            "Skipped %d of %d rows of the %s data, each because %s: rows %s%s.",
            skipped, len(dataset), name, cause, ", ".join(map(str, rows[:10])), ", ..." if skipped > 10 else "",
        )  # fmt: skip
        dataset = dataset.select(kept)
    return dataset


class _CountedFilter:
    """For a stream, whose end is unknown: says the first skip and every tenfold more."""

    def __init__(self, name: str, cause: str) -> None:
        self.name, self.cause, self.skipped = name, cause, 0

    def __call__(self, row: dict[str, Any]) -> bool:
        if _is_trained(row["labels"]):
            return True
        self.skipped += 1
        if str(self.skipped).strip("0") == "1":
            logger.warning(
                "Skipped %d rows of the streamed %s data so far, each because %s; the last is row %s.",
                self.skipped, self.name, self.cause, row.get(ROW_NUMBER),
            )  # fmt: skip
        return False


def _pack(
    dataset: AnyDataset, name: str, columns: Collection[str], max_length: int | None, strategy: str
) -> AnyDataset:
    if max_length is None:
        raise ValueError("trainer.packing is on and trainer.max_length is null; give the length of a pack in tokens.")
    if strategy != "bfd" or not isinstance(dataset, Dataset):
        if columns:
            raise ValueError(
                f"packing a {'streamed set' if strategy == 'bfd' else repr(strategy)} cannot carry the columns "
                f"{sorted(columns)}; use trainer.packing_strategy: bfd on a data set that is not streamed."
            )
        bare: Any = dataset.select_columns(["input_ids", "labels"])
        return pack_dataset(bare, max_length, strategy)
    # TRL packs columns that all run beside input_ids; packing row positions instead lets any column come along
    positions = Dataset.from_dict({"position": [[i] * len(ids) for i, ids in enumerate(dataset["input_ids"])]})
    packed = pack_dataset(positions, max_length, "bfd")
    return packed.map(_Gather(dataset), remove_columns=["position"], desc=f"Packing {name} dataset")


class _Gather:
    """Builds a packed row from the rows its positions name."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __call__(self, packed: dict[str, Any]) -> dict[str, Any]:
        starts = [sum(packed["seq_lengths"][:i]) for i in range(len(packed["seq_lengths"]))]
        rows = [self.rows[packed["position"][start]] for start in starts]
        merged: dict[str, Any] = {"seq_lengths": packed["seq_lengths"]}
        for column in self.rows.column_names:
            values = [row[column] for row in rows]
            runs_beside_tokens = isinstance(values[0], list)
            merged[column] = [entry for value in values for entry in value] if runs_beside_tokens else values
        return merged


def without_truncation(args: Any) -> Any:
    """A copy of TRL's arguments that leaves truncating, shuffling and dropping rows to `finish`."""
    plain = copy.copy(args)
    plain.max_length = None
    plain.shuffle_dataset = False
    return plain
