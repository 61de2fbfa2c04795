"""How tokens x vocabulary is cut into tiles: from shapes and the kind of device alone, so that a run repeats."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes in elements (4 bytes each in float32).

    Args:
        tile: of a logit tile; a few tiles live at once.
        rows: most tokens of a tile.
        columns: most vocabulary entries of a tile.
        weight: of the slice of the head's weight that a tile is multiplied with.
        block: of a block of full logit rows, where rows have to stay whole.
    """

    tile: int
    rows: int
    columns: int
    weight: int
    block: int


# On a CPU a tile should stay in the second-level caches between its elementwise passes, and matrix products of 512 to
# 1024 rows and columns run at the library's full rate; a GPU needs large tiles to be busy. A CPU's block of 125 MB is
# what the promise of 128 MB in all leaves; a GPU's of 512 MiB keeps the sums of the head's gradient from being read and
# written once for every few rows.
_CPU = Sizes(tile=1 << 19, rows=1024, columns=2048, weight=1 << 21, block=31_200_000)
_DEVICE = Sizes(tile=1 << 23, rows=4096, columns=1 << 15, weight=1 << 23, block=1 << 27)


def _sizes(device: torch.device) -> Sizes:
    return _CPU if device.type == "cpu" else _DEVICE


def tile_shape(tokens: int, vocab: int, width: int, device: torch.device) -> tuple[int, int]:
    """(tokens, vocabulary entries) of one logit tile."""
    sizes = _sizes(device)
    rows = _even(tokens, sizes.rows)
    return rows, _columns(rows, vocab, width, sizes)


def block_shape(
    tokens: int, vocab: int, width: int, device: torch.device, *, models: int = 1, budget: int | None = None
) -> tuple[int, int]:
    """(tokens, vocabulary entries): how many full rows are held, and the tiles in which they are computed.

    Args:
        tokens, vocab, width, device: of the problem.
        models: how many models' rows are held side by side.
        budget: bytes for the rows, though never fewer than 16 of them; None takes the device's default.
    """
    sizes = _sizes(device)
    least, elements = (1, sizes.block) if budget is None else (16, budget // 4)
    rows = _even(tokens, max(least, min(sizes.rows, elements // (vocab * models))))
    return rows, _columns(rows, vocab, width, sizes)


def _columns(rows: int, vocab: int, width: int, sizes: Sizes) -> int:
    return max(1, min(vocab, sizes.columns, sizes.tile // rows, sizes.weight // max(width, 1)))


def _even(total: int, most: int) -> int:
    """The size of equal parts, none larger than `most`: a small last part would waste a product."""
    parts = -(-total // most)
    return max(1, -(-total // max(parts, 1)))


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover ``range(total)``; an empty one where there is nothing to cover.

    The empty one lets a batch without tokens take the same way, with results of the right shape and dtype.
    """
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))


class Workspace:
    """Memory for one tile at a time: fresh pages for every tile would cost a CPU more than the arithmetic on them."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(elements, dtype=dtype, device=device)

    def tile(self, rows: int, columns: int, start: int = 0) -> torch.Tensor:
        """(rows, columns) from element `start` on; holds whatever was there.

        On a CPU a token's logits lie apart and an entry's together: products of few tokens with many entries are a
        tenth faster in that order.
        """
        memory = self.memory[start : start + rows * columns]
        return memory.view(columns, rows).T if memory.device.type == "cpu" else memory.view(rows, columns)
