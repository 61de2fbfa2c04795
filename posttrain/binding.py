"""From one micro-batch's kernel output and side columns to the named tensors an objective asks for."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from posttrain.reduction import repeat_to_tokens, segment_mean, segment_sum, sum_dtype
from posttrain.side import Side
from posttrain.statistics import Statistic
from posttrain.terms import KernelOptions, Term

# what stands before a kernel statistic's name where it is the reference model's
REFERENCE = "reference_"


def wanted_groups(terms: tuple[Term, ...], extra: tuple[str, ...] = ()) -> dict[KernelOptions, tuple[str, ...]]:
    """Kernel statistics per set of kernel options; ``extra`` (for logging) is asked for at the default options."""
    groups: dict[KernelOptions, dict[str, None]] = {KernelOptions(): dict.fromkeys(extra)}
    for term in terms:
        names = groups.setdefault(term.kernel_options, {})
        for statistic in term.all_statistics:
            names.update(dict.fromkeys(statistic.kernel_names))
    return {options: tuple(names) for options, names in groups.items() if names}


def reference_groups(terms: tuple[Term, ...]) -> dict[KernelOptions, tuple[str, ...]]:
    """The same of the reference model; empty where no objective asks for one."""
    groups: dict[KernelOptions, dict[str, None]] = {}
    for term in terms:
        for statistic in term.all_statistics:
            if statistic.reference_kernel_names:
                groups.setdefault(term.kernel_options, {}).update(dict.fromkeys(statistic.reference_kernel_names))
    return {options: tuple(names) for options, names in groups.items()}


def bind_statistic(statistic: Statistic, computed: Mapping[str, Tensor], side: Side, role: str = "") -> Tensor:
    """One statistic of the grammar from the kernel's per-token values.

    Args:
        statistic: what to bind.
        computed: kernel name -> (targets,), those of the reference model under `REFERENCE` + kernel name. A reference
            log-probability may stand among the columns instead, per token (``reference_logp``) or summed over each
            sequence (``reference_sum_logp``).
        side: of the micro-batch.
        role: of statistics that name none.
    """
    role = statistic.role or role
    part = side.of(role)
    tokens = side.roles[role].tokens if role in side.roles else slice(None)
    own = {name: tensor[tokens] for name, tensor in computed.items()}
    prefix = REFERENCE if statistic.reference else ""
    if statistic.kernel == "length":
        return part.lengths.to(own["logp"].dtype if "logp" in own else torch.float32)
    if statistic.kernel == "logratio":
        ratio = _sum_logp(own, part, "") - _sum_logp(own, part, REFERENCE)
        return ratio.to(own["logp"].dtype)
    if statistic.kernel == "sequence_logp" or (statistic.kernel == "logp" and statistic.reduction == "sum"):
        return _sum_logp(own, part, prefix).to(_dtype(own))
    if statistic.kernel == "logp" and statistic.reduction == "mean":
        return (_sum_logp(own, part, prefix) / part.lengths).to(_dtype(own))
    values = _per_token(own, part, prefix + ("logp" if statistic.kernel == "probability" else statistic.kernel))
    values = values.exp() if statistic.kernel == "probability" else values
    if statistic.reduction in ("head_sum", "tail_sum"):
        inside = _within_shorter(side, part)
        values = torch.where(inside if statistic.reduction == "head_sum" else ~inside, values, 0)
        return segment_sum(values, part.lengths)
    if statistic.reduction == "sum":
        return segment_sum(values, part.lengths)
    return segment_mean(values, part.lengths) if statistic.reduction == "mean" else values


def _dtype(own: Mapping[str, Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in own.values() if tensor.is_floating_point()), torch.float32)


def _per_token(own: Mapping[str, Tensor], part: Side, name: str) -> Tensor:
    return own[name] if name in own else part.token_columns[name]


def _sum_logp(own: Mapping[str, Tensor], part: Side, prefix: str) -> Tensor:
    """Sums in float64: a log-ratio is a small difference of two large ones."""
    if prefix and prefix + "sum_logp" in part.sequence_columns:
        return part.sequence_columns[prefix + "sum_logp"]
    values = _per_token(own, part, prefix + "logp")
    return segment_sum(values.to(sum_dtype(values.device)), part.lengths)


def _within_shorter(side: Side, part: Side) -> Bool[Tensor, " tokens"]:
    """Whether a token stands within the length of the shorter completion of its pair."""
    shorter = torch.minimum(side.of("chosen").lengths, side.of("rejected").lengths)
    count = part.targets.shape[0]
    starts = part.lengths.cumsum(0) - part.lengths
    position = torch.arange(count, device=part.lengths.device) - repeat_to_tokens(starts, part.lengths, count)
    return position < repeat_to_tokens(shorter, part.lengths, count)


def bind_column(name: str, unit: str, side: Side, role: str = "") -> Tensor:
    """A data column at the objective's unit: a per-sequence number is repeated over its tokens where needed."""
    part = side.of("chosen" if unit == "pairs" else role)
    if name in part.token_columns:
        return part.token_columns[name]
    column = part.sequence_columns[name]
    return repeat_to_tokens(column, part.lengths, part.targets.shape[0]) if unit == "tokens" else column


def bind(
    term: Term,
    statistics: Mapping[str, Statistic],
    columns: tuple[str, ...],
    computed: Mapping[KernelOptions, Mapping[str, Tensor]],
    side: Side,
) -> dict[str, Tensor]:
    """The named tensors of one term (or of its ``prepare``) for one micro-batch.

    Floating columns take the dtype of the statistics they stand beside. A statistic per sequence is repeated over the
    sequence's tokens where the term's unit is tokens.
    """
    own = computed.get(term.kernel_options, {})
    dtypes = [tensor.dtype for group in computed.values() for tensor in group.values() if tensor.is_floating_point()]
    bound = {name: bind_statistic(statistic, own, side, term.role) for name, statistic in statistics.items()}
    if term.declaration.unit == "tokens":
        part = side.of(term.role)
        for name, statistic in statistics.items():
            if statistic.unit == "sequences":
                bound[name] = repeat_to_tokens(bound[name], part.lengths, part.targets.shape[0])
    for name in columns:
        column = bind_column(name, term.declaration.unit, side, term.role)
        bound[name] = column.to(dtypes[0]) if column.is_floating_point() and dtypes else column
    return bound
