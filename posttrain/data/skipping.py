"""Leaving rows out, never silently, and reporting rows that stay in."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from posttrain.data.collation import ROW_NUMBER

logger = logging.getLogger(__name__)

SHOWN = 10


def skip(
    rows: Dataset | IterableDataset, keep: Callable[[dict[str, Any]], bool], *, name: str, cause: str
) -> Dataset | IterableDataset:
    """Keep the rows that ``keep`` accepts, and log how many others there were and which.

    Args:
        rows: with row numbers in column `ROW_NUMBER`.
        keep: picklable.
        name: of the data, such as ``data.train``.
        cause: why a row is left out, such as ``its completion is empty``.

    Raises:
        ValueError: no row is left.
    """
    if isinstance(rows, IterableDataset):
        return rows.filter(_CountedSkip(keep, name, cause))
    kept = rows.filter(keep)
    skipped = len(rows) - len(kept)
    if not len(kept):
        raise ValueError(f"{name} has no row left: all {len(rows)} were skipped, each because {cause}.")
    if skipped:
        # pairs made of one list of answers share its number
        numbers = list((Counter(rows[ROW_NUMBER]) - Counter(kept[ROW_NUMBER])).elements())
        logger.warning(
            "Skipped %d of %d rows of %s, each because %s: rows %s.", skipped, len(rows), name, cause, _shown(numbers)
        )
    return kept


def report(
    rows: Dataset | IterableDataset,
    unlike: Callable[[dict[str, Any]], bool],
    *,
    columns: Sequence[str],
    name: str,
    what: str,
    level: int = logging.WARNING,
) -> Dataset | IterableDataset:
    """Log how many rows fulfil ``unlike`` and which, and leave them in.

    Args:
        rows: with row numbers in column `ROW_NUMBER`.
        unlike: picklable; sees no more than ``columns``.
        name: of the data, such as ``data.train``.
        what: is said of these rows, such as ``have no score``.
        level: of the message.
    """
    if isinstance(rows, IterableDataset):
        return rows.filter(_CountedReport(unlike, name, what, level))
    numbers = [row[ROW_NUMBER] for row in rows.select_columns([*columns, ROW_NUMBER]) if unlike(row)]
    if numbers:
        logger.log(level, "%d of %d rows of %s %s: rows %s.", len(numbers), len(rows), name, what, _shown(numbers))
    return rows


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")


class _CountedSkip:
    """For a stream, whose end is unknown: logs the first skip and every tenfold more."""

    def __init__(self, keep: Callable[[dict[str, Any]], bool], name: str, cause: str) -> None:
        self.keep, self.name, self.cause, self.skipped = keep, name, cause, 0

    def __call__(self, row: dict[str, Any]) -> bool:
        if self.keep(row):
            return True
        self.skipped += 1
        if _is_power_of_ten(self.skipped):
            logger.warning(
                "Skipped %d rows of the streamed %s so far, each because %s; the last is row %s.",
                self.skipped, self.name, self.cause, row.get(ROW_NUMBER),
            )  # fmt: skip
        return False


class _CountedReport:
    """For a stream: passes every row, and logs the first that fulfils the condition and every tenfold more."""

    def __init__(self, unlike: Callable[[dict[str, Any]], bool], name: str, what: str, level: int) -> None:
        self.unlike, self.name, self.what, self.level, self.found = unlike, name, what, level, 0

    def __call__(self, row: dict[str, Any]) -> bool:
        if self.unlike(row):
            self.found += 1
            if _is_power_of_ten(self.found):
                logger.log(
                    self.level, "%d rows of the streamed %s so far %s; the last is row %s.",
                    self.found, self.name, self.what, row.get(ROW_NUMBER),
                )  # fmt: skip
        return True


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"
