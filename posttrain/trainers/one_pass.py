"""Gradients formed in the forward, where each term looks at one token at a time: 6 units of work instead of 8."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.binding import bind_column
from posttrain.config import KernelConfig
from posttrain.kernels import LMHead, VocabStatistics, vocab_loss, vocab_statistics
from posttrain.modeling import VocabRequest
from posttrain.modeling.request import on_device
from posttrain.reduction import StepCounts, divide, weighted
from posttrain.side import Side
from posttrain.terms import KernelOptions, Term
from posttrain.trainers.coupling import bind_term


def use_one_pass(kernel: KernelConfig, terms: Sequence[Term]) -> bool:
    """Whether training forms its gradients in the forward.

    Raises:
        ValueError: ``kernel.one_pass`` is true and the objective or another setting does not allow it.
    """
    reason = obstacle(kernel, terms)
    if kernel.one_pass is True and reason is not None:
        raise ValueError(f"kernel.one_pass is true, and {reason}; leave it at auto.")
    return kernel.one_pass is not False and reason is None


def obstacle(kernel: KernelConfig, terms: Sequence[Term]) -> str | None:
    """Why the gradients cannot be formed in the forward; None where they can."""
    if kernel.gradient_tolerance > 0:
        return "kernel.gradient_tolerance leaves out tokens once the whole forward is known"
    for term in terms:
        inputs = term.statistics.values()
        if term.declaration.unit != "tokens" or any(statistic.unit != "tokens" for statistic in inputs):
            return f"objective {term.name!r} looks at whole sequences"
        if any(statistic.kernel == "hidden" for statistic in inputs):
            return f"objective {term.name!r} looks at hidden states"
        if term.needs_whole_step:
            return f"objective {term.name!r} needs the model's statistics of the whole step first"
        if term.role or any(statistic.role or statistic.reference_kernel_names for statistic in inputs):
            return f"objective {term.name!r} looks at the completions of one role, or at a reference model"
        if not term.declaration.token_local:
            return f"objective {term.name!r} is not declared token_local"
    if len({term.kernel_options for term in terms}) > 1:
        return "the terms differ in their `statistics:` options"
    return None


def in_one_pass(
    request: VocabRequest, groups: Sequence[KernelOptions], terms: Sequence[Term], counts: StepCounts, side: Side
) -> VocabRequest:
    """The request with the terms' loss computed beside its statistics, which come back detached.

    Args:
        request: for the statistics in ``groups``.
        groups: the kernel options of each of the request's groups.
        terms: without `obstacle`, so that all have one of these options.
        counts: of the step; every term's denominator is known.
        side: of the micro-batch.
    """
    columns = {name: bind_column(name, "tokens", side) for term in terms for name in term.columns}

    def compute(hidden: Tensor, head: LMHead) -> dict[str, Tensor]:
        def here(tensor: Tensor) -> Tensor:
            return on_device(tensor, hidden.device)

        tokens, targets = here(counts.units["tokens"]), here(request.targets)
        denominators = [here(counts.denominators.get(index, tokens)) for index in range(len(terms))]

        def phi(statistics: VocabStatistics, *cut: Tensor) -> Tensor:
            block = replace(side, token_columns=dict(zip(columns, cut, strict=True)))
            shares: list[Tensor] = []
            for term, denominator in zip(terms, denominators, strict=True):
                loss = term(bind_term(term, {term.kernel_options: statistics.as_dict()}, block, {}))
                values = weighted(loss.values, loss.weight)
                # the tokens divide outside of the kernel: its fp16 products would lose gradients of 1 / tokens
                shares.append(term.weight * divide(tokens.to(values), denominator) * values)
            return torch.stack(shares).sum(0)

        found: dict[str, Tensor] = {}
        for index, (options, group) in enumerate(zip(groups, request.groups, strict=True)):
            arguments = request.kernel_options(group, hidden.device)
            if options == terms[0].kernel_options:
                ones = torch.ones(targets.shape, device=hidden.device)
                per_token = [here(column) for column in columns.values()]
                loss, statistics = vocab_loss(hidden, head, targets, group.wanted, phi, ones, *per_token, **arguments)
                found["loss"] = divide(loss, tokens)
            else:
                with torch.no_grad():
                    statistics = vocab_statistics(hidden, head, targets, group.wanted, **arguments)
            found |= {f"{index}.{name}": tensor.detach() for name, tensor in statistics.as_dict().items()}
        return found

    return replace(request, groups=(), compute=compute)


def read(found: Mapping[str, Tensor], groups: Sequence[KernelOptions]) -> list[dict[str, Tensor]]:
    """The detached statistics of each group, out of what an `in_one_pass` request brings back beside its ``loss``."""
    answers: list[dict[str, Tensor]] = [{} for _ in groups]
    for key, tensor in found.items():
        index, _, name = key.partition(".")
        if name:
            answers[int(index)][name] = tensor.detach()
    return answers
