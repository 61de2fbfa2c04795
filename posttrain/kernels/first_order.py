"""Functions whose backward is written by hand have first derivatives only, and say so."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_order(gradients: Sequence[Tensor | None], origins: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a hand-written backward; differentiating them again raises.

    Under ``create_graph=True`` they would otherwise be constants, and a second derivative silently wrong.
    torch's ``once_differentiable`` raises only where the incoming gradient itself needs one.

    Args:
        gradients: what the backward computed, without graph.
        origins: the tensors on which they depend: saved inputs and incoming gradients.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    given = [gradient for gradient in gradients if gradient is not None]
    tied = iter(_FirstOrder.apply(len(given), *given, *(origin for origin in origins if origin is not None)))
    return tuple(None if gradient is None else next(tied) for gradient in gradients)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "streamed vocabulary statistics have first derivatives only; use backend='dense' for a second one"
        )
