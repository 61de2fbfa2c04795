"""Running sums of per-unit metrics, reduced over micro-batches and ranks once per log."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.kernels import Certificate, record_certificates
from posttrain.reduction import sum_dtype


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


class CertificateBounds:
    """What the backwards with a gradient tolerance left out since the last log.

    Each certificate is about one micro-batch's gradient on one rank.
    """

    def __init__(self) -> None:
        self._forwards: list[list[Certificate]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Certificates of the forwards made within are kept; they come with the backward."""
        with record_certificates() as certificates:
            yield
        self._forwards.append(certificates)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Share of tokens dropped and largest bounds over all micro-batches and ranks since the last call."""
        found = [certificate for forward in self._forwards for certificate in forward]
        self._forwards.clear()
        device = accelerator.device
        dtype = sum_dtype(device)
        columns = [[float(one.rows), one.dropped, one.head_bound, one.hidden_bound] for one in found]
        table = [torch.stack([torch.as_tensor(entry).to(device, dtype) for entry in row]) for row in columns]
        mine = torch.stack([torch.zeros(4, dtype=dtype, device=device), *table])
        mine = torch.cat([mine[:, :2].sum(0), mine[:, 2:].amax(0)])
        everyone = accelerator.gather(mine[None]).tolist()
        rows, dropped, head_bounds, hidden_bounds = zip(*everyone, strict=True)
        if not sum(rows):
            return {}
        return {
            "gradient_tolerance/dropped_share": sum(dropped) / sum(rows),
            "gradient_tolerance/head_bound": max(head_bounds),
            "gradient_tolerance/hidden_bound": max(hidden_bounds),
        }
