"""Which tokens an objective hardly trains, from the objective itself: its gradient by the target's log-probability."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain import objectives
from posttrain.binding import bind
from posttrain.side import Side
from posttrain.terms import Available, Term, bound_inputs, build_terms

# A token counts as silenced below this share of the pull that nll gives every token.
SILENT_BELOW = 0.01
# What the papers set where an objective has no default, or where the default is another objective's.
SETTINGS: Mapping[str, list[dict[str, Any]]] = {
    "probability_power": [{"alpha": 10.0}],
    "probability_threshold": [{"threshold": 0.2}],
    "direct_coverage": [{"n": 8}, {"n": 32}],
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """An objective that depends on the target's log-probability alone.

    Args:
        label: name and settings.
        setting: as ``objective:`` takes it.
        terms: checked.
    """

    label: str
    setting: Any
    terms: tuple[Term, ...]


def candidates(own: Any = None) -> list[Candidate]:
    """Every objective of the library that needs no more than ``logp``, and the configuration's own where it is one.

    Args:
        own: the configuration's ``objective``.
    """
    found: dict[str, Candidate] = {}
    for setting in (*_library(), *([own] if own is not None else [])):
        try:
            terms = build_terms(setting, Available())
        except ValueError:
            # it needs a column, a teacher, a reference or another role, which a base and its data do not have
            continue
        if all(term.kernel_options.temperature == 1 and _kernels(term) == {"logp"} for term in terms):
            found.setdefault(_label(setting), Candidate(_label(setting), setting, terms))
    return list(found.values())


def gradient_factors(candidate: Candidate, logp: Float[Tensor, " tokens"], side: Side) -> Float[Tensor, " tokens"]:
    """|dL/dlogp| of every token, L the sum of the objective's values; ``nll`` gives 1 everywhere."""
    total = torch.zeros_like(logp)
    for term in candidate.terms:
        leaf = logp.detach().clone().requires_grad_()
        computed = {term.kernel_options: {"logp": leaf}}
        inputs: dict[str, Tensor | None] = dict(bind(term, term.statistics, term.columns, computed, side))
        if term.prepares:
            detached = {term.kernel_options: {"logp": logp.detach()}}
            inputs |= term.prepare(bind(term, term.prepare_inputs, term.prepare_columns, detached, side))
        loss = term(bound_inputs(term, inputs))
        (gradient,) = torch.autograd.grad(loss.values.sum(), leaf)
        total += term.weight * gradient
    return total.abs()


def silenced(candidate: Candidate, logp: Float[Tensor, " tokens"], side: Side) -> float:
    """Share of tokens whose factor lies below `SILENT_BELOW` of that of ``nll``."""
    return float((gradient_factors(candidate, logp, side) < SILENT_BELOW).double().mean())


def _library() -> Iterator[Any]:
    for name in objectives.names():
        for options in SETTINGS.get(name, [{}]):
            yield {"name": name, **options} if options else name


def _kernels(term: Term) -> set[str]:
    statistics = (*term.statistics.values(), *term.prepare_inputs.values())
    return {kernel for one in statistics for kernel in one.kernel_names}


def _label(setting: Any) -> str:
    if isinstance(setting, list):
        return " + ".join(_label(one) for one in setting)
    if not isinstance(setting, Mapping):
        return setting if isinstance(setting, str) else getattr(setting, "__name__", type(setting).__name__)
    options = {key: value for key, value in setting.items() if key != "name" and value is not None}
    inside = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    )
    return f"{setting['name']}({inside})" if inside else str(setting["name"])
