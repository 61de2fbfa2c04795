"""What must be known of a whole optimizer step before its first backward: prepared tensors and weighted counts."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.binding import bind
from posttrain.reduction import StepCounts, sum_dtype
from posttrain.side import Side
from posttrain.statistics import parse
from posttrain.term import KernelOptions, Term, bound_inputs, prepare_inputs
from posttrain.trial import made_up

Computed = Mapping[KernelOptions, Mapping[str, Tensor]]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Put back every generator afterwards, so that a second pass draws the very same dropout masks."""
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.random.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    accelerator = module.get_rng_state(device) if module is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if module is not None:
            module.set_rng_state(accelerator, device)


def detached(computed: Computed) -> dict[KernelOptions, dict[str, Tensor]]:
    """The statistics without their graph."""
    return {options: {name: tensor.detach() for name, tensor in group.items()} for options, group in computed.items()}


def bind_term(term: Term, computed: Computed, side: Side, prepared: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Everything one term's function is called with for one micro-batch."""
    bound = bind(term, term.statistics, term.columns, computed, side)
    return bound_inputs(term, {**bound, **prepared})


def resolve(
    counts: StepCounts,
    terms: Sequence[Term],
    batches: Sequence[tuple[Computed, Side]],
    accelerator: Accelerator,
    *,
    states: "States",
    prepared_from: Sequence[tuple[Computed, Side]] | None = None,
) -> None:
    """Fill ``counts.prepared`` and ``counts.denominators`` from the detached statistics of a whole step.

    Args:
        counts: of the step, changed in place.
        terms: all terms; those that need nothing or are counted already are passed over.
        batches: statistics and side of each of this rank's micro-batches.
        accelerator: its ranks are gathered over.
        states: of the terms, as they stood before the step.
        prepared_from: what ``prepare`` reads, where that is not ``batches``.
    """
    with torch.no_grad():
        for index, term in enumerate(terms):
            if index in counts.denominators or not (term.prepares or term.counts_weight):
                continue
            prepared: list[dict[str, Tensor]] = [{} for _ in batches]
            if term.prepares:
                remembered = states.tensors(index, accelerator.device)
                prepared = _prepare(term, batches if prepared_from is None else prepared_from, remembered, accelerator)
                counts.prepared[index] = prepared
            if term.counts_weight:
                total = torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device)
                for (computed, side), found in zip(batches, prepared, strict=True):
                    inputs = {**states.tensors(index, side.targets.device), **found}
                    weight = term(bind_term(term, computed, side, inputs)).weight
                    total += _units(term, side) if weight is None else weight.sum().to(total)
                counts.denominators[index] = accelerator.reduce(total, "sum")
    counts.resolved = True


def _prepare(
    term: Term,
    batches: Sequence[tuple[Computed, Side]],
    remembered: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> list[dict[str, Tensor]]:
    """What ``prepare`` makes of the whole step, for each of this rank's micro-batches."""
    parts = [bind(term, term.prepare_inputs, term.prepare_columns, *batch) for batch in batches]
    mine = _concatenate(parts)
    everyone = {name: gather_ragged(tensor, accelerator) for name, tensor in mine.items()}
    found = term.prepare(prepare_inputs(term, {**everyone, **remembered}))
    sizes = [next(iter(part.values())).shape[0] for part in parts]
    total = next(iter(everyone.values())).shape[0]
    first = _units_before(sum(sizes), accelerator)
    for name, tensor in found.items():
        if tensor.dim() and tensor.shape[0] != total:
            raise ValueError(
                f"objective {term.name!r} prepared {name!r} with {tensor.shape[0]} entries for {total} units of the "
                "step; give one entry each, or a 0-d tensor."
            )
    prepared: list[dict[str, Tensor]] = []
    for size in sizes:
        own = slice(first, first + size)
        prepared.append({name: tensor[own] if tensor.dim() else tensor for name, tensor in found.items()})
        first += size
    return prepared


def _units_before(count: int, accelerator: Accelerator) -> int:
    """Units on the ranks before this one."""
    if accelerator.num_processes == 1:
        return 0
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts[: accelerator.process_index].sum())


class States:
    """What stateful objectives remember, by the position of their term.

    Args:
        terms: of the trainer.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._states = {index: state for index, term in enumerate(terms) if (state := term.new_state()) is not None}
        self._observed: dict[int, list[dict[str, Tensor]]] = {index: [] for index in self._states}

    def tensors(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """The state of one term as named tensors; nothing where it has none."""
        state = self._states.get(index)
        return {} if state is None else {name: tensor.to(device) for name, tensor in state.tensors().items()}

    @torch.no_grad()
    def observe(self, computed: Computed, side: Side) -> None:
        """Keep what the updates will read of one micro-batch."""
        for index, observed in self._observed.items():
            term = self._terms[index]
            bound = bind(term, term.update_inputs, term.update_columns, detached(computed), side)
            observed.append(bound)

    @torch.no_grad()
    def update(self, accelerator: Accelerator) -> None:
        """Let each state see the whole step that was observed, all ranks alike."""
        for index, state in self._states.items():
            mine = _concatenate(self._observed[index])
            state.update(**{name: gather_ragged(tensor, accelerator) for name, tensor in mine.items()})
            self._observed[index].clear()

    def state_dict(self) -> dict[str, Any]:
        """Term's name -> what its state saves; empty where no term has one."""
        return {self._terms[index].name: state.state_dict() for index, state in self._states.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state of a term is missing.
        """
        for index, state in self._states.items():
            name = self._terms[index].name
            if name not in saved:
                raise ValueError(
                    f"the checkpoint holds no state of objective {name!r}, only of {sorted(saved)}; resume with the "
                    "objective it was saved under."
                )
            state.load_state_dict(saved[name])


def count_columns(counts: StepCounts, terms: Sequence[Term], accelerator: Accelerator) -> None:
    """Fill ``counts.denominators`` where the weights come from data columns alone: no forward is needed for them.

    The objective is called with made-up statistics, since by its declaration they do not matter to its weight.
    """
    for index, term in enumerate(terms):
        if not term.weight_from_columns:
            continue
        total = torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device)
        for batch in counts.batches:
            side = batch["side"]
            weight = term(bind_term(term, _made_up_statistics(term, side), side, {})).weight
            total += _units(term, side) if weight is None else weight.sum().to(total)
        counts.denominators[index] = accelerator.reduce(total, "sum")


def _made_up_statistics(term: Term, side: Side) -> Computed:
    ids, device = side.token_columns.get("teacher_ids"), side.targets.device
    width = ids.shape[1] if ids is not None else term.kernel_options.k or 1
    made: dict[str, Tensor] = {}
    for name in (name for statistic in term.statistics.values() for name in statistic.kernel_names):
        tensor = made_up(name, parse(name), side.size("tokens"), width).to(device)
        made[name] = tensor.to(sum_dtype(device)) if tensor.is_floating_point() else tensor
    return {term.kernel_options: made}


def _units(term: Term, side: Side) -> int:
    return side.size(term.declaration.unit, term.role)


def _concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gather_ragged(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Concatenate a tensor whose first dimension differs between ranks, in rank order."""
    if accelerator.num_processes == 1:
        return tensor
    length = torch.tensor([tensor.shape[0]], device=accelerator.device)
    lengths = accelerator.gather(length).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]), device=accelerator.device)
    padded[: tensor.shape[0]] = tensor
    gathered = accelerator.gather(padded).split(max(lengths)) if max(lengths) else [padded]
    whole = torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=False)])
    return whole.to(tensor.device)
