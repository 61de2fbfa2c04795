"""Statistics over vocabulary tiles: one pass forward (two for the jsd), one pass of recomputation backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import BlockAccumulator, State, statistics
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import Coefficients, TileGradient, coefficients
from posttrain.kernels.first_order import first_order
from posttrain.kernels.head import LMHead
from posttrain.kernels.projection import Gradients, HeadTensors, Projection, Settings, autocast_off
from posttrain.kernels.table import DETACHED, VocabStatistics
from posttrain.kernels.tiling import slices, tile_shape


class Models(NamedTuple):
    """Student and, where a divergence is asked for, teacher."""

    student: Projection
    teacher: Projection | None


def streamed_statistics(hidden: Float[Tensor, "tokens width"], head: LMHead, query: Query) -> VocabStatistics:
    """Every wanted statistic without a tensor of tokens x vocabulary."""
    tensors = HeadTensors.of(hidden, head)
    settings = Settings.of(hidden, head, query.temperature)
    values = _Statistics.apply(query, settings, teacher_projection(query, settings.result), *tensors)
    return query.answer(dict(zip(query.needed, values, strict=True)))


def teacher_projection(query: Query, result: torch.dtype) -> Projection | None:
    """The teacher's side, a constant, with tiles in the student's dtype."""
    if query.teacher is None:
        return None
    hidden, head = query.teacher
    tensors = HeadTensors(*(None if t is None else t.detach() for t in HeadTensors.of(hidden, head)))  # type: ignore[arg-type]
    return Projection(tensors, Settings.of(hidden, head, query.temperature, result))


class _Statistics(torch.autograd.Function):
    """(query, settings, teacher, hidden, weight, bias, hidden2, matrix) -> the needed statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Query,
        settings: Settings,
        teacher: Projection | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden2: Tensor | None,
        matrix: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = HeadTensors(hidden, weight, bias, hidden2, matrix)
        models = Models(Projection(tensors, settings), teacher)
        with autocast_off(hidden.device):
            state = collect(models, query)
            values = statistics(state, query, models.student.vocab)
        ctx.query, ctx.settings, ctx.teacher, ctx.state_names = query, settings, teacher, tuple(state)
        ctx.save_for_backward(*tensors, *state.values())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name in DETACHED))
        return tuple(values.values())

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(HeadTensors._fields)
        # Read once: under activation checkpointing each saved tensor may be unpacked a single time.
        unpacked = ctx.saved_tensors
        tensors, saved = unpacked[:count], unpacked[count:]
        models = Models(Projection(HeadTensors(*tensors), ctx.settings), ctx.teacher)
        state = dict(zip(ctx.state_names, saved, strict=True))
        arrived = {n: g for n, g in zip(ctx.query.needed, incoming, strict=True) if g is not None and n not in DETACHED}
        with torch.no_grad(), autocast_off(tensors[0].device):
            found = coefficients(arrived, state, ctx.query, models.student.vocab)
            gradients = propagate(models, found, state, ctx.query.jsd_beta, ctx.needs_input_grad[3:])
        return None, None, None, *first_order(gradients, (*tensors, *arrived.values()))


def collect(models: Models, query: Query) -> State:
    """The forward: per-token sums over the vocabulary."""
    student, teacher = models
    rows_size, columns_size = tile_shape(student.tokens, student.vocab, student.width, student.tensors.hidden.device)
    dtype = student.settings.result
    blocks = [(rows, BlockAccumulator(query.rows(rows), dtype)) for rows in slices(student.tokens, rows_size)]
    for is_second in (False, True) if "jsd" in query.needed else (False,):
        for columns in slices(student.vocab, columns_size):
            operands = student.columns(columns)
            teacher_operands = None if teacher is None else teacher.columns(columns)
            for rows, block in blocks:
                z_NV = student.logits(student.rows(rows), operands) if block.reads_student else None
                u_NV = None
                if teacher is not None and teacher_operands is not None:
                    u_NV = teacher.logits(teacher.rows(rows), teacher_operands)
                if not is_second:
                    block.update(z_NV, u_NV, columns.start)
                elif z_NV is not None and u_NV is not None:
                    block.update_mixture(z_NV, u_NV)
    states = [block.state() for _, block in blocks]
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def propagate(
    models: Models, found: Coefficients, state: State, jsd_beta: float, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward: every tile once more, turned into gradients of hidden states and head."""
    student, teacher = models
    device = student.tensors.hidden.device
    rows_size, columns_size = tile_shape(student.tokens, student.vocab, student.width, device)
    gradients = Gradients(student, needs, whole_weight=False)
    blocks = [(rows, TileGradient(found, state, jsd_beta, rows)) for rows in slices(student.tokens, rows_size)]
    reads_student = found.reads_student or student.settings.softcap is not None
    for columns in slices(student.vocab, columns_size):
        gradients.open(columns)
        operands = student.columns(columns)
        teacher_operands = teacher.columns(columns) if teacher is not None and found.reads_teacher else None
        for rows, tile_gradient in blocks:
            row_operands = student.rows(rows)
            if reads_student:
                z_NV = student.logits(row_operands, operands)
            else:
                shape = (row_operands.hidden_ND.shape[0], operands.weight_VD.shape[0])
                z_NV = torch.empty(shape, dtype=student.settings.result, device=device)
            slope_NV = student.softcap_slope(z_NV)
            u_NV = None
            if teacher is not None and teacher_operands is not None:
                u_NV = teacher.logits(teacher.rows(rows), teacher_operands)
            dz_NV = tile_gradient(z_NV, u_NV, columns.start)
            if slope_NV is not None:
                dz_NV.mul_(slope_NV)
            gradients.add(dz_NV, row_operands, operands, rows, columns)
        gradients.close(columns)
    return gradients.finish()
