"""The sums of `accumulation` as Triton sees them: one algebra, `collapse`, from single logits up to whole rows.

A `Fold` holds what is known about a set of vocabulary entries. `singles` makes a set of every logit, `collapse` joins
all sets along an axis, `merge` joins two. Lanes of a row, tiles of a row and splits of the vocabulary are all joined
by `collapse`, in an order that the shapes alone decide, so that a run repeats bit for bit. A field that is switched off
repeats the maximum, which the compiler drops.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Stands for "no logit yet": differences of such numbers stay finite, and their exponential is zero.
LOWEST = tl.constexpr(-1e38)
NOWHERE = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(1.1754944e-38)
PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)


class Parts(NamedTuple):
    """What to collect, known when a kernel is compiled."""

    softmax: bool = False
    mean: bool = False
    variance: bool = False
    squares: bool = False
    place: bool = False
    other: bool = False
    sum: bool = False
    sum_square: bool = False
    teacher: bool = False
    teacher_mean: bool = False
    forward: bool = False
    reverse: bool = False


class Softmax(NamedTuple):
    """maximum m, total sum e^x with x = z - m, mean of x, spread sum e^x (x - mean)^2, squares sum e^(2x)."""

    maximum: tl.tensor
    total: tl.tensor
    mean: tl.tensor
    spread: tl.tensor
    squares: tl.tensor


class Plain(NamedTuple):
    """First index of the maximum, the largest logit but the target's and its index, sums, and how many are nan."""

    index: tl.tensor
    other: tl.tensor
    other_index: tl.tensor
    sum: tl.tensor
    sum_square: tl.tensor
    invalid: tl.tensor


class Fold(NamedTuple):
    """Everything about sets of vocabulary entries; forward is sum t (w - x), reverse sum e^x (x - w)."""

    student: Softmax
    plain: Plain
    teacher: Softmax
    forward: tl.tensor
    reverse: tl.tensor


@triton.jit
def _single(z, inside):
    # A token that is ruled out has z = -inf, of which no difference may be taken.
    maximum = tl.where(inside, tl.maximum(z, LOWEST, propagate_nan=PROPAGATE), LOWEST)
    count = tl.where(inside, 1.0, tl.zeros_like(z))
    zero = tl.zeros_like(z)
    return Softmax(maximum, count, zero, zero, count)


@triton.jit
def singles(z, u, inside, columns, target, parts: tl.constexpr):
    """Every logit as a set of its own, an empty one where not `inside`; `columns` and `target` count from entry 0."""
    student = _single(z, inside)
    teacher = student
    index, other, other_index, total, square, invalid = (student.maximum,) * 6
    if parts.teacher:
        teacher = _single(u, inside)
    if parts.place:
        index = tl.where(inside, columns, NOWHERE)
    if parts.other:
        rival = inside & (columns != target)
        other = tl.where(rival, student.maximum, -float("inf"))
        other_index = tl.where(rival, columns, NOWHERE)
    if parts.sum:
        total = tl.where(inside, z, 0.0)
    if parts.sum_square:
        square = tl.where(inside, z * z, 0.0)
    if parts.place or parts.other:
        invalid = tl.where(inside & (z != z), 1.0, tl.zeros_like(z))
    plain = Plain(index, other, other_index, total, square, invalid)
    return Fold(student, plain, teacher, student.mean, student.mean)


@triton.jit
def _collapse_softmax(
    s, axis: tl.constexpr, on: tl.constexpr, mean: tl.constexpr, more: tl.constexpr, sq: tl.constexpr
):
    """The joint softmax, and how far each set's maximum falls short of the joint one with the exponential of that."""
    maximum = tl.max(s.maximum, axis)
    total, average, spread, squares = (maximum,) * 4
    fall = s.maximum - tl.expand_dims(maximum, axis)
    decay = fall
    if on:
        decay = tl.exp(fall)
        weight = s.total * decay
        total = tl.sum(weight, axis)
        if mean:
            shifted = s.mean + fall
            average = tl.sum(weight * shifted, axis) / tl.maximum(total, TINY)
            if more:
                # Chan, Golub and LeVeque 1983. In this order: where the weight is zero the distance has no square.
                apart = shifted - tl.expand_dims(average, axis)
                spread = tl.sum(s.spread * decay + weight * apart * apart, axis)
        if sq:
            squares = tl.sum(s.squares * decay * decay, axis)
    return Softmax(maximum, total, average, spread, squares), fall, decay


@triton.jit
def _first(values, places, axis: tl.constexpr):
    largest = tl.max(values, axis)
    return largest, tl.min(tl.where(values == tl.expand_dims(largest, axis), places, NOWHERE), axis)


@triton.jit
def collapse(fold, axis: tl.constexpr, parts: tl.constexpr):
    """The sets along an axis as one."""
    student, fall, decay = _collapse_softmax(
        fold.student, axis, parts.softmax, parts.mean, parts.variance, parts.squares
    )
    plain = fold.plain
    teacher = student
    index, other, other_index, total, square, invalid, forward, reverse = (student.maximum,) * 8
    if parts.place:
        _, index = _first(fold.student.maximum, plain.index, axis)
    if parts.other:
        other, other_index = _first(plain.other, plain.other_index, axis)
    if parts.sum:
        total = tl.sum(plain.sum, axis)
    if parts.sum_square:
        square = tl.sum(plain.sum_square, axis)
    if parts.place or parts.other:
        invalid = tl.sum(plain.invalid, axis)
    if parts.teacher:
        teacher, teacher_fall, teacher_decay = _collapse_softmax(
            fold.teacher, axis, True, parts.teacher_mean, False, False
        )
        # Where the maxima move, every x and w of a set moves with them.
        if parts.forward:
            forward = tl.sum((fold.forward + (teacher_fall - fall) * fold.teacher.total) * teacher_decay, axis)
        if parts.reverse:
            reverse = tl.sum((fold.reverse + (fall - teacher_fall) * fold.student.total) * decay, axis)
    return Fold(student, Plain(index, other, other_index, total, square, invalid), teacher, forward, reverse)


@triton.jit
def _join(a, b):
    return Softmax(
        tl.join(a.maximum, b.maximum),
        tl.join(a.total, b.total),
        tl.join(a.mean, b.mean),
        tl.join(a.spread, b.spread),
        tl.join(a.squares, b.squares),
    )


@triton.jit
def merge(a, b, parts: tl.constexpr):
    """Two folds of one shape as one."""
    plain = Plain(
        tl.join(a.plain.index, b.plain.index),
        tl.join(a.plain.other, b.plain.other),
        tl.join(a.plain.other_index, b.plain.other_index),
        tl.join(a.plain.sum, b.plain.sum),
        tl.join(a.plain.sum_square, b.plain.sum_square),
        tl.join(a.plain.invalid, b.plain.invalid),
    )
    forward, reverse = tl.join(a.forward, b.forward), tl.join(a.reverse, b.reverse)
    axis: tl.constexpr = len(a.forward.shape)
    pair = Fold(_join(a.student, b.student), plain, _join(a.teacher, b.teacher), forward, reverse)
    return collapse(pair, axis, parts)


@triton.jit
def empty(like, parts: tl.constexpr):
    """Folds of no logit, in the shape of `like`."""
    zero = tl.zeros_like(like)
    return singles(zero, zero, zero != 0.0, zero.to(tl.int32), 0, parts)


# The floats of a fold in memory lie in these slots, (slots, ...); index and other_index in a buffer of two integers.
SLOTS = (
    *(name for name in Softmax._fields),
    *(name for name in Plain._fields if "index" not in name),
    *(f"teacher_{name}" for name in Softmax._fields[:3]),
    *Fold._fields[3:],
)


@triton.jit
def load_fold(sums, indices, place, stride, here, parts: tl.constexpr):
    """Folds from memory, empty ones where not `here`; slots are `stride` apart."""
    maximum = tl.load(sums + place, mask=here, other=LOWEST)
    total, mean, spread, squares, index, other, other_index, total_z, square, invalid = (maximum,) * 10
    teacher, forward, reverse = Softmax(maximum, maximum, maximum, maximum, maximum), maximum, maximum
    if parts.softmax:
        total = tl.load(sums + stride + place, mask=here, other=0.0)
    if parts.mean:
        mean = tl.load(sums + 2 * stride + place, mask=here, other=0.0)
    if parts.variance:
        spread = tl.load(sums + 3 * stride + place, mask=here, other=0.0)
    if parts.squares:
        squares = tl.load(sums + 4 * stride + place, mask=here, other=0.0)
    if parts.place:
        index = tl.load(indices + place, mask=here, other=NOWHERE)
    if parts.other:
        other = tl.load(sums + 5 * stride + place, mask=here, other=-float("inf"))
        other_index = tl.load(indices + stride + place, mask=here, other=NOWHERE)
    if parts.sum:
        total_z = tl.load(sums + 6 * stride + place, mask=here, other=0.0)
    if parts.sum_square:
        square = tl.load(sums + 7 * stride + place, mask=here, other=0.0)
    if parts.place or parts.other:
        invalid = tl.load(sums + 8 * stride + place, mask=here, other=0.0)
    if parts.teacher:
        teacher_maximum = tl.load(sums + 9 * stride + place, mask=here, other=LOWEST)
        teacher_total = tl.load(sums + 10 * stride + place, mask=here, other=0.0)
        teacher_mean = teacher_maximum
        if parts.teacher_mean:
            teacher_mean = tl.load(sums + 11 * stride + place, mask=here, other=0.0)
        teacher = Softmax(teacher_maximum, teacher_total, teacher_mean, teacher_maximum, teacher_maximum)
    if parts.forward:
        forward = tl.load(sums + 12 * stride + place, mask=here, other=0.0)
    if parts.reverse:
        reverse = tl.load(sums + 13 * stride + place, mask=here, other=0.0)
    plain = Plain(index, other, other_index, total_z, square, invalid)
    return Fold(Softmax(maximum, total, mean, spread, squares), plain, teacher, forward, reverse)


@triton.jit
def store_fold(fold, sums, indices, place, stride, here, parts: tl.constexpr):
    """The counterpart of `load_fold`."""
    student, plain, teacher = fold.student, fold.plain, fold.teacher
    tl.store(sums + place, student.maximum, mask=here)
    if parts.softmax:
        tl.store(sums + stride + place, student.total, mask=here)
    if parts.mean:
        tl.store(sums + 2 * stride + place, student.mean, mask=here)
    if parts.variance:
        tl.store(sums + 3 * stride + place, student.spread, mask=here)
    if parts.squares:
        tl.store(sums + 4 * stride + place, student.squares, mask=here)
    if parts.place:
        tl.store(indices + place, plain.index, mask=here)
    if parts.other:
        tl.store(sums + 5 * stride + place, plain.other, mask=here)
        tl.store(indices + stride + place, plain.other_index, mask=here)
    if parts.sum:
        tl.store(sums + 6 * stride + place, plain.sum, mask=here)
    if parts.sum_square:
        tl.store(sums + 7 * stride + place, plain.sum_square, mask=here)
    if parts.place or parts.other:
        tl.store(sums + 8 * stride + place, plain.invalid, mask=here)
    if parts.teacher:
        tl.store(sums + 9 * stride + place, teacher.maximum, mask=here)
        tl.store(sums + 10 * stride + place, teacher.total, mask=here)
    if parts.teacher_mean:
        tl.store(sums + 11 * stride + place, teacher.mean, mask=here)
    if parts.forward:
        tl.store(sums + 12 * stride + place, fold.forward, mask=here)
    if parts.reverse:
        tl.store(sums + 13 * stride + place, fold.reverse, mask=here)
