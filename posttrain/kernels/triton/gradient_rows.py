"""Kernels that turn tiles of logits into tiles of dz."""

from typing import NamedTuple

import triton
import triton.language as tl

from posttrain.kernels.triton.folding import PROPAGATE
from posttrain.kernels.triton.mathematics import log_mixture

# Below it x counts as -inf; its square is still finite, so that a weight of zero silences it.
FLOOR = tl.constexpr(-1e18)


class Terms(NamedTuple):
    """Which terms of dz there are (see `coefficients.Coefficients`), known when a kernel is compiled.

    Args:
        singles: how many values are added at one id each.
        capped: whether dz is multiplied with the slope of the softcap.
    """

    softmax: bool = False
    linear: bool = False
    quadratic: bool = False
    square: bool = False
    constant: bool = False
    logit: bool = False
    teacher: bool = False
    reverse: bool = False
    mixture: bool = False
    singles: int = 0
    capped: bool = False


class Factors(NamedTuple):
    """Numbers of each token, in memory (slots, tokens) in this order; those that no term needs are not read."""

    softmax: tl.tensor
    linear: tl.tensor
    quadratic: tl.tensor
    square: tl.tensor
    constant: tl.tensor
    logit: tl.tensor
    teacher: tl.tensor
    reverse: tl.tensor
    mixture: tl.tensor
    maximum: tl.tensor
    mean: tl.tensor
    teacher_maximum: tl.tensor
    reverse_difference: tl.tensor
    log_ratio: tl.tensor
    mixture_student: tl.tensor


@triton.jit
def _slot(factors, slot: tl.constexpr, stride, rows, here, on: tl.constexpr):
    value = tl.zeros(rows.shape, tl.float32)
    if on:
        value = tl.load(factors + slot * stride + rows, mask=here, other=0.0)
    return value


@triton.jit
def load_factors(factors, stride, rows, here, terms: tl.constexpr):
    """The numbers that the terms need of these tokens, in the shape of `rows`, else zero."""
    return Factors(
        _slot(factors, 0, stride, rows, here, terms.softmax),
        _slot(factors, 1, stride, rows, here, terms.linear),
        _slot(factors, 2, stride, rows, here, terms.quadratic),
        _slot(factors, 3, stride, rows, here, terms.square),
        _slot(factors, 4, stride, rows, here, terms.constant),
        _slot(factors, 5, stride, rows, here, terms.logit),
        _slot(factors, 6, stride, rows, here, terms.teacher),
        _slot(factors, 7, stride, rows, here, terms.reverse),
        _slot(factors, 8, stride, rows, here, terms.mixture),
        _slot(factors, 9, stride, rows, here, True),
        _slot(factors, 10, stride, rows, here, terms.linear),
        _slot(factors, 11, stride, rows, here, terms.teacher or terms.reverse or terms.mixture),
        _slot(factors, 12, stride, rows, here, terms.reverse),
        _slot(factors, 13, stride, rows, here, terms.mixture),
        _slot(factors, 14, stride, rows, here, terms.mixture),
    )


@triton.jit
def gradient_of(z, u, column, f, ids, values, rows, here, slope, beta, terms: tl.constexpr):
    """dz of some logits. `column` counts from entry 0, `slope` is temperature / softcap."""
    factor = f.softmax + tl.zeros_like(z)
    x = tl.maximum(z - f.maximum, FLOOR, propagate_nan=PROPAGATE)
    w = tl.maximum(u - f.teacher_maximum, FLOOR, propagate_nan=PROPAGATE)
    if terms.linear:
        y = x - f.mean
        factor += y * (f.linear + f.quadratic * y)
    if terms.square:
        factor += f.square * tl.exp(x)
    if terms.reverse:
        factor -= f.reverse * (w - x + f.reverse_difference)
    if terms.mixture:
        apart = w - x - f.log_ratio
        over_student = log_mixture(apart, beta) + tl.maximum(apart, 0.0, propagate_nan=PROPAGATE)
        factor -= f.mixture * (over_student + f.mixture_student)
    dz = tl.zeros_like(z)
    if terms.softmax or terms.linear or terms.square or terms.reverse or terms.mixture:
        dz = tl.exp(x) * factor
    if terms.teacher:
        dz += f.teacher * tl.exp(w)
    if terms.constant:
        dz += f.constant
    if terms.logit:
        dz += f.logit * z
    singles: tl.constexpr = terms.singles
    for single in tl.static_range(singles):
        place = rows * singles + single
        picked = column == tl.load(ids + place, mask=here, other=-1)
        dz += tl.where(picked, tl.load(values + place, mask=here, other=0.0), 0.0)
    if terms.capped:
        capped = z * slope
        dz *= 1.0 - capped * capped
    return dz


@triton.jit(do_not_specialize=["count", "start"])
def gradient_rows(
    z,
    u,
    dz,
    factors,
    ids,
    values,
    count,
    columns,
    start,
    row_step,
    column_step,
    teacher_row_step,
    teacher_column_step,
    out_row_step,
    out_column_step,
    slope,
    beta,
    terms: tl.constexpr,
    READS: tl.constexpr,
    READS_TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """dz of a tile, which may take the place of z. READS: whether z matters."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    here = rows < count
    found = load_factors(factors, count, rows, here, terms)
    row = rows.to(tl.int64)
    for first in range(0, columns, STEPS * LANES):
        column = first + tl.arange(0, STEPS * LANES)[None, :]
        inside = here & (column < columns)
        z_tile = tl.zeros((ROWS, STEPS * LANES), tl.float32)
        if READS:
            z_tile = tl.load(z + row * row_step + column * column_step, mask=inside, other=0.0)
            z_tile = tl.where(inside, z_tile, found.maximum)
        u_tile = z_tile
        if READS_TEACHER:
            u_tile = tl.load(u + row * teacher_row_step + column * teacher_column_step, mask=inside, other=0.0)
            u_tile = tl.where(inside, u_tile, found.teacher_maximum)
        tile = gradient_of(z_tile, u_tile, column + start, found, ids, values, rows, here, slope, beta, terms)
        place = dz + row * out_row_step + column * out_column_step
        tl.store(place, tile.to(dz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "start"])
def add_at_ids(
    dz,
    ids,
    values,
    count,
    columns,
    start,
    row_step,
    column_step,
    ids_count,
    ids_row_step,
    ids_column_step,
    values_row_step,
    values_column_step,
    ROWS: tl.constexpr,
):
    """Adds values at ids of this tile. A thread has its rows to itself and adds at equal ids one after the other."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    row = rows.to(tl.int64)
    for slot in range(0, ids_count):
        local = tl.load(ids + row * ids_row_step + slot * ids_column_step, mask=here, other=-1) - start
        inside = here & (local >= 0) & (local < columns)
        value = tl.load(values + row * values_row_step + slot * values_column_step, mask=inside, other=0.0)
        place = dz + row * row_step + local * column_step
        tl.store(place, tl.load(place, mask=inside, other=0.0) + value, mask=inside)
