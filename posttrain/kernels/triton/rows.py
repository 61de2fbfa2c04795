"""Kernels that read tiles of logits: one program walks along one or a few rows."""

import triton
import triton.language as tl

from posttrain.kernels.triton.folding import LOWEST, PROPAGATE, collapse, empty, load_fold, merge, singles, store_fold
from posttrain.kernels.triton.mathematics import log_mixture


@triton.jit
def copy_picks(z, ids, picks, rows, here, start, columns, row_step, column_step, count, BLOCK: tl.constexpr):
    """z at those of `count` ids a row that lie in this tile; the other picks stay as they are."""
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)[None, :]
        place = rows[:, None].to(tl.int64) * count + slot
        valid = here[:, None] & (slot < count)
        local = tl.load(ids + place, mask=valid, other=-1) - start
        inside = valid & (local >= 0) & (local < columns)
        value = tl.load(z + rows[:, None].to(tl.int64) * row_step + local * column_step, mask=inside, other=0.0)
        tl.store(picks + place, value, mask=inside)


@triton.jit(do_not_specialize=["count", "start"])
def fold_rows(
    z,
    u,
    targets,
    ids,
    target_logit,
    teacher_target_logit,
    ids_logit,
    sums,
    indices,
    count,
    columns,
    start,
    row_step,
    column_step,
    teacher_row_step,
    teacher_column_step,
    ids_count,
    parts: tl.constexpr,
    PICKS: tl.constexpr,
    IDS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds a tile of z, and of the teacher's u, to the folds of its rows. PICKS: 1 of z, 2 of u, 3 of both."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    target = tl.load(targets + rows, mask=here, other=-1)
    if PICKS & 1:
        copy_picks(z, targets, target_logit, rows, here, start, columns, row_step, column_step, 1, 1)
    if PICKS & 2:
        step, across = teacher_row_step, teacher_column_step
        copy_picks(u, targets, teacher_target_logit, rows, here, start, columns, step, across, 1, 1)
    if IDS > 0:
        copy_picks(z, ids, ids_logit, rows, here, start, columns, row_step, column_step, ids_count, IDS)
    row = rows[:, None, None].to(tl.int64)
    offset = tl.arange(0, STEPS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    lanes = empty(tl.zeros((ROWS, LANES), tl.float32), parts)
    for first in range(0, columns, STEPS * LANES):
        column = first + offset
        inside = here[:, None, None] & (column < columns)
        z_tile = tl.load(z + row * row_step + column * column_step, mask=inside, other=0.0)
        u_tile = z_tile
        if parts.teacher:
            u_tile = tl.load(u + row * teacher_row_step + column * teacher_column_step, mask=inside, other=0.0)
        found = singles(z_tile, u_tile, inside, column + start, target[:, None, None], parts)
        lanes = merge(lanes, collapse(found, 1, parts), parts)
    held = load_fold(sums, indices, rows, count, here, parts)
    store_fold(merge(held, collapse(lanes, 1, parts), parts), sums, indices, rows, count, here, parts)


@triton.jit(do_not_specialize=["count"])
def mixture_rows(
    z,
    u,
    maximum,
    total,
    teacher_maximum,
    teacher_total,
    log_ratio,
    over_student,
    over_teacher,
    count,
    columns,
    row_step,
    column_step,
    teacher_row_step,
    teacher_column_step,
    beta,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds a tile's part of KL(p || m) and KL(t || m), given the maxima, totals and log of the ratio of totals."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    top = tl.load(maximum + rows, mask=here, other=0.0)[:, None, None]
    teacher_top = tl.load(teacher_maximum + rows, mask=here, other=0.0)[:, None, None]
    ratio = tl.load(log_ratio + rows, mask=here, other=0.0)[:, None, None]
    row = rows[:, None, None].to(tl.int64)
    offset = tl.arange(0, STEPS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    student_lanes = tl.zeros((ROWS, LANES), tl.float32)
    teacher_lanes = student_lanes
    for first in range(0, columns, STEPS * LANES):
        column = first + offset
        inside = here[:, None, None] & (column < columns)
        z_tile = tl.load(z + row * row_step + column * column_step, mask=inside, other=LOWEST)
        u_tile = tl.load(u + row * teacher_row_step + column * teacher_column_step, mask=inside, other=LOWEST)
        x, w = z_tile - top, u_tile - teacher_top
        e, t = tl.exp(x), tl.exp(w)
        apart = w - x - ratio
        core = log_mixture(apart, beta)
        student_lanes -= tl.sum(e * (core + tl.maximum(apart, 0.0, propagate_nan=PROPAGATE)), 1)
        teacher_lanes -= tl.sum(t * (core - tl.minimum(apart, 0.0, propagate_nan=PROPAGATE)), 1)
    of_student = tl.sum(student_lanes, 1) / tl.load(total + rows, mask=here, other=1.0)
    of_teacher = tl.sum(teacher_lanes, 1) / tl.load(teacher_total + rows, mask=here, other=1.0)
    tl.store(over_student + rows, tl.load(over_student + rows, mask=here, other=0.0) + of_student, mask=here)
    tl.store(over_teacher + rows, tl.load(over_teacher + rows, mask=here, other=0.0) + of_teacher, mask=here)
