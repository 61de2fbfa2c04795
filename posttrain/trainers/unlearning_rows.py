"""The rows of an unlearning run: prepared by role, and drawn together."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.drawing import DrawingSampler, DrawnRows
from posttrain.data.preparation import column_names, number_rows
from posttrain.data.refusals import with_refusals
from posttrain.term import Term

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object

logger = logging.getLogger(__name__)


def check_rows(rows: Any, name: str) -> None:
    """Refuse what cannot be drawn from.

    Raises:
        ValueError: a stream, no row at all, or columns that hold no text in a form that TRL reads.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"the {name} data is a {type(rows).__name__}, and rows are drawn by their numbers; give a "
            f"datasets.Dataset, with data.{name}.streaming at false."
        )
    if not len(rows):
        raise ValueError(f"the {name} data is empty; give at least one row.")
    columns = set(column_names(rows))
    if not ({"prompt", "completion"} <= columns or columns & {"messages", "text", "input_ids"}):
        raise ValueError(
            f"the {name} data has the columns {sorted(columns)}; give prompt and completion, messages, or text (in "
            f"YAML, data.{name}.format reads other forms)."
        )


def warn_of_cuts(rows: Any, name: str, max_length: int | None) -> None:
    """Say how many prepared rows are as long as ``trainer.max_length``: what was cut off is not trained on."""
    if max_length is None:
        return
    long = sum(len(ids) >= max_length for ids in rows["input_ids"])
    if long:
        logger.warning(
            "%d of %d rows of the %s data reach trainer.max_length (%d tokens); what lies beyond is cut off, "
            "neither forgotten nor retained.", long, len(rows), name, max_length,
        )  # fmt: skip


class RowsByRole(Host):
    """The part of `posttrain.trainers.unlearning.UnlearningTrainer` that prepares and draws its rows."""

    terms: tuple[Term, ...]
    completion_only_loss: bool
    _columns: tuple[str, ...]
    _prepare_dataset: Callable[..., Any]

    def _drawn(self, given: Mapping[str, Any], ratio: float) -> DrawnRows:
        """The prepared rows of every role that a term reads, and the sampler that draws them.

        Args:
            given: ``forget`` and ``retain`` rows, and the texts of ``refusal``, or None; the rows to forget stand
                prepared in ``train_dataset``.
            ratio: rows to retain for each row to forget.
        """
        args: Any = self.args
        read = {one.role or term.role for term in self.terms for one in term.all_statistics}
        read |= {term.role for term in self.terms}
        seed = args.seed if args.data_seed is None else args.data_seed
        retains = any(role.startswith("retain") for role in read)
        if given["retain"] is not None and not retains:
            logger.warning("The retain data is not used: no term of the objective reads it.")
        parts: dict[str, Any] = {"forget": self.train_dataset, "retain": None}
        if retains and given["retain"] is not None:
            parts["retain"] = self._prepared(given["retain"], "retain")
        for role, side in (("refusal", "forget"), ("retain_refusal", "retain")):
            own, parts[role] = parts[side], None
            if role in read and own is not None and given["refusal"]:
                numbered: Any = number_rows(given[side])
                rows = with_refusals(numbered, own[ROW_NUMBER], given["refusal"], seed=seed)
                parts[role] = _in_order(self._prepared(rows, role), own[ROW_NUMBER], role)
        for role in ("forget", "retain"):
            if parts[role] is not None:
                warn_of_cuts(parts[role], role, args.max_length)
        kept = parts["retain"]
        shuffle = args.train_sampling_strategy != "sequential"
        counts = len(parts["forget"]), len(kept) if kept is not None else 0
        sampler = DrawingSampler(*counts, ratio=ratio, shuffle=shuffle, seed=seed)
        return DrawnRows(parts["forget"], kept, parts["refusal"], parts["retain_refusal"], sampler)

    def _prepared(self, rows: Dataset, role: str) -> Any:
        bound = {column: term.name for term in self.terms if term.role == role for column in term.all_columns}
        for column in self._columns:
            if column in column_names(rows):
                continue
            if column in bound:
                raise ValueError(
                    f"the {role} data lacks the column {column!r} that the objective {bound[column]!r} needs; it has "
                    f"{sorted(column_names(rows))}."
                )
            # no term reads it here, and a batch holds rows of every role
            rows = rows.add_column(column, [0.0] * len(rows))
        args: Any = self.args
        if args.completion_only_loss is None:
            # TRL looks at the rows to forget; those of another form train what their own form says
            self.completion_only_loss = {"prompt", "completion"} <= set(column_names(rows))
        return self._prepare_dataset(rows, self.processing_class, args, False, None, role)


def _in_order(rows: Dataset, numbers: list[int], role: str) -> Dataset:
    """The rows of these numbers, in their order, whatever preparing has shuffled or left out."""
    position = {number: index for index, number in enumerate(rows[ROW_NUMBER])}
    lost = sum(number not in position for number in numbers)
    if lost:
        raise ValueError(
            f"{lost} prompts of the {role} data leave no room for a refusal within trainer.max_length; raise it."
        )
    return rows.select([position[number] for number in numbers])
