"""From the ``objective`` a user wrote to checked terms: function, weight, hyper-parameters and the inputs it binds."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.kernels.table import STATISTICS, TEACHER_STATISTICS
from posttrain.objectives import Declaration, Loss
from posttrain.statistics import DERIVED, TOKEN_COLUMNS, Signature, Statistic, parse, signature
from posttrain.suggest import unknown

Objective = str | Callable[..., Any] | Mapping[str, Any]


@dataclass(frozen=True)
class KernelOptions:
    """A term's ``statistics:`` key: options of the kernel that computes its statistics."""

    temperature: float = 1.0
    k: int | None = None
    jsd_beta: float = 0.5

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


@dataclass(frozen=True)
class Available:
    """What a trainer can bind.

    Args:
        columns: numeric columns of the data set.
        roles: completion roles beside the plain one.
        reference: whether there is a reference model.
        teacher: whether there is a teacher for the kernel's teacher statistics.
    """

    columns: Collection[str] = ()
    roles: Collection[str] = ()
    reference: bool = False
    teacher: bool = False


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
    prepared_names: frozenset[str] = field(default=frozenset())

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

    @property
    def weight_from_columns(self) -> bool:
        """Whether the weight that the objective returns depends on data columns alone, as it declares."""
        declared = self.declaration.token_local and not self.declaration.model_weight
        return self.counts_weight and declared and not self.prepares

    @property
    def needs_whole_step(self) -> bool:
        """Whether the model's statistics of the whole step must be known before the first backward."""
        return self.prepares or (self.counts_weight and not self.weight_from_columns)


def build_terms(objective: Objective | list[Objective], available: Available) -> tuple[Term, ...]:
    """Resolve and check an ``objective`` setting.

    Args:
        objective: a name, a dotted path, a callable, a mapping with ``name`` (and optionally ``weight``,
            ``statistics`` and hyper-parameters), or a list of these, which is summed.
        available: what the trainer can bind.

    Raises:
        ValueError: an unknown name, statistic, column or hyper-parameter, or a hyper-parameter the objective refuses.
    """
    items = list(objective) if isinstance(objective, list | tuple) else [objective]
    if not items:
        raise ValueError("objective is an empty list; name at least one objective, such as nll.")
    terms: list[Term] = []
    for item in items:
        term = _build(item, available)
        repeats = sum(other.name.split("#")[0] == term.name for other in terms)
        terms.append(_dry_run(term, f"{term.name}#{repeats + 1}" if repeats else term.name))
    return tuple(terms)


def _build(item: Objective, available: Available) -> Term:
    options: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"name": item}
    if "name" not in options:
        raise ValueError(f"an objective term has the keys {sorted(options)} but no `name`; add `name: nll` or another.")
    target = options.pop("name")
    function = objectives.get(target) if isinstance(target, str) else target
    name = target.rpartition(":")[2] if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"objective.weight of {name!r} is {weight!r}; give a number.")
    kernel_options = _kernel_options(name, options.pop("statistics", None))
    read = signature(function)
    hyperparameters = _hyperparameters(name, read, options)
    declaration = getattr(function, "declaration", None) or Declaration("tokens", "", "")
    prepares = declaration.prepare is not None and (
        declaration.prepare_if is None or bool(declaration.prepare_if(hyperparameters))
    )
    statistics, columns = _inputs(name, read, available, declaration.prepare is not None)
    prepare_statistics: dict[str, Statistic] = {}
    prepare_columns: tuple[str, ...] = ()
    if prepares and declaration.prepare is not None:
        prepare_statistics, prepare_columns = _inputs(name, signature(declaration.prepare), available, False)
    if kernel_options.k is None and any(item.kernel.startswith("topk_") for item in statistics.values()):
        raise ValueError(f"objective {name!r} asks for the policy's top k; give k as `statistics: {{k: 5}}` beside it.")
    return Term(
        name=name,
        function=function,
        declaration=declaration,
        weight=float(weight),
        hyperparameters=hyperparameters,
        kernel_options=kernel_options,
        statistics=statistics,
        columns=columns,
        prepare_inputs=prepare_statistics,
        prepare_columns=prepare_columns,
        prepares=prepares,
        counts_weight=declaration.model_weight,
    )


def _kernel_options(name: str, given: Mapping[str, Any] | None) -> KernelOptions:
    known = [item.name for item in fields(KernelOptions)]
    for key in given or {}:
        if key not in known:
            raise ValueError(unknown(f"key under statistics of objective {name!r}", key, known))
    return KernelOptions(**(given or {}))


def _hyperparameters(name: str, read: Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in read.hyperparameters:
            raise ValueError(unknown(f"hyper-parameter of objective {name!r}", key, list(read.hyperparameters)))
    merged = {**read.hyperparameters, **given}
    missing = [key for key, value in merged.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"objective {name!r} needs a value for {', '.join(missing)}; set it beside its name.")
    return merged


def _inputs(
    name: str, read: Signature, available: Available, may_be_prepared: bool
) -> tuple[dict[str, Statistic], tuple[str, ...]]:
    """Sort an objective's positional names into statistics and columns; what is left must come from ``prepare``."""
    statistics: dict[str, Statistic] = {}
    columns: list[str] = []
    for parameter in (*read.required, *read.optional):
        statistic = None if parameter in TOKEN_COLUMNS else parse(parameter)
        reason = _unavailable(statistic, available) if statistic else None
        if statistic and reason is None:
            statistics[parameter] = statistic
            columns.extend(["teacher_ids"] if statistic.kernel == "ids_logp" else [])
        elif statistic and parameter in read.required:
            raise ValueError(f"objective {name!r} asks for the statistic {parameter!r}, {reason}.")
        elif parameter in available.columns:
            columns.append(parameter)
        elif parameter in read.required and not may_be_prepared:
            raise ValueError(
                f"objective {name!r} asks for {parameter!r}, which is neither a statistic nor a column of the data: "
                f"{unknown('statistic', parameter, (*STATISTICS, *DERIVED))} "
                f"The data has the columns {sorted(available.columns)}."
            )
    missing = [column for column in columns if column not in available.columns]
    if missing:
        raise ValueError(
            f"objective {name!r} needs the data column {missing[0]!r}, and the data has {sorted(available.columns)}; "
            "add it, rename one with `columns:`, or let `posttrain annotate` write it."
        )
    return statistics, tuple(dict.fromkeys(columns))


def _unavailable(statistic: Statistic, available: Available) -> str | None:
    if statistic.role and statistic.role not in available.roles:
        return f"but this trainer has no {statistic.role} completions"
    if (statistic.reference or statistic.kernel == "logratio") and not available.reference:
        return "but this trainer has no reference model"
    if statistic.kernel in TEACHER_STATISTICS and not available.teacher:
        return "but no teacher is given; pass `teacher:` with the model to learn from"
    if statistic.kernel == "hidden" or statistic.reduction in ("head_sum", "tail_sum"):
        return "which this trainer does not bind"
    return None


_TOKENS, _LENGTH, _IDS = 6, 2, 3


def made_up(name: str, statistic: Statistic | None, tokens: int = _TOKENS, ids: int = _IDS) -> Tensor:
    """A plausible constant in the shape of a statistic or column of so many tokens, `_LENGTH` to a sequence."""
    if name in TOKEN_COLUMNS or (statistic and statistic.kernel in ("ids_logp", "topk_logp", "topk_ids")):
        if "ids_logp" not in name and "topk_logp" not in name:
            return torch.arange(ids).expand(tokens, ids)
        return torch.full((tokens, ids), -1.25)
    per_sequence = statistic is not None and statistic.unit == "sequences"
    value = -0.5 if name.endswith("logp") or name.endswith("log_sum_sq_probs") else 0.5
    if statistic is not None and statistic.kernel == "length":
        value = float(_LENGTH)
    return torch.full((tokens // _LENGTH if per_sequence else tokens,), value)


def _dry_run(term: Term, name: str) -> Term:
    """Call the objective once on made-up numbers: bad hyper-parameters and shapes fail at start-up, not at step 1.

    It also tells what a plain function does not declare: its unit, whether it returns a weight, and (with a
    ``prepare``) the names that are prepared.
    """
    per_sequence = all(item.unit == "sequences" for item in term.statistics.values()) and bool(term.statistics)

    def examples(statistics: Mapping[str, Statistic], columns: Collection[str]) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {key: made_up(key, item) for key, item in statistics.items()}
        for column in columns:
            whole = made_up(column, None)
            made[column] = whole[: _TOKENS // _LENGTH] if per_sequence and whole.dim() == 1 else whole
        return made

    inputs = bound_inputs(term, examples(term.statistics, term.columns))
    try:
        prepared = term.prepare(examples(term.prepare_inputs, term.prepare_columns)) if term.prepares else {}
        loss = term({**inputs, **prepared})
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"objective {name!r} failed on a trial call with made-up statistics: {type(error).__name__}: {error}"
        ) from error
    changes: dict[str, Any] = {"name": name, "prepared_names": frozenset(prepared)}
    if loss.weight is not None:
        changes["counts_weight"] = True
    if not hasattr(term.function, "declaration"):
        units = {_TOKENS: "tokens", _TOKENS // _LENGTH: "sequences"}
        if loss.values.shape[0] not in units:
            raise ValueError(
                f"objective {name!r} returned {loss.values.shape[0]} values for {_TOKENS} tokens in "
                f"{_TOKENS // _LENGTH} sequences; return one value per token or one per sequence."
            )
        changes["declaration"] = Declaration(units[loss.values.shape[0]], "", "")  # type: ignore[arg-type]
    return replace(term, **changes)


def bound_inputs(term: Term, available: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Pick what the objective's own signature takes (``teacher_ids`` may be needed by the kernel alone)."""
    read = signature(term.function)
    return {name: available[name] for name in (*read.required, *read.optional) if name in available}
