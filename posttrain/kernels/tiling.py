"""How tokens x vocabulary is cut into tiles: from shapes and the kind of device alone, so that a run repeats."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """Sizes in elements (4 bytes each in float32).

    Args:
        tile: of a logit tile; a few tiles live at once.
        rows: tokens of a tile, where the vocabulary is large.
        weight: of the converted slice of the head's weight that a tile is multiplied with.
        block: of a block of full logit rows, where rows have to stay whole.
    """

    tile: int
    rows: int
    weight: int
    block: int


# On a CPU a tile should stay in the cache between its elementwise passes; a GPU needs large tiles to be busy.
_CPU = Budget(tile=1 << 20, rows=512, weight=1 << 22, block=1 << 23)
_DEVICE = Budget(tile=1 << 25, rows=4096, weight=1 << 26, block=1 << 27)


def _budget(device: torch.device) -> Budget:
    return _CPU if device.type == "cpu" else _DEVICE


def tile_shape(tokens: int, vocab: int, width: int, device: torch.device) -> tuple[int, int]:
    """(tokens, vocabulary entries) of one logit tile."""
    budget = _budget(device)
    rows = max(1, min(tokens, max(budget.rows, budget.tile // vocab)))
    columns = max(1, min(vocab, budget.tile // rows, budget.weight // width))
    return rows, columns


def block_shape(tokens: int, vocab: int, width: int, device: torch.device) -> tuple[int, int]:
    """(tokens, vocabulary entries): how many full rows are held, and the tiles in which they are computed."""
    budget = _budget(device)
    rows = max(1, min(tokens, budget.block // vocab))
    columns = max(1, min(vocab, max(1, budget.tile // rows), budget.weight // width))
    return rows, columns


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover ``range(total)``; an empty one where there is nothing to cover.

    The empty one lets a batch without tokens take the same way, with results of the right shape and dtype.
    """
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))
