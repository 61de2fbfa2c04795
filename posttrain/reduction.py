"""Token -> sequence -> step. Every denominator has a name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums over many tokens, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def segment_sum(values: Float[Tensor, " tokens"], lengths: Int[Tensor, " sequences"]) -> Float[Tensor, " sequences"]:
    """Sum of each sequence's tokens; the tokens of one sequence lie together, in the order of ``lengths``.

    Deterministic on every device, unlike a scatter; an empty batch keeps its place in the graph.
    """
    if lengths.shape[0] == 0:
        return values[:0]
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def segment_mean(values: Float[Tensor, " tokens"], lengths: Int[Tensor, " sequences"]) -> Float[Tensor, " sequences"]:
    """Mean over each sequence's tokens; ``lengths`` are at least 1 (the collator leaves empty sequences out)."""
    return segment_sum(values, lengths) / lengths.to(values.dtype)


def repeat_to_tokens(values: Tensor, lengths: Int[Tensor, " sequences"], tokens: int) -> Tensor:
    """Give every token its sequence's value; ``tokens`` spares the device a look at the lengths."""
    return torch.repeat_interleave(values, lengths, dim=0, output_size=tokens)


def weighted(values: Float[Tensor, " units"], weight: Float[Tensor, " units"] | None) -> Float[Tensor, " units"]:
    """Each value times its weight. A value whose weight is zero never counts, not even a non-finite one."""
    return values if weight is None else torch.where(weight > 0, values, 0) * weight


def weighted_sum(values: Float[Tensor, " units"], weight: Float[Tensor, " units"] | None) -> Float[Tensor, ""]:
    """Numerator of a step's loss."""
    return weighted(values, weight).sum()


def divide(numerator: Float[Tensor, "..."], denominator: Float[Tensor, ""]) -> Float[Tensor, "..."]:
    """``numerator / denominator``, and the (zero) numerator itself where nothing was counted."""
    denominator = denominator.to(numerator)
    return numerator / torch.where(denominator == 0, 1, denominator)


@dataclass
class StepCounts:
    """The denominators of one optimizer step, over its micro-batches and all ranks.

    Args:
        units: name of a denominator (``tokens``, ``pairs``, ``chosen_tokens``, ...) -> 0-d tensor.
        batches: the step's micro-batches, kept for a counting pass; empty once nothing needs them.
        denominators: term index -> sum of the term's weights, for terms that return a weight.
        prepared: term index -> for each micro-batch, what the term's ``prepare`` returned.
        resolved: whether ``denominators`` and ``prepared`` are filled.
        seen: micro-batches whose loss was formed already.
    """

    units: Mapping[str, Tensor]
    batches: list[dict] = field(default_factory=list)
    denominators: dict[int, Tensor] = field(default_factory=dict)
    prepared: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)
    resolved: bool = False
    seen: int = 0
