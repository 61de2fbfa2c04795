"""Writing columns anew, whatever type the old ones of the same name had."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from posttrain.data.sources import Rows, columns_of

_NEW = "posttrain_new_"


def replace(
    rows: Rows,
    converter: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    produced: Collection[str],
    dropped: Collection[str] = (),
    batched: bool = False,
) -> Rows:
    """Map rows, writing the ``produced`` columns as if there had been none of these names.

    Left to itself, ``map`` fits what it is given to the old column's type: text becomes a number again, and messages
    lose the keys that the old ones did not have.

    Args:
        converter: picklable; gives the produced columns, and where ``batched`` every column that stays.
        produced: its names, all given by ``converter``.
        dropped: columns to remove.
        batched: the converter takes lists of values, and may return more rows or fewer.
    """
    removed = [name for name in columns_of(rows) if name in dropped or name in produced]
    rows = rows.map(_Renamed(converter, tuple(produced)), remove_columns=removed, batched=batched)
    return rows.rename_columns({_NEW + name: name for name in produced})


@dataclass(frozen=True)
class _Renamed:
    converter: Callable[[dict[str, Any]], dict[str, Any]]
    produced: tuple[str, ...]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            _NEW + name if name in self.produced else name: value
            for name, value in self.converter(row).items()
        }  # fmt: skip
