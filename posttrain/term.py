"""One summand of the training loss, as checked and ready to be called."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from posttrain.objectives import Declaration, Loss, State
from posttrain.statistics import Statistic, signature


@dataclass(frozen=True)
class KernelOptions:
    """A term's ``statistics:`` key: options of the kernel that computes its statistics, and the layer of ``hidden``."""

    temperature: float = 1.0
    k: int | None = None
    jsd_beta: float = 0.5
    layer: int | None = None

    def __post_init__(self) -> None:
        numbers = {"temperature": self.temperature, "jsd_beta": self.jsd_beta}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"statistics.{name} is {value!r}; give a number.")
        if not self.temperature > 0:
            raise ValueError(f"statistics.temperature is {self.temperature}; give a number above 0.")
        if not 0 <= self.jsd_beta <= 1:
            raise ValueError(f"statistics.jsd_beta is {self.jsd_beta}; give a number from 0 to 1.")
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"statistics.k is {self.k!r}; give a whole number from 1.")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise ValueError(f"statistics.layer is {self.layer!r}; give the whole number of a block, or leave it out.")


@dataclass(frozen=True)
class Available:
    """What a trainer can bind.

    Args:
        columns: numeric columns of the data set.
        roles: completion roles beside the plain one.
        reference: whether there is a reference model.
        teacher: whether there is a teacher for the kernel's teacher statistics; else the reference is the teacher.
        needs_role: whether every completion has a role, so that a statistic without one says too little.
        remedies: role or column -> which setting gives it, for the message where it is missing.
    """

    columns: Collection[str] = ()
    roles: Collection[str] = ()
    reference: bool = False
    teacher: bool = False
    needs_role: bool = False
    remedies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of the training loss, ready to be called with named tensors."""

    name: str
    function: Callable[..., Any]
    declaration: Declaration
    weight: float
    hyperparameters: dict[str, Any]
    kernel_options: KernelOptions
    statistics: dict[str, Statistic]
    columns: tuple[str, ...]
    prepare_inputs: dict[str, Statistic]
    prepare_columns: tuple[str, ...]
    prepares: bool
    counts_weight: bool
    role: str = ""
    update_inputs: dict[str, Statistic] = field(default_factory=dict)
    update_columns: tuple[str, ...] = ()

    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Loss:
        """Call the objective; a bare tensor counts as `Loss` without metrics."""
        result = self.function(**inputs, **self.hyperparameters)
        loss = result if isinstance(result, Loss) else Loss(result)
        if not isinstance(loss.values, Tensor) or loss.values.dim() != 1:
            shape = tuple(loss.values.shape) if isinstance(loss.values, Tensor) else type(loss.values).__name__
            raise ValueError(
                f"objective {self.name!r} returned values of shape {shape}; return one unreduced value per "
                f"{self.declaration.unit.removesuffix('s')}, the trainer does the reduction."
            )
        return loss

    def prepare(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Run the objective's ``prepare`` on the detached statistics of the whole step."""
        assert self.declaration.prepare is not None
        accepted = signature(self.declaration.prepare).hyperparameters
        options = {key: value for key, value in self.hyperparameters.items() if key in accepted}
        return self.declaration.prepare(**inputs, **options)

    def new_state(self) -> State | None:
        """A fresh state, where the objective declares one."""
        if self.declaration.state is None:
            return None
        accepted = signature(self.declaration.state).hyperparameters
        return self.declaration.state(**{k: v for k, v in self.hyperparameters.items() if k in accepted})

    @property
    def all_statistics(self) -> tuple[Statistic, ...]:
        """Of the objective, its ``prepare`` and its state."""
        return (*self.statistics.values(), *self.prepare_inputs.values(), *self.update_inputs.values())

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Of the objective, its ``prepare`` and its state."""
        return tuple(dict.fromkeys((*self.columns, *self.prepare_columns, *self.update_columns)))

    @property
    def denominator(self) -> str:
        """Name of the count that the sum of values is divided by, as `posttrain.reduction.StepCounts` holds it."""
        unit = self.declaration.unit
        return f"{self.role}_{unit}" if self.role and unit != "pairs" else unit

    @property
    def weight_from_columns(self) -> bool:
        """Whether the weight that the objective returns depends on data columns alone, as it declares."""
        declared = self.declaration.token_local and not self.declaration.model_weight
        return self.counts_weight and declared and not self.prepares

    @property
    def needs_whole_step(self) -> bool:
        """Whether the model's statistics of the whole step must be known before the first backward."""
        return self.prepares or (self.counts_weight and not self.weight_from_columns)


def bound_inputs(term: Term, available: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Pick what the objective's own signature takes (``teacher_ids`` may be needed by the kernel alone)."""
    read = signature(term.function)
    return {name: available[name] for name in (*read.required, *read.optional) if name in available}


def prepare_inputs(term: Term, available: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Pick what the objective's ``prepare`` takes."""
    assert term.declaration.prepare is not None
    read = signature(term.declaration.prepare)
    return {name: available[name] for name in (*read.required, *read.optional) if name in available}
