"""Kernels that form a tile of logits and use it at once, so that it never reaches global memory."""

from typing import NamedTuple

import triton
import triton.language as tl

from posttrain.kernels.triton.folding import collapse, empty, load_fold, merge, singles, store_fold
from posttrain.kernels.triton.gradient_rows import gradient_of, load_factors
from posttrain.kernels.triton.mathematics import tanh


class Form(NamedTuple):
    """What the logits are made of, known when a kernel is compiled.

    Args:
        bias, low_rank, capped: whether there are such.
        widen: operands are widened before they are multiplied, for the interpreter, which cannot multiply bfloat16.
    """

    bias: bool
    low_rank: bool
    capped: bool
    widen: bool


class Operands(NamedTuple):
    """Tensors and strides of hidden states and head; hidden2 and matrix repeat hidden and weight if there are none."""

    hidden: tl.tensor
    weight: tl.tensor
    bias: tl.tensor
    hidden2: tl.tensor
    matrix: tl.tensor
    hidden_step: tl.tensor
    weight_step: tl.tensor
    hidden2_step: tl.tensor
    matrix_step: tl.tensor
    width: tl.tensor
    rank: tl.tensor
    before: tl.tensor
    after: tl.tensor


@triton.jit
def _add_product(
    total, left, right, rows, columns, left_step, right_step, width, DEPTH: tl.constexpr, WIDEN: tl.constexpr
):
    """total + left[rows] @ right[columns].T, both with unit stride along their `width`."""
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        inside = depth < width
        a = tl.load(left + rows[:, None].to(tl.int64) * left_step + depth[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(
            right + columns[None, :].to(tl.int64) * right_step + depth[:, None], mask=inside[:, None], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _logits(o, rows, columns, form: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """z of valid rows and columns; `before` and `after` are its factors on either side of the tanh (or together)."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    z = _add_product(z, o.hidden, o.weight, rows, columns, o.hidden_step, o.weight_step, o.width, DEPTH, form.widen)
    if form.low_rank:
        z = _add_product(z, o.hidden2, o.matrix, rows, columns, o.hidden2_step, o.matrix_step, o.rank, 16, form.widen)
    if form.bias:
        z += tl.load(o.bias + columns).to(tl.float32)[None, :]
    z *= o.before
    if form.capped:
        z = tanh(z) * o.after
    return z


@triton.jit(do_not_specialize=["count"])
def fold_products(
    operands,
    targets,
    target_logit,
    sums,
    indices,
    count,
    vocab,
    tiles_per_split,
    parts: tl.constexpr,
    form: tl.constexpr,
    PICKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Folds of some tokens over one split of the vocabulary, into (splits, tokens)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    # Beyond the ends the last row and column are computed again, which spares the products a mask.
    valid_rows = tl.minimum(rows, count - 1)
    target = tl.load(targets + valid_rows)
    split = tl.program_id(1)
    fold = empty(tl.zeros((ROWS,), tl.float32), parts)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        z = _logits(operands, valid_rows, tl.minimum(columns, vocab - 1), form, ROWS, COLUMNS, DEPTH)
        inside = here[:, None] & (columns < vocab)[None, :]
        column = tl.broadcast_to(columns[None, :], (ROWS, COLUMNS))
        if PICKS:
            picked = tl.sum(tl.where(column == target[:, None], z, 0.0), 1)
            has_target = here & (target >= tile * COLUMNS) & (target < tl.minimum((tile + 1) * COLUMNS, vocab))
            tl.store(target_logit + rows, picked, mask=has_target)
        fold = merge(fold, collapse(singles(z, z, inside, column, target[:, None], parts), 1, parts), parts)
    place = split.to(tl.int64) * count + rows
    store_fold(fold, sums, indices, place, tl.num_programs(1).to(tl.int64) * count, here, parts)


@triton.jit(do_not_specialize=["count", "splits"])
def join_splits(
    sums, indices, joined, joined_indices, count, splits, parts: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr
):
    """Folds (splits, tokens) joined to folds (tokens,)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    split = tl.arange(0, SPLITS)[None, :]
    place = split.to(tl.int64) * count + rows[:, None]
    stride = splits.to(tl.int64) * count
    folds = load_fold(sums, indices, place, stride, here[:, None] & (split < splits), parts)
    store_fold(collapse(folds, 1, parts), joined, joined_indices, rows, count, here, parts)


@triton.jit(do_not_specialize=["count", "start"])
def gradient_products(
    operands,
    dz,
    factors,
    ids,
    values,
    count,
    columns,
    start,
    out_row_step,
    slope,
    terms: tl.constexpr,
    form: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dz of a tile, from the operands of its logits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the ends the last row and column are computed again.
    rows = tl.minimum(row, count - 1)[:, None]
    z = _logits(operands, tl.minimum(row, count - 1), tl.minimum(column, columns - 1), form, ROWS, COLUMNS, DEPTH)
    here = rows < count
    found = load_factors(factors, count, rows, here, terms)
    tile = gradient_of(z, z, column[None, :] + start, found, ids, values, rows, here, slope, 0.5, terms)
    place = dz + rows.to(tl.int64) * out_row_step + column[None, :]
    tl.store(place, tile.to(dz.dtype.element_ty), mask=(row < count)[:, None] & (column < columns)[None, :])
