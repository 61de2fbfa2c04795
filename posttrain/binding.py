"""From one micro-batch's kernel output and side columns to the named tensors an objective asks for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.reduction import repeat_to_tokens, segment_mean, segment_sum
from posttrain.statistics import Statistic
from posttrain.terms import KernelOptions, Term


@dataclass(frozen=True, eq=False)
class Side:
    """What the collator knows of a micro-batch beside the model's own inputs.

    Args:
        target_index: (targets,), positions of the flattened (rows x length) hidden states that predict a trained token.
        targets: (targets,), the trained tokens; those of one sequence lie together.
        lengths: (sequences,), trained tokens per sequence, each at least 1.
        batch_row: (sequences,), the row of the micro-batch a sequence lies in (packing puts several into one).
        row_number: (sequences,), its row in the data set as given, for messages; -1 where unknown.
        sequence_columns: name -> (sequences,), one number per example.
        token_columns: name -> (targets,) or (targets, k), one entry per trained token.
        num_tokens: tokens of the micro-batch without padding, prompts included.
        rows: rows of the micro-batch.
    """

    target_index: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    lengths: Int[Tensor, " sequences"]
    batch_row: Int[Tensor, " sequences"]
    row_number: Int[Tensor, " sequences"]
    sequence_columns: dict[str, Tensor]
    token_columns: dict[str, Tensor]
    num_tokens: int
    rows: int

    @property
    def sizes(self) -> dict[str, int]:
        """Units of each kind in the micro-batch, known without asking the device."""
        return {"tokens": self.targets.shape[0], "sequences": self.lengths.shape[0]}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Side":
        """A copy on ``device``; accelerate moves whatever has this method along with the batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Side":
        """A copy in page-locked memory, as the data loader asks for."""
        return self._each(Tensor.pin_memory)

    def first_rows(self, count: int) -> tuple["Side", Tensor]:
        """The part of the first ``count`` rows, and the mask over targets that selects it."""
        sequences = self.batch_row < count
        tokens = repeat_to_tokens(sequences, self.lengths, self.sizes["tokens"])
        return replace(
            self,
            target_index=self.target_index[tokens],
            targets=self.targets[tokens],
            lengths=self.lengths[sequences],
            batch_row=self.batch_row[sequences],
            row_number=self.row_number[sequences],
            sequence_columns={name: column[sequences] for name, column in self.sequence_columns.items()},
            token_columns={name: column[tokens] for name, column in self.token_columns.items()},
            rows=count,
        ), tokens

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Side":
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = change(value)
            elif isinstance(value, dict):
                moved[item.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **moved)


def wanted_groups(terms: tuple[Term, ...], extra: tuple[str, ...] = ()) -> dict[KernelOptions, tuple[str, ...]]:
    """Kernel statistics per set of kernel options; ``extra`` (for logging) is asked for at the default options."""
    groups: dict[KernelOptions, dict[str, None]] = {KernelOptions(): dict.fromkeys(extra)}
    for term in terms:
        names = groups.setdefault(term.kernel_options, {})
        for statistic in (*term.statistics.values(), *term.prepare_inputs.values()):
            if not statistic.reference:
                names.update(dict.fromkeys(statistic.kernel_names))
    return {options: tuple(names) for options, names in groups.items() if names}


def bind_statistic(statistic: Statistic, computed: Mapping[str, Tensor], side: Side) -> Tensor:
    """One statistic of the grammar from the kernel's per-token values."""
    if statistic.kernel == "length":
        return side.lengths.to(computed["logp"].dtype if "logp" in computed else torch.float32)
    if statistic.kernel == "sequence_logp":
        return segment_sum(computed["logp"], side.lengths)
    values = computed["logp"].exp() if statistic.kernel == "probability" else computed[statistic.kernel]
    if statistic.reduction == "sum":
        return segment_sum(values, side.lengths)
    if statistic.reduction == "mean":
        return segment_mean(values, side.lengths)
    if statistic.reduction or statistic.role or statistic.reference:
        raise ValueError(f"statistic {statistic.name!r} cannot be bound here; this is a mistake of the trainer.")
    return values


def bind_column(name: str, unit: str, side: Side) -> Tensor:
    """A data column at the objective's unit: a per-sequence number is repeated over its tokens where needed."""
    if name in side.token_columns:
        return side.token_columns[name]
    column = side.sequence_columns[name]
    return repeat_to_tokens(column, side.lengths, side.sizes["tokens"]) if unit == "tokens" else column


def bind(
    term: Term,
    statistics: Mapping[str, Statistic],
    columns: tuple[str, ...],
    computed: Mapping[KernelOptions, Mapping[str, Tensor]],
    side: Side,
) -> dict[str, Tensor]:
    """The named tensors of one term (or of its ``prepare``) for one micro-batch.

    Floating columns take the dtype of the statistics they stand beside.
    """
    own = computed.get(term.kernel_options, {})
    dtypes = [tensor.dtype for group in computed.values() for tensor in group.values() if tensor.is_floating_point()]
    bound = {name: bind_statistic(statistic, own, side) for name, statistic in statistics.items()}
    for name in columns:
        column = bind_column(name, term.declaration.unit, side)
        bound[name] = column.to(dtypes[0]) if column.is_floating_point() and dtypes else column
    return bound
