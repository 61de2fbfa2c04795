"""Leaving rows out, never silently."""

import logging
from collections.abc import Callable
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
        return rows.filter(_CountedFilter(keep, name, cause))
    kept = rows.filter(keep)
    skipped = len(rows) - len(kept)
    if not len(kept):
        raise ValueError(f"{name} has no row left: all {len(rows)} were skipped, each because {cause}.")
    if skipped:
        remaining = set(kept[ROW_NUMBER])
        numbers = [str(number) for number in rows[ROW_NUMBER] if number not in remaining]
        shown = ", ".join(numbers[:SHOWN]) + (", ..." if skipped > SHOWN else "")
        logger.warning("Skipped %d of %d rows of %s, each because %s: rows %s.", skipped, len(rows), name, cause, shown)
    return kept


class _CountedFilter:
    """For a stream, whose end is unknown: logs the first skip and every tenfold more."""

    def __init__(self, keep: Callable[[dict[str, Any]], bool], name: str, cause: str) -> None:
        self.keep, self.name, self.cause, self.skipped = keep, name, cause, 0

    def __call__(self, row: dict[str, Any]) -> bool:
        if self.keep(row):
            return True
        self.skipped += 1
        if str(self.skipped).strip("0") == "1":
            logger.warning(
                "Skipped %d rows of the streamed %s so far, each because %s; the last is row %s.",
                self.skipped, self.name, self.cause, row.get(ROW_NUMBER),
            )  # fmt: skip
        return False
