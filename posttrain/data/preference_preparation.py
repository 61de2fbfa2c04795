"""Tokenised prompts and completions to trainable rows: truncation and counted skips, with every side column kept."""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preparation import AnyDataset, column_names
from posttrain.data.skipping import skip

logger = logging.getLogger(__name__)

PROMPT = "prompt_ids"
# of columns whose numbers mean nothing elsewhere
RANGES = {
    "preference_probability": (0.0, 1.0),
    "chosen_win_probability": (0.0, 1.0),
    "rejected_win_probability": (0.0, 1.0),
    "desirable": (0.0, 1.0),
    "density_weight": (0.0, math.inf),
}


def finish_completions(
    dataset: AnyDataset,
    *,
    name: str,
    completions: Sequence[str],
    columns: Collection[str],
    watched: Collection[str] = (),
    max_length: int | None,
    truncation_mode: str,
) -> AnyDataset:
    """Truncate, skip rows that can teach nothing, and check the columns that objectives bind.

    Left out, and counted, are rows in which a completion has no trained token, and pairs of equal completions.

    The completions of a row keep one common prompt, so that they answer the same context: ``keep_start`` cuts their
    ends, ``keep_end`` cuts the start of the prompt by what the longest completion needs (TRL cuts each sequence of a
    pair by itself).

    Args:
        dataset: rows with ``prompt_ids`` and ``<completion>_ids``.
        name: for messages, such as ``train``.
        completions: such as ``chosen`` and ``rejected``.
        columns: side columns that objectives bind.
        watched: side columns to keep where they are, whatever they hold.
        max_length: tokens of prompt and completion; None for no truncation.
        truncation_mode: ``keep_start`` or ``keep_end``.

    Raises:
        ValueError: no row is left, a column is missing, or it holds something other than finite numbers in its range;
            the rows are named.
    """
    missing = [column for column in columns if column not in column_names(dataset)]
    if missing:
        raise ValueError(
            f"the {name} data lacks the column {missing[0]!r} that the objective needs; it has "
            f"{sorted(column_names(dataset))}."
        )
    ids = [f"{completion}_ids" for completion in completions]
    keep = dict.fromkeys((PROMPT, *ids, ROW_NUMBER, *columns, *watched))
    dataset = dataset.select_columns([column for column in keep if column in column_names(dataset)])
    if max_length is not None:
        options = {"ids": ids, "max_length": max_length, "keep_end": truncation_mode == "keep_end"}
        dataset = dataset.map(_truncate, fn_kwargs=options)
    cause = f"a completion is empty or was truncated to nothing (max_length is {max_length})"
    dataset = skip(dataset, _Trained(ids), name=f"the {name} data", cause=cause)
    if len(ids) > 1:
        cause = f"its completions are equal (max_length is {max_length})"
        dataset = skip(dataset, _Differing(ids), name=f"the {name} data", cause=cause)
    if isinstance(dataset, Dataset):
        for column in columns:
            _check_numbers(dataset, column, name)
    return dataset


def _truncate(row: dict[str, Any], ids: Sequence[str], max_length: int, keep_end: bool) -> dict[str, Any]:
    prompt = row[PROMPT]
    if not keep_end:
        prompt = prompt[:max_length]
        return {PROMPT: prompt, **{name: row[name][: max_length - len(prompt)] for name in ids}}
    cut = {name: row[name][-max_length:] for name in ids}
    room = max_length - max(len(completion) for completion in cut.values())
    return {PROMPT: prompt[-room:] if room else [], **cut}


class _Trained:
    """Whether every completion of a row has a trained token: the first of a sequence has no state that predicts it."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids

    def __call__(self, row: dict[str, Any]) -> bool:
        first = 0 if row[PROMPT] else 1
        return all(len(row[name]) > first for name in self.ids)


class _Differing:
    """Whether the completions of a row are not all the same."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids

    def __call__(self, row: dict[str, Any]) -> bool:
        first, *others = (row[name] for name in self.ids)
        return any(other != first for other in others)


def expected(column: str) -> str:
    """What the numbers of a column must be, in words."""
    low, high = RANGES.get(column, (-math.inf, math.inf))
    if math.isfinite(high):
        return f"a number from {low:g} to {high:g}"
    return f"a finite number of at least {low:g}" if math.isfinite(low) else "a finite number"


def is_valid(column: str, value: Any) -> bool:
    """Whether a value is a finite number within its column's range."""
    low, high = RANGES.get(column, (-math.inf, math.inf))
    return isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


def _check_numbers(dataset: Dataset, column: str, name: str) -> None:
    values = dataset[column]
    wrong = [position for position, value in enumerate(values) if not is_valid(column, value)]
    if not wrong:
        return
    numbers = dataset[ROW_NUMBER] if ROW_NUMBER in dataset.column_names else range(len(dataset))
    rows = ", ".join(str(numbers[position]) for position in wrong[:10]) + (", ..." if len(wrong) > 10 else "")
    raise ValueError(
        f"column {column!r} of the {name} data holds {values[wrong[0]]!r} where the objective needs "
        f"{expected(column)}, in {len(wrong)} of {len(dataset)} rows: rows {rows}; fill them or leave those rows out."
    )
