"""Block sizes, committed rather than searched for at run time, so that a run repeats.

None has been timed. They are the largest with which the kernels, compiled for Hopper, keep to their registers.
"""

from typing import NamedTuple

import torch


class RowBlocks(NamedTuple):
    """How a program of an elementwise kernel walks over its rows: `rows` x (`steps` * `lanes`) logits at a time.

    A lane keeps sums of its own until the row ends, so that nothing is exchanged between threads on the way.
    """

    rows: int
    steps: int
    lanes: int
    warps: int


class ProductBlocks(NamedTuple):
    """Tile of a matrix product: tokens x vocabulary entries, `width` of the inner dimension at a time."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


# Four logits a thread and step are one 16-byte load.
_LANES, _WARPS = 512, 4

# (operand bytes, rich, Hopper or later) -> tile. Rich are kernels that hold more of each logit than a softmax needs:
# with larger tiles they would run out of registers. Products of float32 operands are exact, hence without tensor cores.
_PRODUCTS = {
    (2, False, False): ProductBlocks(128, 128, 32, 8, 3),
    (2, True, False): ProductBlocks(64, 64, 32, 4, 3),
    (2, False, True): ProductBlocks(128, 128, 64, 8, 3),
    (2, True, True): ProductBlocks(128, 64, 64, 8, 3),
    (4, False, False): ProductBlocks(64, 64, 16, 4, 2),
    (4, True, False): ProductBlocks(64, 64, 16, 4, 2),
    (4, False, True): ProductBlocks(64, 64, 32, 4, 2),
    (4, True, True): ProductBlocks(64, 64, 32, 4, 2),
}


def next_power(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


def row_blocks(columns: int, steps: int) -> RowBlocks:
    """For tiles with this many columns, with up to `steps` loads in flight; short rows share a program."""
    lanes = min(_LANES, next_power(columns))
    steps = min(steps, next_power(-(-columns // lanes)))
    return RowBlocks(max(1, min(8, _LANES // (lanes * steps))), steps, lanes, _WARPS)


def product_blocks(device: torch.device, dtype: torch.dtype, rich: bool) -> ProductBlocks:
    """For operands of this dtype."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return _PRODUCTS[dtype.itemsize, rich, hopper]


def fused_forward_is_better(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the fused product beats the library's product followed by one pass over its tile.

    Not measured. The tile costs 8 bytes a logit to write and read, against 2 * width operations to form it: the wider,
    the less it weighs, while the library's product runs at a higher rate. In float32 the product rules at any width.
    """
    return device.type == "cuda" and dtype.itemsize == 2 and width < 1024
