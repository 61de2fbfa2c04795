"""Noise on the adapters, for as long as a check runs: a fresh LoRA has B = 0, and would hide being ignored."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# A few rows show as much as all of them, and cost nothing to keep a copy of.
_ROWS = 64
_HEAD_NOISE = 0.1
_BODY_NOISE = 0.01


@contextmanager
def perturbed_adapters(model: nn.Module, head: nn.Module, seed: int = 0) -> Iterator[int]:
    """Adds seeded noise to the adapters' output side (``lora_B`` and copies in ``modules_to_save``); yields how many.

    The parameters are restored bit for bit, also when the body raises. The global generators are not touched. Every
    rank has to enter it.
    """
    of_head = {id(parameter) for parameter in head.parameters()}
    chosen = [(name, p) for name, p in model.named_parameters() if _is_output_side(name, id(p) in of_head)]
    saved: list[Tensor] = []
    _reshard(model)
    try:
        for number, (_, parameter) in enumerate(chosen):
            with _writable(parameter) as rows:
                saved.append(rows.clone())
                rows.add_(_noise(rows, _HEAD_NOISE if id(parameter) in of_head else _BODY_NOISE, seed + number))
        yield len(chosen)
    finally:
        for (_, parameter), rows_before in zip(chosen, saved, strict=False):
            with _writable(parameter) as rows:
                rows.copy_(rows_before)
        _reshard(model)


def _is_output_side(name: str, on_head: bool) -> bool:
    parts = name.split(".")
    return "lora_B" in parts or "lora_embedding_B" in parts or (on_head and "modules_to_save" in parts)


@contextmanager
def _writable(parameter: Tensor) -> Iterator[Tensor]:
    """The first rows of what this rank holds; under ZeRO-3 of the whole, where rank 0's change reaches everyone."""
    gathered: AbstractContextManager[None] = nullcontext()
    if hasattr(parameter, "ds_status"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    with torch.no_grad(), gathered:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        yield local[:_ROWS]


def _noise(rows: Tensor, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows.shape, generator=generator) * scale).to(device=rows.device, dtype=rows.dtype)


def _reshard(model: nn.Module) -> None:
    """Drops full copies that FSDP2 keeps between forwards, so that the next forward reads the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
