"""What may be saved: memory for the forward's tiles, and rows of the backward."""

from math import isfinite

import psutil
import torch

# The share of all memory that "auto" may take. Of the total, not of what is free: a run repeats bit for bit.
_AUTO_SHARE = 16


def check_savings(gradient_tolerance: float, budget: int | str | None) -> None:
    """Raises a ValueError for a tolerance or budget that means nothing."""
    if not (isfinite(gradient_tolerance) and 0.0 <= gradient_tolerance < 1.0):
        raise ValueError(
            f"gradient_tolerance must lie in [0, 1), found {gradient_tolerance!r}; it is a share of the gradient's norm"
        )
    is_size = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0
    if not (budget is None or budget == "auto" or is_size):
        raise ValueError(f"budget must be a number of bytes, 'auto' or None, found {budget!r}")


def budget_bytes(budget: int | str | None, *, tokens: int, vocab: int, models: int, device: torch.device) -> int | None:
    """The budget in bytes; ``auto`` is what all logits need in float32, and at most a sixteenth of the memory."""
    if budget != "auto":
        return None if budget is None else int(budget)
    return min(4 * tokens * vocab * models, total_memory(device) // _AUTO_SHARE)


def total_memory(device: torch.device) -> int:
    """Bytes of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
