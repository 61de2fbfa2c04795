"""Rows of the usual formats of binary feedback to ``prompt``, ``completion`` and ``label``.

Every other column stays: it may be bound by an objective.
"""

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset

from posttrain import __version__
from posttrain.data import fields, formats, preference_formats, scored
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.replacing import replace
from posttrain.data.scores import twins
from posttrain.data.skipping import skip
from posttrain.data.sources import Rows, columns_of
from posttrain.suggest import unknown

logger = logging.getLogger(__name__)

SINGLE = ("prompt-completion", "messages", "sharegpt", "instruction")
FORMATS = tuple(dict.fromkeys((*preference_formats.FORMATS, *SINGLE)))
PRODUCED = ("prompt", "completion", "label")
# Rows of a stream among which the next is drawn: enough to part the two of a pair.
SHUFFLE_BUFFER = 1000


def prepare(
    rows: Rows,
    *,
    format: str = "auto",
    template: str | None = None,
    chat: bool = False,
    pairs: str = "all",
    inverted: str = "keep",
    ties: str = "keep",
    shuffle_seed: int = 0,
    key: str = "data",
) -> Rows:
    """Bring rows into the form that binary feedback is trained in; ``label`` tells whether a completion is desirable.

    - ``prompt-completion``, ``instruction``: as in `posttrain.data.formats.prepare`, and ``label``.
    - ``messages``, ``sharegpt``: a conversation and ``label``; its last message, the assistant's, is the completion.
    - pairs in any format of `posttrain.data.preference_formats`, taken apart into a desirable and an undesirable row
      each and shuffled, so that no batch consists of one class or of whole pairs. A column that chosen and rejected
      have one each of (``chosen_score`` and ``rejected_score``) becomes one of the row's own (``score``); what concerns
      the pair stays on both rows, and so does its number.

    ``label`` is true or false, 1 or 0. Rows with an empty completion are skipped and reported, and the rows of either
    class are counted: with none of one, a warning says so.

    Args:
        rows: as `posttrain.data.sources.load` gives them.
        format: one of `FORMATS`; ``auto`` decides by the columns.
        template, chat, pairs, inverted, ties: as in `posttrain.data.preference_formats.prepare`.
        shuffle_seed: of the order of pairs taken apart.
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: as in `posttrain.data.preference_formats.prepare`, or a label that is neither.
    """
    if format not in FORMATS:
        raise ValueError(unknown(f"{key}.format", format, FORMATS))
    if _reads_pairs(format, columns_of(rows)):
        rows = preference_formats.prepare(
            rows, format=format, template=template, chat=chat, pairs=pairs, inverted=inverted, ties=ties, key=key
        )
        rows = _unpaired(rows, key)
        if isinstance(rows, IterableDataset):
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        else:
            rows = rows.shuffle(seed=shuffle_seed)
    else:
        rows = _single(rows, format, template, chat, key)
    return _counted(rows, key)


def _reads_pairs(format: str, columns: Collection[str]) -> bool:
    if format in ("prompt-completion", "messages"):
        return False
    if format in ("preference", "dialogue", "scored") or {"chosen", "rejected"} <= set(columns):
        return True
    return format == "auto" and "label" not in columns and scored.list_columns(columns) is not None


def _single(rows: Rows, format: str, template: str | None, chat: bool, key: str) -> Rows:
    columns = columns_of(rows)
    resolved = formats.resolve(format, columns, template, True, key)
    if resolved not in SINGLE:
        raise ValueError(
            f"{key} reads as format {resolved!r}, which has no prompt and completion to give feedback on; rename its "
            f"columns with {key}.columns to prompt, completion and label."
        )
    fields.require("label", columns, key, "binary feedback")
    dropped = (*formats.check_columns(resolved, columns, template, True, key), *fields.TEXT_COLUMNS)
    converter = BinaryConverter(formats.Converter(resolved, template, chat, True, key))
    rows = replace(rows, converter, produced=PRODUCED, dropped=dropped)
    return skip(rows, _is_complete, name=key, cause="its completion is empty")


@dataclass(frozen=True)
class BinaryConverter:
    """One row to its prompt, completion and label; ``version`` as in `posttrain.data.formats.Converter`."""

    text: formats.Converter
    version: str = __version__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found, label = self.text(row), row.get("label")
        place = f"{self.text.key}, row {row.get(ROW_NUMBER)}"
        if not isinstance(label, bool | int | float) or label not in (0, 1):
            raise ValueError(f"{place}: label is {label!r}; give true or false, or 1 or 0.")
        if "messages" in found:
            *prompt, last = found["messages"]
            if not prompt or last["role"] != "assistant":
                raise ValueError(
                    f"{place}: the conversation does not end with the assistant's answer to a prompt; cut it."
                )
            found = {"prompt": prompt, "completion": [last]}
        return {**found, "label": bool(label)}


def _unpaired(rows: Rows, key: str) -> Rows:
    columns = columns_of(rows)
    apart = (("completion", "chosen", "rejected"), *twins(columns))
    taken = {name for _, *both in apart for name in both}
    produced = [plain for plain, *_ in apart] + ["label"]
    for name in produced:
        if name in columns or produced.count(name) > 1:
            raise ValueError(
                f"{key}: to take pairs apart is to write a column {name!r}, and there is one already; rename that with "
                f"{key}.columns."
            )
    return replace(rows, Unpair(apart), produced=produced, dropped=taken, batched=True)


@dataclass(frozen=True)
class Unpair:
    """A batch of pairs to a batch of twice as many rows, a pair's chosen one first.

    Args:
        apart: (plain name, the chosen one's column, the rejected one's column).
        version: as in `posttrain.data.formats.Converter`.
    """

    apart: tuple[tuple[str, str, str], ...]
    version: str = __version__

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        taken = {name for _, *both in self.apart for name in both}
        rows = {
            name: [value for value in values for _ in range(2)] for name, values in batch.items() if name not in taken
        }
        for plain, chosen, rejected in self.apart:
            rows[plain] = [value for both in zip(batch[chosen], batch[rejected], strict=True) for value in both]
        return {**rows, "label": [True, False] * len(batch["chosen"])}


def _counted(rows: Rows, key: str) -> Rows:
    """Say how many rows of either class there are."""
    if isinstance(rows, IterableDataset):
        return rows.map(_StreamCount(key))
    _say(Counter(rows["label"]), key)
    return rows


class _StreamCount:
    """For a stream: says how many there were of either class after 100 rows and every tenfold more."""

    def __init__(self, key: str) -> None:
        self.key, self.labels = key, Counter[bool]()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.labels[row["label"]] += 1
        if len(count := str(self.labels.total())) > 2 and count.strip("0") == "1":
            _say(self.labels, f"the streamed {self.key} so far")
        return row


def _say(labels: Counter[bool], name: str) -> None:
    level = logging.INFO if labels[True] and labels[False] else logging.WARNING
    only = "" if level == logging.INFO else ": one class alone tells no good completion from a bad one"
    logger.log(level, "%d desirable and %d undesirable rows in %s%s.", labels[True], labels[False], name, only)


def _is_complete(row: dict[str, Any]) -> bool:
    return not fields.is_empty(row["completion"])
