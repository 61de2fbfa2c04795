"""The loops over tiles: logits into per-token sums (forward), and every tile once more into gradients (backward)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import coefficients
from posttrain.kernels.gradients import Gradients, spread
from posttrain.kernels.kept import KeptTiles, Models, Tiles
from posttrain.kernels.operations import (
    fused_forward,
    fused_gradient,
    fusible_head,
    new_accumulator,
    new_tile_gradient,
)
from posttrain.kernels.parallel import merge_over_ranks, sum_over_ranks
from posttrain.kernels.tiling import slices


def collect(models: Models, query: Query, kept: KeptTiles) -> State:
    """The forward: per-token sums over the vocabulary. Tiles for which there is room are kept."""
    student = models.student
    state: State = {}
    if "mean_logit" in query.needed and student.settings.softcap is None:
        state, query = {"sum": student.mean_logit().mul_(student.vocab)}, query.without("mean_logit")
    # Tiles that are to be kept have to exist.
    fused = fused_forward(student, query) if query.wanted and not kept.tiles else None
    if fused is not None:
        state |= fused
    elif query.wanted:
        rows_size = models.tile_shape[0]
        dtype = student.settings.result
        blocks = [(rows, new_accumulator(query.rows(rows), dtype)) for rows in slices(student.tokens, rows_size)]
        _visit(models, blocks, kept, is_second=False)
        kept.complete = True
        state |= _joined([block.state() for _, block in blocks])
    state = merge_over_ranks(state, student.settings.shard, query.k)
    if "jsd" in query.needed:
        if student.settings.shard is not None:
            for rows, block in blocks:
                block.adopt({name: value[rows] for name, value in state.items()})
        _visit(models, blocks, kept, is_second=True)
        mixture = _joined([block.mixture() for _, block in blocks])
        sum_over_ranks(tuple(mixture.values()), student.settings.shard)
        state |= mixture
    return state


def _joined(states: Sequence[State]) -> State:
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def _visit(
    models: Models, blocks: Sequence[tuple[slice, BlockAccumulator]], kept: KeptTiles, *, is_second: bool
) -> None:
    """Shows every tile to the block of its tokens."""
    student, teacher = models
    shape = models.tile_shape
    tiles = Tiles("student", student, shape, kept) if blocks[0][1].reads_student else None
    teacher_tiles = None if teacher is None else Tiles("teacher", teacher, shape, kept)
    for columns in slices(student.vocab, shape[1]):
        operands = None if tiles is None else student.columns(columns)
        teacher_operands = None if teacher is None else teacher.columns(columns)
        for rows, block in blocks:
            z_NV = u_NV = None
            if tiles is not None and operands is not None:
                z_NV = tiles.tile(rows, operands, columns.start)
            if teacher_tiles is not None and teacher_operands is not None:
                u_NV = teacher_tiles.tile(rows, teacher_operands, columns.start)
            if not is_second:
                block.update(z_NV, u_NV, student.start + columns.start)
            elif z_NV is not None and u_NV is not None:
                block.update_mixture(z_NV, u_NV)


def propagate(
    models: Models,
    query: Query,
    arrived: Mapping[str, Tensor],
    state: State,
    kept: KeptTiles,
    needs: Sequence[bool],
    index: Int[Tensor, " live"] | None = None,
) -> tuple[Tensor | None, ...]:
    """The backward: every tile once more, turned into gradients of hidden states and head.

    Args:
        models, query, state, kept: of the forward.
        arrived: the incoming gradients by statistic.
        needs: which of the student's tensors want a gradient.
        index: tokens to go through; None leaves out those whose incoming gradients are all exactly zero.
    """
    tokens = models.student.tokens
    index = live_rows(arrived, tokens) if index is None else index
    if index is None:
        return _propagate(models, query, arrived, state, kept, needs, None)
    part = _propagate(
        models.selected(index),
        query.rows(index),
        {name: gradient[index] for name, gradient in arrived.items()},
        {name: value[index] for name, value in state.items()},
        kept,
        needs,
        index,
    )
    return spread(part, index, tokens)


def live_rows(arrived: Mapping[str, Tensor], tokens: int) -> Int[Tensor, " live"] | None:
    """The tokens with an incoming gradient other than zero, in order; None where they are all alive (or nan)."""
    dead = None
    for gradient in arrived.values():
        is_zero = (gradient == 0) if gradient.ndim == 1 else (gradient == 0).all(1)
        dead = is_zero if dead is None else dead & is_zero
    if dead is None:
        return None
    # The one look at the device in a backward.
    index = dead.logical_not().nonzero()[:, 0]
    return None if index.shape[0] == tokens else index


def _propagate(
    models: Models,
    query: Query,
    arrived: Mapping[str, Tensor],
    state: State,
    kept: KeptTiles,
    needs: Sequence[bool],
    index: Int[Tensor, " live"] | None,
) -> tuple[Tensor | None, ...]:
    student, teacher = models
    found = coefficients(arrived, state, query, student.whole_vocab)
    gradients = Gradients(student, needs, whole_weight=False)
    rows_size, columns_size = models.tile_shape
    # The forward cut the vocabulary for all tokens; what it kept is cut likewise.
    shape = rows_size, kept.columns_size or columns_size
    tiles = Tiles("student", student, shape, kept, index)
    teacher_tiles = None
    if teacher is not None and found.reads_teacher:
        teacher_tiles = Tiles("teacher", teacher, shape, kept, index)
    reads_student = found.reads_student or student.settings.softcap is not None
    head = fusible_head(student, query) if reads_student and not kept.tiles else None
    blocks = [
        (rows, new_tile_gradient(found, state, query, rows, student.settings))
        for rows in slices(student.tokens, shape[0])
    ]
    for columns in slices(student.vocab, shape[1]):
        gradients.open(columns)
        operands = student.columns(columns)
        teacher_operands = teacher.columns(columns) if teacher is not None and teacher_tiles is not None else None
        for rows, tile_gradient in blocks:
            if head is not None:
                dz_NV = fused_gradient(tile_gradient, student.tensors.hidden, head, rows, columns)
            else:
                z_NV = tiles.tile(rows, operands, columns.start) if reads_student else tiles.blank(rows, operands)
                u_NV = None
                if teacher_tiles is not None and teacher_operands is not None:
                    u_NV = teacher_tiles.tile(rows, teacher_operands, columns.start)
                dz_NV = tile_gradient(z_NV, u_NV, student.start + columns.start)
            gradients.add(dz_NV, student.rows(rows), operands, gradients.rows(rows), columns)
        gradients.close(columns)
    sum_over_ranks((gradients.sums.get("hidden"), gradients.sums.get("hidden2")), student.settings.shard)
    return gradients.finish()
