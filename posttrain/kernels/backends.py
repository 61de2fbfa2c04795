"""Which backend answers a query."""

import torch

from posttrain.kernels.table import nearest

BACKENDS = ("auto", "dense", "streamed", "triton")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that ``auto`` stands for on this device, or the named one.

    Raises:
        ValueError: there is none of this name, or it cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; {nearest(backend, BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _triton_unavailable(device) is None else "streamed"
    if backend == "triton" and (reason := _triton_unavailable(device)) is not None:
        raise ValueError(f"backend 'triton' cannot run here: {reason}; take backend 'streamed', which runs anywhere")
    return backend


def _triton_unavailable(device: torch.device) -> str | None:
    # Not before it is asked for: most machines have no triton.
    from posttrain.kernels import triton

    return triton.unavailable(device)
