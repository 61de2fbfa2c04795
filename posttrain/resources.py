"""How long a training took and how much memory, without what it was interrupted for."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Resources:
    """A clock and a peak of memory from `start` on; both stand still within `paused`.

    On a CUDA device the peak is what torch allocated there; elsewhere it is the process's resident memory, which the
    system counts from the process's beginning on and through pauses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._peak = 0
        self._since: float | None = None

    def start(self) -> None:
        """Begin, or go on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None
            self._peak = max(self._peak, self._memory())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing within counts."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def write(self, path: Path, *, resumed: bool) -> None:
        """Write seconds (None for a training that went on from a checkpoint) and bytes as JSON."""
        found: dict[str, Any] = {
            "train_seconds": None if resumed else self._seconds,
            "peak_memory_bytes": self._peak,
            "memory": "allocated on the device" if self._device.type == "cuda" else "resident",
        }
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            import resource
        except ImportError:  # Windows has no such count; what is resident now comes nearest
            import psutil

            return int(psutil.Process().memory_info().rss)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
