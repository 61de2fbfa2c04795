"""Where backends differ: what collects the sums of some tokens, and what makes gradients of a tile of logits."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import Coefficients, TileGradient
from posttrain.kernels.projection import Settings

# (z, the teacher's z, first vocabulary entry) -> dz before the softcap; both tiles may be overwritten.
MakesGradient = Callable[[Tensor, Tensor | None, int], Float[Tensor, "rows columns"]]


def new_accumulator(query: Query, dtype: torch.dtype) -> BlockAccumulator:
    """What collects the sums of tiles of `dtype`."""
    if query.backend != "triton":
        return BlockAccumulator(query, dtype)
    from posttrain.kernels import triton

    return triton.make_accumulator(query, dtype)


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
