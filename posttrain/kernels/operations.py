"""Where backends differ: what collects the sums of some tokens, and what makes gradients of a tile of logits."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import Coefficients, TileGradient
from posttrain.kernels.head import LMHead
from posttrain.kernels.projection import Projection, Settings

# (z, the teacher's z, first vocabulary entry) -> dz before the softcap; both tiles may be overwritten.
MakesGradient = Callable[[Tensor, Tensor | None, int], Float[Tensor, "rows columns"]]


def new_accumulator(query: Query, dtype: torch.dtype) -> BlockAccumulator:
    """What collects the sums of tiles of `dtype`."""
    if query.backend != "triton":
        return BlockAccumulator(query, dtype)
    from posttrain.kernels import triton

    return triton.make_accumulator(query, dtype)


def fusible_head(student: Projection, query: Query) -> LMHead | None:
    """The head, if products are better fused with what follows them; None where the library's products are."""
    tensors, settings = student.tensors, student.settings
    if query.backend != "triton" or settings.result != torch.float32 or settings.shard is not None:
        return None
    from posttrain.kernels import triton

    if not triton.fused_forward_is_better(tensors.hidden.device, tensors.hidden.dtype, student.width):
        return None
    from posttrain.kernels.triton.fused import can_fold_products

    low_rank = None if tensors.hidden2 is None or tensors.matrix is None else (tensors.hidden2, tensors.matrix)
    head = LMHead(tensors.weight, tensors.bias, settings.scale, settings.softcap, low_rank)
    is_fusible = settings.operand == tensors.hidden.dtype and can_fold_products(query, tensors.hidden, head)
    return head if is_fusible else None


def fused_forward(student: Projection, query: Query) -> State | None:
    """The state of all tokens without any tile in memory; None where tiles by the library's products are better."""
    head = fusible_head(student, query)
    if head is None:
        return None
    from posttrain.kernels.triton.fused import fold_of_products

    return fold_of_products(student.tensors.hidden, head, query)


def fused_gradient(
    tile_gradient: MakesGradient, hidden: Tensor, head: LMHead, rows: slice, columns: slice
) -> Float[Tensor, "rows columns"]:
    """dz of a tile whose logits are never in memory; `head` is what `fusible_head` found."""
    from posttrain.kernels.triton.coefficients import TritonTileGradient
    from posttrain.kernels.triton.fused import gradient_of_products

    assert isinstance(tile_gradient, TritonTileGradient)
    part = replace(
        head,
        weight=head.weight[columns],
        bias=None if head.bias is None else head.bias[columns],
        low_rank=None if head.low_rank is None else (head.low_rank[0][rows], head.low_rank[1][columns]),
    )
    return gradient_of_products(tile_gradient, hidden[rows], part, columns.start)


def new_tile_gradient(
    found: Coefficients, state: State, query: Query, rows: slice, settings: Settings
) -> MakesGradient:
    """What turns the tiles of some tokens into dz, the softcap's slope included."""
    softcap, temperature = settings.softcap, settings.temperature
    if query.backend != "triton":
        return TileGradient(found, state, query.jsd_beta, rows, softcap=softcap, temperature=temperature)
    from posttrain.kernels import triton

    return triton.make_tile_gradient(
        found,
        state,
        query.jsd_beta,
        rows,
        dtype=settings.result,
        softcap=softcap,
        temperature=temperature,
        out_dtype=None if settings.product == settings.result else settings.product,
    )
