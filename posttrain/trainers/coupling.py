"""What must be known of a whole optimizer step before its first backward: prepared tensors and weighted counts."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.binding import Side, bind
from posttrain.reduction import StepCounts
from posttrain.statistics import parse
from posttrain.terms import KernelOptions, Term, bound_inputs, made_up
from posttrain.trainers.metrics import sum_dtype

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
    counts: StepCounts, terms: Sequence[Term], batches: Sequence[tuple[Computed, Side]], accelerator: Accelerator
) -> None:
    """Fill ``counts.prepared`` and ``counts.denominators`` from the detached statistics of a whole step.

    Args:
        counts: of the step, changed in place.
        terms: all terms; those that need nothing or are counted already are passed over.
        batches: statistics and side of each of this rank's micro-batches.
        accelerator: its ranks are gathered over.
    """
    with torch.no_grad():
        for index, term in enumerate(terms):
            if index in counts.denominators or not (term.prepares or term.counts_weight):
                continue
            prepared: dict[str, Tensor] = {}
            if term.prepares:
                mine = _concatenate(
                    [bind(term, term.prepare_inputs, term.prepare_columns, *batch) for batch in batches]
                )
                prepared = term.prepare({name: gather_ragged(tensor, accelerator) for name, tensor in mine.items()})
            counts.prepared[index] = prepared
            if term.counts_weight:
                total = torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device)
                for computed, side in batches:
                    weight = term(bind_term(term, computed, side, prepared)).weight
                    total += _units(term, side) if weight is None else weight.sum().to(total)
                counts.denominators[index] = accelerator.reduce(total, "sum")
    counts.resolved = True


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
        tensor = made_up(name, parse(name), side.sizes["tokens"], width).to(device)
        made[name] = tensor.to(sum_dtype(device)) if tensor.is_floating_point() else tensor
    return {term.kernel_options: made}


def _units(term: Term, side: Side) -> int:
    return side.sizes[term.declaration.unit]


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
