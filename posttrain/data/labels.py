"""The label of a completion as the number that objectives bind."""

from typing import Any

from datasets import Dataset

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preparation import AnyDataset, column_names

LABEL, DESIRABLE = "label", "desirable"


def with_desirable(dataset: AnyDataset, name: str) -> AnyDataset:
    """The rows with ``label`` (true or false, 1 or 0) as ``desirable`` (1.0 or 0.0); as they are where that is done.

    Args:
        dataset: rows of single completions.
        name: for messages, such as ``train``.

    Raises:
        ValueError: pairs, rows without a label or with both columns, or a label that is neither; the row is named.
    """
    names = column_names(dataset)
    if LABEL not in names and {"chosen", "rejected"} <= set(names):
        raise ValueError(
            f"the {name} data holds pairs; take them apart and shuffle them with "
            "posttrain.data.binary_formats.prepare, or train on them with PreferenceTrainer."
        )
    if (LABEL in names) == (DESIRABLE in names):
        found = "both `label` and `desirable`" if LABEL in names else f"no `label` among its columns {sorted(names)}"
        raise ValueError(f"the {name} data has {found}; give `label` alone, true where a completion is desirable.")
    if DESIRABLE in names:
        return dataset
    convert = _Desirable(name)
    if not isinstance(dataset, Dataset):
        return dataset.map(convert, with_indices=True, remove_columns=[LABEL])
    numbers = dataset[ROW_NUMBER] if ROW_NUMBER in names else range(len(dataset))
    column = [convert.number(label, number) for label, number in zip(dataset[LABEL], numbers, strict=True)]
    return dataset.remove_columns(LABEL).add_column(DESIRABLE, column)


class _Desirable:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, float]:
        return {DESIRABLE: self.number(row[LABEL], row.get(ROW_NUMBER, index))}

    def number(self, label: Any, row: int) -> float:
        if not isinstance(label, bool | int | float) or label not in (0, 1):
            raise ValueError(f"the {self.name} data, row {row}: label is {label!r}; give true or false, or 1 or 0.")
        return float(label)
