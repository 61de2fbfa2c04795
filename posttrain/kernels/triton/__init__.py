"""Triton kernels for the loops over vocabulary tiles. Importing this does not import triton; using it does."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import Coefficients, TileGradient
from posttrain.kernels.triton.blocks import fused_forward_is_better

if TYPE_CHECKING:
    from posttrain.kernels.triton.coefficients import TritonTileGradient

__all__ = ["fused_forward_is_better", "make_accumulator", "make_tile_gradient", "unavailable"]

_OLDEST_GPU = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, in half a sentence; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "it needs a CUDA device (or TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return "it needs a GPU of compute capability 8.0 or higher"
    return None


def make_accumulator(query: Query, dtype: torch.dtype) -> BlockAccumulator:
    """What collects the sums of tiles of this dtype; float64 stays with torch."""
    if dtype != torch.float32:
        return BlockAccumulator(query, dtype)
    from posttrain.kernels.triton.accumulation import TritonAccumulator

    return TritonAccumulator(query, dtype)


def make_tile_gradient(
    result: Coefficients,
    state: State,
    jsd_beta: float,
    rows: slice,
    *,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    temperature: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> "TritonTileGradient | TileGradient":
    """What turns tiles of z of `dtype` into tiles of dz, in `out_dtype` unless None; float64 stays with torch."""
    if dtype != torch.float32:
        assert out_dtype in (None, dtype)
        return TileGradient(result, state, jsd_beta, rows, softcap=softcap, temperature=temperature)
    from posttrain.kernels.triton.coefficients import TritonTileGradient

    return TritonTileGradient(
        result, state, jsd_beta, rows, softcap=softcap, temperature=temperature, out_dtype=out_dtype
    )
