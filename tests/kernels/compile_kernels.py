"""Compiles every Triton kernel for Hopper as its launcher would, on any machine, and prints what came out as JSON.

A driver stands in for CUDA's: it names the target, and launches stop short of the launch. Run without TRITON_INTERPRET.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from posttrain.kernels import DETACHED, STATISTICS, LMHead
from posttrain.kernels.checks import Query, check_query
from posttrain.kernels.coefficients import Coefficients, coefficients
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.kernels.triton import blocks, fused
from posttrain.kernels.triton.accumulation import TritonAccumulator
from posttrain.kernels.triton.coefficients import TritonTileGradient

TOKENS, VOCAB, WIDTH = 4, 4096, 1024
FUSIBLE = tuple(name for name in STATISTICS if name not in TEACHER_STATISTICS | {"ids_logp", "topk_logp", "topk_ids"})
IDS = torch.zeros(TOKENS, 3, dtype=torch.int64)


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def record_launches(found: list[dict[str, Any]]) -> None:
    """From here on kernels are compiled, not launched."""
    driver.set_active(Hopper())
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        ptx = compiled.asm["ptx"]
        found.append(
            {
                "kernel": self.fn.__name__,
                "case": case,
                "target": ptx.split(".target", 1)[1].split()[0],
                "machine code": len(compiled.asm["cubin"]),
                "tensor cores": "wgmma.mma_async" in ptx,
                "tf32": "tf32" in ptx,
                "wide loads": "v4" in ptx,
                "exchanges": ptx.count("shfl.sync"),
            }
        )

    JITFunction.run = compile_only


def incoming(query: Query) -> dict[str, torch.Tensor]:
    shapes = {"ids_logp": (3,), "topk_logp": (2,)}
    return {name: torch.zeros(TOKENS, *shapes.get(name, ())) for name in query.needed if name not in DETACHED}


def tiles(wanted: tuple[str, ...], out_dtype: torch.dtype | None, softcap: float | None) -> None:
    hidden, head = torch.zeros(TOKENS, 1), LMHead(torch.zeros(VOCAB, 1))
    query = check_query(hidden, head, IDS[:, 0], wanted, ids=IDS, k=2, teacher=(hidden, head))
    z = torch.zeros(TOKENS, VOCAB)
    accumulator = TritonAccumulator(query, torch.float32)
    accumulator.update(z, z, 0)
    if "jsd" in query.needed:
        accumulator.update_mixture(z, z)
    state = accumulator.state()
    found: Coefficients = coefficients(incoming(query), state, query, VOCAB)
    TritonTileGradient(found, state, 0.5, slice(None), softcap=softcap, out_dtype=out_dtype)(z, z, 0)


def products(wanted: tuple[str, ...], dtype: torch.dtype, softcap: float | None) -> None:
    hidden = torch.zeros(TOKENS, WIDTH, dtype=dtype)
    head = LMHead(torch.zeros(VOCAB, WIDTH, dtype=dtype), softcap=softcap)
    if softcap is not None:
        low_rank = torch.zeros(TOKENS, 8, dtype=dtype), torch.zeros(VOCAB, 8, dtype=dtype)
        head = LMHead(head.weight, torch.zeros(VOCAB, dtype=dtype), 0.5, softcap, low_rank)
    query = check_query(hidden, head, IDS[:, 0], wanted)
    state = fused.fold_of_products(hidden, head, query)
    found = coefficients(incoming(query), state, query, VOCAB)
    gradient = TritonTileGradient(found, state, 0.5, slice(None), softcap=softcap, out_dtype=dtype)
    fused.gradient_of_products(gradient, hidden, head, 0)


if __name__ == "__main__":
    compiled: list[dict[str, Any]] = []
    record_launches(compiled)
    fused.product_blocks = lambda device, dtype, rich: blocks._PRODUCTS[dtype.itemsize, rich, True]
    case = "logp"
    tiles(("logp",), torch.float16, None)
    case = "all"
    tiles(STATISTICS, torch.bfloat16, 30.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        case = str(dtype).removeprefix("torch.")
        products(("logp",), dtype, None)
    case = "bfloat16, all"
    products(FUSIBLE, torch.bfloat16, 30.0)
    print(json.dumps(compiled))
