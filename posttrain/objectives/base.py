"""What an objective returns and what it says about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from jaxtyping import Float
from torch import Tensor

Unit = Literal["tokens", "sequences", "pairs"]


@dataclass(frozen=True, eq=False)
class Loss:
    """An objective's result, unreduced.

    Args:
        values: (units,) in the objective's own scale (nats for log-likelihoods), with gradient.
        metrics: name -> (units,) or scalar tensor, detached; averaged over the units by the trainer.
        weight: (units,), detached and >= 0. The trainer's denominator is its sum over the whole optimizer step and all
            ranks; where it is None, the denominator is the number of units.
    """

    values: Float[Tensor, " units"]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    weight: Float[Tensor, " units"] | None = None


class State(Protocol):
    """What a stateful objective remembers from one optimizer step to the next.

    The class is called with those of the objective's hyper-parameters that its ``__init__`` names keyword-only. Its
    ``update`` has positional names of statistics or columns, and is called once per optimizer step of training with
    their detached values over the whole step and all ranks; a loss reads the state as it stood before its step.
    """

    @property
    def update(self) -> Callable[..., None]:
        """The method that takes in a step; its parameters differ from class to class."""

    def tensors(self) -> dict[str, Tensor]:
        """Named 0-d tensors, which bind like statistics in the objective and in its ``prepare``."""

    def state_dict(self) -> dict[str, Any]:
        """What goes into the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


@dataclass(frozen=True)
class Declaration:
    """What the trainer and ``posttrain show`` read off an objective besides its signature.

    Args:
        unit: what one value stands for, and so what the denominator counts.
        formula: one line of plain text.
        paper: identifier and equation, such as ``arXiv:2305.18290 Eq. 7``.
        token_local: a value depends on its own token alone and ``weight`` is known before the forward, so the
            gradient may be formed during the forward.
        model_weight: ``weight`` depends on the model; the trainer then counts before the first backward of a step.
        prepare: function of detached statistics of the whole step and all ranks (positional names) and of the
            objective's hyper-parameters (keyword-only) that returns named tensors; they bind like statistics.
            A 0-d tensor goes to every micro-batch; a 1-d tensor has an entry for each unit of the inputs, in their
            order, and each micro-batch gets its own part.
        prepare_if: hyper-parameters -> whether ``prepare`` is needed at all; None means always.
        role: of the statistics that name none, where the trainer's completions have roles and the term names none.
        state: what a stateful objective remembers from step to step, see `State`.
    """

    unit: Unit
    formula: str
    paper: str
    token_local: bool = False
    model_weight: bool = False
    prepare: Callable[..., dict[str, Tensor]] | None = None
    prepare_if: Callable[[Mapping[str, Any]], bool] | None = None
    state: type[State] | None = None
    role: str | None = None


Function = TypeVar("Function", bound=Callable[..., Any])


def declare(
    *,
    unit: Unit,
    formula: str,
    paper: str,
    token_local: bool = False,
    model_weight: bool = False,
    prepare: Callable[..., dict[str, Tensor]] | None = None,
    prepare_if: Callable[[Mapping[str, Any]], bool] | None = None,
    state: type[State] | None = None,
    role: str | None = None,
) -> Callable[[Function], Function]:
    """Attach a `Declaration` to an objective as ``function.declaration``; the function itself stays as it is."""
    declaration = Declaration(unit, formula, paper, token_local, model_weight, prepare, prepare_if, state, role)

    def attach(function: Function) -> Function:
        function.declaration = declaration  # type: ignore[attr-defined]
        return function

    return attach


@dataclass(frozen=True)
class Reweighting:
    """What ``posttrain show`` reads off a reweighting: ``fn(loss, <statistics>..., *, hyper-parameters) -> Loss``.

    Args:
        formula: one line of plain text.
        paper: identifier and equation.
        prepare: as in `Declaration`, but for hyper-parameters, of which it has none.
    """

    formula: str
    paper: str
    prepare: Callable[..., dict[str, Tensor]] | None = None


def declare_reweighting(
    *, formula: str, paper: str, prepare: Callable[..., dict[str, Tensor]] | None = None
) -> Callable[[Function], Function]:
    """Attach a `Reweighting` to a function as ``function.reweighting``; its name then works under ``reweight:``."""

    def attach(function: Function) -> Function:
        function.reweighting = Reweighting(formula, paper, prepare)  # type: ignore[attr-defined]
        return function

    return attach
