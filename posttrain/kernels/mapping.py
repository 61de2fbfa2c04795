"""Any function of full logit rows, for research code that needs something the table does not have."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.kernels.checks import check_head, check_per_token
from posttrain.kernels.coefficients import softcap_slope
from posttrain.kernels.first_order import first_order
from posttrain.kernels.gradients import Gradients
from posttrain.kernels.head import LMHead
from posttrain.kernels.projection import HeadTensors, Projection, Settings, autocast_off
from posttrain.kernels.tiling import block_shape, slices

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def map_logits(
    fn: Callable[..., Result],
    hidden: Float[Tensor, "tokens width"],
    head: LMHead,
    *per_token: Tensor,
    temperature: float = 1.0,
) -> Result:
    """``fn(z, *per_token)`` over blocks of tokens, with full rows of logits; recomputed in the backward.

    Only the logits of one block exist at a time, in the forward and in the backward. `fn` may draw random numbers (the
    recomputation sees the same ones) and may use parameters of its own; they get their gradients. First derivatives
    only.

    Args:
        fn: takes z (block, vocab), float32 or float64, and the blocks of `per_token`; returns a tensor or a tuple of
            tensors with leading dimension block. A token's result must depend on that token alone.
        hidden: (tokens, width); the gradient reaches it, the head's tensors and `per_token`.
        head: see `LMHead`.
        per_token: tensors with leading dimension tokens.
        temperature: divides the logits, > 0.

    Returns:
        What `fn` returns, for all tokens.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `fn` returns something else than one entry per token.
    """
    check_head(hidden, head, temperature)
    check_per_token(hidden, *per_token)
    if head.shard is not None:
        raise ValueError("map_logits needs full rows of logits, and this head is spread over processes")
    settings = Settings.of(hidden, head, temperature)
    vocab, width = head.weight.shape
    size = block_shape(hidden.shape[0], vocab, width, hidden.device)[0]
    _, weight, bias, hidden2, matrix = HeadTensors.of(hidden, head)

    def block(hidden: Tensor, hidden2: Tensor | None, *per_token: Tensor) -> Result:
        z_NV = _BlockLogits.apply(settings, hidden, weight, bias, hidden2, matrix)
        return _checked(fn(z_NV, *per_token), hidden.shape[0])

    hidden_blocks = hidden.split(size)
    hidden2_blocks = [None] * len(hidden_blocks) if hidden2 is None else hidden2.split(size)
    others = (tensor.split(size) for tensor in per_token)
    results: list[Any] = []
    for arguments in zip(hidden_blocks, hidden2_blocks, *others, strict=True):
        if torch.is_grad_enabled():
            results.append(checkpoint(block, *arguments, use_reentrant=False))
        else:
            results.append(block(*arguments))
    if isinstance(results[0], tuple):
        joined: Any = tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    else:
        joined = torch.cat(results)
    return joined


def _checked(result: Result, tokens: int) -> Result:
    for part in result if isinstance(result, tuple) else (result,):
        if part.ndim == 0 or part.shape[0] != tokens:
            raise ValueError(
                f"fn must return tensors with one entry per token of its block ({tokens}), found shape "
                f"{tuple(part.shape)}"
            )
    return result


class _BlockLogits(torch.autograd.Function):
    """(settings, hidden, weight, bias, hidden2, matrix) -> z of a block, converting the head slice by slice."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden2: Tensor | None,
        matrix: Tensor | None,
    ) -> Tensor:
        tensors = HeadTensors(hidden, weight, bias, hidden2, matrix)
        projection = Projection(tensors, settings)
        device = hidden.device
        _, ctx.columns_size = block_shape(projection.tokens, projection.vocab, projection.width, device)
        ctx.settings = settings
        rows = projection.rows(slice(None))
        z_NV = torch.empty((projection.tokens, projection.vocab), dtype=settings.result, device=device)
        with autocast_off(device):
            for columns in slices(projection.vocab, ctx.columns_size):
                projection.logits(rows, projection.columns(columns), out=z_NV[:, columns])
        ctx.save_for_backward(*tensors, *(() if settings.softcap is None else (z_NV,)))
        return z_NV

    @staticmethod
    def backward(ctx: Any, incoming_NV: Tensor) -> tuple[Tensor | None, ...]:
        count = len(HeadTensors._fields)
        # Read once: under activation checkpointing each saved tensor may be unpacked a single time.
        unpacked = ctx.saved_tensors
        tensors, kept = unpacked[:count], unpacked[count:]
        projection = Projection(HeadTensors(*tensors), ctx.settings)
        with torch.no_grad(), autocast_off(incoming_NV.device):
            gradients = Gradients(projection, ctx.needs_input_grad[1:], whole_weight=False)
            rows = projection.rows(slice(None))
            for columns in slices(projection.vocab, ctx.columns_size):
                dz_NV = incoming_NV[:, columns]
                if ctx.settings.softcap is not None:
                    cap, temperature = ctx.settings.softcap, ctx.settings.temperature
                    dz_NV = softcap_slope(kept[0][:, columns], cap, temperature).mul_(dz_NV)
                gradients.open(columns)
                gradients.add(dz_NV, rows, projection.columns(columns), gradients.rows(slice(None)), columns)
                gradients.close(columns)
        return None, *first_order(gradients.finish(), (*tensors, incoming_NV))
