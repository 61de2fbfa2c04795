"""Rows that are to be forgotten and to stay at once."""

import logging
from typing import Any

from posttrain.data.preparation import AnyDataset

logger = logging.getLogger(__name__)

SHOWN = 10


def refuse_overlap(forget: AnyDataset, retain: AnyDataset, *, allowed: bool) -> int:
    """Count the rows to forget whose prompt and completion stand in the retain data as well.

    Args:
        forget, retain: rows with ``prompt`` and ``completion``, or ``messages``, or ``text``; others are
            compared whole.
        allowed: only report them.

    Raises:
        ValueError: there are some, and they are not allowed; the first of them are named.
    """
    kept = {_content(row) for row in retain}
    both = [number for number, row in enumerate(forget) if _content(row) in kept]
    if not both:
        return 0
    shown = ", ".join(map(str, both[:SHOWN])) + (", ..." if len(both) > SHOWN else "")
    if not allowed:
        raise ValueError(
            f"{len(both)} rows of the forget data stand in the retain data as well: rows {shown}; take them out, or "
            "set data.allow_overlap to true."
        )
    logger.warning("%d rows of the forget data stand in the retain data as well: rows %s.", len(both), shown)
    return len(both)


def _content(row: dict[str, Any]) -> str:
    trained = {name: row[name] for name in ("prompt", "completion", "messages", "text", "input_ids") if name in row}
    return repr(trained or sorted(row.items()))
