"""Statistics over vocabulary tiles: one pass forward (two for the jsd), one pass of recomputation backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import State, statistics
from posttrain.kernels.checks import Query
from posttrain.kernels.first_order import first_order
from posttrain.kernels.head import LMHead
from posttrain.kernels.kept import KeptTiles, Models
from posttrain.kernels.passes import collect, propagate
from posttrain.kernels.projection import HeadTensors, Projection, Settings, autocast_off
from posttrain.kernels.table import DETACHED, VocabStatistics
from posttrain.kernels.tolerance import Recorder, active_recorder, propagate_within


def streamed_statistics(hidden: Float[Tensor, "tokens width"], head: LMHead, query: Query) -> VocabStatistics:
    """Every wanted statistic without a tensor of tokens x vocabulary."""
    tensors = HeadTensors.of(hidden, head)
    settings = Settings.of(hidden, head, query.temperature)
    teacher = teacher_projection(query, settings.result)
    values = _Statistics.apply(query, settings, teacher, torch.is_grad_enabled(), active_recorder(), *tensors)
    return query.answer(dict(zip(query.needed, values, strict=True)))


def teacher_projection(query: Query, result: torch.dtype) -> Projection | None:
    """The teacher's side, a constant, with tiles in the student's dtype."""
    if query.teacher is None:
        return None
    hidden, head = query.teacher
    tensors = HeadTensors(*(None if t is None else t.detach() for t in HeadTensors.of(hidden, head)))  # type: ignore[arg-type]
    return Projection(tensors, Settings.of(hidden, head, query.temperature, result))


class _Statistics(torch.autograd.Function):
    """(query, settings, teacher, grad mode, recorder, hidden, weight, bias, hidden2, matrix) -> the needed statistics.

    The grad mode is an argument because it is always off in here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Query,
        settings: Settings,
        teacher: Projection | None,
        with_gradient: bool,
        recorder: Recorder,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden2: Tensor | None,
        matrix: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = HeadTensors(hidden, weight, bias, hidden2, matrix)
        models = Models(Projection(tensors, settings), teacher)
        is_kept = with_gradient and any(ctx.needs_input_grad[5:])
        with autocast_off(hidden.device):
            kept = KeptTiles.within((query.budget or 0) if is_kept else 0, models)
            state = collect(models, query, kept)
            values = statistics(state, query, models.student.whole_vocab)
        ctx.query, ctx.settings, ctx.teacher, ctx.recorder = query, settings, teacher, recorder
        ctx.state_names, ctx.kept_names = tuple(state), tuple(kept.tiles)
        ctx.save_for_backward(*tensors, *state.values(), *kept.tiles.values())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name in DETACHED))
        return tuple(values.values())

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(HeadTensors._fields)
        # Read once: under activation checkpointing each saved tensor may be unpacked a single time.
        unpacked = ctx.saved_tensors
        tensors, saved = HeadTensors(*unpacked[:count]), unpacked[count:]
        state: State = dict(zip(ctx.state_names, saved[: len(ctx.state_names)], strict=True))
        kept = KeptTiles.of(ctx.kept_names, saved[len(ctx.state_names) :])
        query, needs = ctx.query, ctx.needs_input_grad[5:]
        arrived = {n: g for n, g in zip(query.needed, incoming, strict=True) if g is not None and n not in DETACHED}
        with torch.no_grad(), autocast_off(tensors.hidden.device):
            models = Models(Projection(tensors, ctx.settings), ctx.teacher)
            if query.gradient_tolerance > 0:
                gradients = propagate_within(models, query, arrived, state, kept, needs, ctx.recorder)
            else:
                gradients = propagate(models, query, arrived, state, kept, needs)
        return None, None, None, None, None, *first_order(gradients, (*tensors, *arrived.values()))
