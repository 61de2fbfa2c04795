"""Weights rounded to few bits, simulated: what the rounded model still knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.evaluation.inference import CausalLM


@dataclass(frozen=True)
class Rounding:
    """A way of rounding weights to nearest.

    Args:
        bits: of a signed integer, from 2.
        group: weights of one output channel that share a scale, along the input; None for all of the channel.
    """

    bits: int
    group: int | None = None

    @property
    def name(self) -> str:
        return f"int{self.bits}_" + ("channel" if self.group is None else f"group{self.group}")


ROUNDINGS = tuple(Rounding(bits, group) for bits in (8, 4) for group in (None, 128))


def rounded(weight: Float[Tensor, "out in"], rounding: Rounding) -> Float[Tensor, "out in"]:
    """Symmetric rounding: the largest |weight| of a channel or group becomes 2^(bits - 1) - 1 steps.

    Args:
        weight: of a linear layer.
        rounding: bits and group; a channel's last group may be shorter.

    Returns:
        the nearest multiples of each step, in the weight's own dtype.
    """
    most = 2 ** (rounding.bits - 1) - 1
    parts = weight.float().split(rounding.group or weight.shape[1], dim=1)
    done = []
    for part in parts:
        step = part.abs().amax(dim=1, keepdim=True) / most
        done.append(torch.where(step > 0, (part / step.clamp(min=torch.finfo(step.dtype).tiny)).round(), 0) * step)
    return torch.cat(done, dim=1).to(weight.dtype)


@contextmanager
def rounded_weights(model: CausalLM, rounding: Rounding) -> Iterator[None]:
    """The model with the weights of its linear layers rounded, all but the head; afterwards as it was, bit for bit.

    Args:
        model: plain, or with its adapters merged: an adapter's factors would be rounded one by one.
        rounding: bits and group.

    Raises:
        ValueError: the model has no linear layer beside its head.
    """
    holders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    heads = {id(head) for holder in holders if (head := holder.get_output_embeddings()) is not None}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in heads]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layers beside its head; there is nothing to round.")
    saved = [module.weight.detach().clone() for module in linear]
    try:
        with torch.no_grad():
            for module in linear:
                module.weight.copy_(rounded(module.weight, rounding))
        yield
    finally:
        with torch.no_grad():
            for module, weight in zip(linear, saved, strict=True):
                module.weight.copy_(weight)
