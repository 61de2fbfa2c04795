"""Running sums of per-unit metrics, reduced over micro-batches and ranks once per log."""

import torch
from accelerate import Accelerator
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums over many tokens, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class MetricSums:
    """Sum and count of each metric, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weight: Tensor | None = None) -> None:
        """Add a metric's values: (units,), or a scalar that counts once.

        Args:
            name: as it will be logged.
            values: detached.
            weight: (units,), for a weighted mean.
        """
        values = values.detach().to(sum_dtype(values.device))
        if weight is None:
            count = torch.full_like(values.sum(), values.numel())
            total = values.sum()
        else:
            weight = weight.to(values)
            count, total = weight.sum(), (torch.where(weight > 0, values, 0) * weight).sum()
        pair = torch.stack([total, count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; a metric nothing was added to is left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name].to(accelerator.device) for name in names])
        totals = accelerator.reduce(sums, "sum").tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
