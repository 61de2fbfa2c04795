"""Scores beside pairs: checked numbers, the margin between them, and pairs that their own scores contradict."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value

from posttrain import __version__
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.skipping import report, skip
from posttrain.data.sources import Rows, columns_of

# The first two that a data set has make the margin.
SCORES = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)
MARGINS = ("score_margin", "reward_margin")
PROBABILITY = "preference_probability"


def score(rows: Rows, *, inverted: str = "keep", ties: str = "keep", key: str = "data") -> Rows:
    """Check a data set's scores, and act on pairs whose scores contradict chosen and rejected.

    Two columns of scores (named as in `SCORES`) give ``score_margin``, the chosen score minus the rejected one, where
    the data has no such column; it is missing where a score is missing or NaN. A pair is inverted where
    ``score_margin`` is negative, or in data without one where ``preference_probability`` is below 1/2. What was found
    is logged.

    Args:
        rows: of pairs, with row numbers.
        inverted: ``keep``, ``skip``, ``error``, or ``swap``: exchange chosen and rejected with every column that
            belongs to one of them, and turn the margins and the probability around.
        ties: ``keep`` or ``skip`` pairs of equal scores.
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: a score that is no number, a probability outside [0, 1], an inverted pair under ``error``, or no row
            is left.
    """
    columns = columns_of(rows)
    both = next((names for names in SCORES if set(names) <= set(columns)), None)
    numbers = tuple(name for name in (*MARGINS, PROBABILITY) if name in columns)
    if both is None and not numbers:
        return rows
    reader = ScoreReader(numbers, both, key)
    rows = rows.map(reader, features=reader.features(rows) if isinstance(rows, Dataset) else None)
    column = "score_margin" if both is not None or "score_margin" in columns else PROBABILITY
    if column not in columns_of(rows):
        return rows
    what = f"have no {column}, each because a score is missing or NaN; an objective that reads it refuses them"
    rows = report(rows, partial(_is, verdict="missing", column=column), columns=[column], name=key, what=what)
    return _inverted(_ties(rows, ties, column, key), inverted, column, key)


def twins(columns: Collection[str]) -> list[tuple[str, str, str]]:
    """Columns of which chosen and rejected have one each, as (plain name, the chosen one's, the rejected one's).

    ``chosen_score`` and ``rejected_score`` are of ``score``, and so are ``score_chosen`` and ``score_rejected``.
    """
    found = []
    for name in columns:
        if name.startswith("chosen_"):
            plain = name.removeprefix("chosen_")
            other = f"rejected_{plain}"
        else:
            plain = name.removesuffix("_chosen")
            other = f"{plain}_rejected"
        if plain and plain != name and other in columns:
            found.append((plain, name, other))
    return found


@dataclass(frozen=True)
class ScoreReader:
    """A row's scores as checked numbers, with their margin; ``version`` as in `posttrain.data.formats.Converter`."""

    numbers: tuple[str, ...]
    scores: tuple[str, str] | None
    key: str
    version: str = __version__

    def __call__(self, row: dict[str, Any]) -> dict[str, float | None]:
        found = {name: self._number(row, name) for name in self.numbers}
        probability = found.get(PROBABILITY)
        if probability is not None and not 0 <= probability <= 1:
            raise ValueError(f"{self._place(row)}: {PROBABILITY} is {probability}; give a number from 0 to 1.")
        if self.scores is not None:
            chosen, rejected = (self._number(row, name) for name in self.scores)
            margin = None if chosen is None or rejected is None else chosen - rejected
            found.setdefault("score_margin", margin)
        return found

    def features(self, rows: Dataset) -> Features:
        """The data set's features with these numbers, also where the first rows lack them."""
        margin = ("score_margin",) if self.scores is not None else ()
        numbers = dict.fromkeys((*self.numbers, *margin), Value("float64"))
        return Features({**rows.features, **numbers})  # type: ignore[arg-type]

    def _number(self, row: dict[str, Any], name: str) -> float | None:
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
            raise ValueError(
                f"{self._place(row)}: {name} is {value!r}; give a finite number, or null where there is none."
            )
        return float(value)

    def _place(self, row: dict[str, Any]) -> str:
        return f"{self.key}, row {row.get(ROW_NUMBER)}"


def _verdict(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "missing"
    if column == PROBABILITY:
        value -= 0.5
    return "tied" if value == 0 else "agreeing" if value > 0 else "inverted"


def _is(row: dict[str, Any], verdict: str, column: str) -> bool:
    return _verdict(row, column) == verdict


def _is_not(row: dict[str, Any], verdict: str, column: str) -> bool:
    return _verdict(row, column) != verdict


def _ties(rows: Rows, ties: str, column: str, key: str) -> Rows:
    if ties == "skip":
        return skip(rows, partial(_is_not, verdict="tied", column=column), name=key, cause="its scores are equal")
    tied = partial(_is, verdict="tied", column=column)
    what = f"have equal scores and stay in ({key}.ties is {ties})"
    return report(rows, tied, columns=[column], name=key, what=what, level=logging.INFO)


def _inverted(rows: Rows, inverted: str, column: str, key: str) -> Rows:
    contradiction = "score the rejected completion above the chosen one"
    if inverted == "skip":
        cause = "its scores contradict chosen and rejected"
        return skip(rows, partial(_is_not, verdict="inverted", column=column), name=key, cause=cause)
    found = partial(_is, verdict="inverted", column=column)
    what = f"{contradiction} ({key}.inverted is {inverted})"
    rows = report(rows, found, columns=[column], name=key, what=what)
    if inverted == "error":
        return rows.map(_Refusal(column, key))
    return _swapped(rows, column) if inverted == "swap" else rows


@dataclass(frozen=True)
class _Refusal:
    column: str
    key: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if _verdict(row, self.column) == "inverted":
            raise ValueError(
                f"{self.key}, row {row.get(ROW_NUMBER)}: {self.column} is {row[self.column]}, which contradicts chosen "
                f"and rejected; correct the row, or set {self.key}.inverted to keep, swap or skip."
            )
        return {}


def _swapped(rows: Rows, column: str) -> Rows:
    columns = columns_of(rows)
    exchanged = [("chosen", "rejected"), *((chosen, rejected) for _, chosen, rejected in twins(columns))]
    turned = tuple(name for name in (*MARGINS, PROBABILITY) if name in columns)
    if isinstance(rows, Dataset):
        types = {name: str(getattr(feature, "dtype", "")) for name, feature in rows.features.items()}
        for names in exchanged:
            # whole numbers on one side have no room for the other side's fractions
            kinds = {types[name] for name in names}
            if len(kinds) > 1 and all(kind.startswith(("int", "uint", "float")) for kind in kinds):
                for name in names:
                    rows = rows.cast_column(name, Value("float64"))
    return rows.map(_Swap(column, tuple(exchanged), turned))


@dataclass(frozen=True)
class _Swap:
    column: str
    exchanged: tuple[tuple[str, str], ...]
    turned: tuple[str, ...]
    version: str = __version__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        swap = _verdict(row, self.column) == "inverted"
        found: dict[str, Any] = {}
        for chosen, rejected in self.exchanged:
            found[chosen], found[rejected] = (
                (row.get(rejected), row.get(chosen)) if swap else (row.get(chosen), row.get(rejected))
            )
        for name in self.turned:
            value = row.get(name)
            found[name] = value if value is None or not swap else 1 - value if name == PROBABILITY else -value
        return found
