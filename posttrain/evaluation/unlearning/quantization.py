"""Weights rounded to few bits, simulated: what the rounded model still knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
        ValueError: as `obstacle` says.
    """
    reason = obstacle(model)
    if reason is not None:
        raise ValueError(f"the weights of {type(model).__name__} cannot be rounded: {reason}.")
    linear = _linear_layers(model)
    saved = [module.weight.detach().clone() for module in linear]
    try:
        with torch.no_grad():
            for module in linear:
                # GPT-2's layers hold (in, out)
                turned = isinstance(module, Conv1D)
                done = rounded(module.weight.T if turned else module.weight, rounding)
                module.weight.copy_(done.T if turned else done)
        yield
    finally:
        with torch.no_grad():
            for module, weight in zip(linear, saved, strict=True):
                module.weight.copy_(weight)


def obstacle(model: CausalLM) -> str | None:
    """Why a model's weights cannot be rounded so that the numbers mean it; None where they can."""
    if getattr(model, "is_quantized", False):
        return "they are quantised already"
    for module in model.modules():
        # experts in one tensor: which of its dimensions is the input differs between models
        stacked = any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
        if stacked and not isinstance(module, _CONVOLUTIONS):
            return f"{type(module).__name__} holds those of several layers as one, which would stay as they are"
    return None if _linear_layers(model) else "it has no linear layers beside its head"


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _linear_layers(model: CausalLM) -> list[nn.Linear | Conv1D]:
    """All but heads."""
    holders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    heads = {id(head) for holder in holders if (head := holder.get_output_embeddings()) is not None}
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads]
