"""From the ``objective`` a user wrote to checked terms: function, weight, hyper-parameters and the inputs it binds."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from posttrain import objectives
from posttrain.kernels.table import STATISTICS, TEACHER_STATISTICS
from posttrain.objectives import Declaration
from posttrain.reweighted import reweighted
from posttrain.statistics import DERIVED, TOKEN_COLUMNS, Signature, Statistic, parse, signature
from posttrain.suggest import unknown
from posttrain.term import Available, KernelOptions, Term, bound_inputs
from posttrain.trial import dry_run

__all__ = ["Available", "KernelOptions", "Objective", "Term", "bound_inputs", "build_terms"]

Objective = str | Callable[..., Any] | Mapping[str, Any]


def build_terms(objective: Objective | list[Objective], available: Available) -> tuple[Term, ...]:
    """Resolve and check an ``objective`` setting.

    Args:
        objective: a name, a dotted path, a callable, a mapping with ``name`` (and optionally ``weight``, ``role``,
            ``statistics``, ``reweight`` and hyper-parameters), or a list of these, which is summed.
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
        terms.append(dry_run(term, f"{term.name}#{repeats + 1}" if repeats else term.name))
    return tuple(terms)


def _build(item: Objective, available: Available) -> Term:
    options: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"name": item}
    if "name" not in options:
        raise ValueError(f"an objective term has the keys {sorted(options)} but no `name`; add `name: nll` or another.")
    target = options.pop("name")
    function = objectives.get(target) if isinstance(target, str) else target
    name = target.rpartition(":")[2] if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    reweight = options.pop("reweight", None)
    if reweight is not None:
        plain = dry_run(_build({**options, "name": target}, available), name)
        # with these hyper-parameters it may have nothing to prepare
        inner = plain.declaration if plain.prepares else replace(plain.declaration, prepare=None, prepare_if=None)
        function = reweighted(function, inner, reweight)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"objective.weight of {name!r} is {weight!r}; give a number.")
    kernel_options = _kernel_options(name, options.pop("statistics", None))
    role = _role(name, options.pop("role", None), available)
    read = signature(function)
    hyperparameters = _hyperparameters(name, read, options)
    declaration = getattr(function, "declaration", None) or Declaration("tokens", "", "")
    prepares = declaration.prepare is not None and (
        declaration.prepare_if is None or bool(declaration.prepare_if(hyperparameters))
    )
    remembers = declaration.state is not None
    statistics, columns = _inputs(name, read, available, declaration.prepare is not None or remembers, role)
    nothing = Signature((), (), {})
    to_prepare = signature(declaration.prepare) if prepares and declaration.prepare is not None else nothing
    prepare_statistics, prepare_columns = _inputs(name, to_prepare, available, remembers, role)
    # without `self`, for which any object does
    update: Any = getattr(declaration.state, "update", None)
    to_update = signature(functools.partial(update, None)) if remembers else nothing
    update_statistics, update_columns = _inputs(name, to_update, available, False, role)
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
        role=role,
        update_inputs=update_statistics,
        update_columns=update_columns,
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


def _role(name: str, role: Any, available: Available) -> str:
    if role is None:
        return ""
    if role not in available.roles:
        if role in available.remedies:
            raise ValueError(
                f"objective {name!r} reads {role} completions, and there are none; {available.remedies[role]}."
            )
        known = ", ".join(sorted(available.roles)) or "none"
        raise ValueError(f"objective.role of {name!r} is {role!r}, and the completions' roles here are: {known}.")
    return str(role)


def _inputs(
    name: str, read: Signature, available: Available, may_be_prepared: bool, role: str
) -> tuple[dict[str, Statistic], tuple[str, ...]]:
    """Sort an objective's positional names into statistics and columns; what is left must come from ``prepare``."""
    statistics: dict[str, Statistic] = {}
    columns: list[str] = []
    for parameter in (*read.required, *read.optional):
        statistic = None if parameter in TOKEN_COLUMNS else parse(parameter)
        reason = _unavailable(statistic, available, role) if statistic else None
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
        usual = "add it, rename one with `columns:`, or let `posttrain annotate` write it"
        raise ValueError(
            f"objective {name!r} needs the data column {missing[0]!r}, and the data has {sorted(available.columns)}; "
            f"{available.remedies.get(missing[0], usual)}."
        )
    return statistics, tuple(dict.fromkeys(columns))


def _unavailable(statistic: Statistic, available: Available, role: str) -> str | None:
    if statistic.role and statistic.role not in available.roles:
        remedy = available.remedies.get(statistic.role)
        return f"but this trainer has no {statistic.role} completions" + (f"; {remedy}" if remedy else "")
    if not (statistic.role or role) and available.needs_role:
        known = ", ".join(sorted(available.roles))
        return f"and this trainer's completions have roles; set `role:` beside the objective's name to one of {known}"
    if (statistic.reference or statistic.kernel == "logratio") and not available.reference:
        return "but this trainer has no reference model"
    if statistic.kernel in TEACHER_STATISTICS and not (available.teacher or available.reference):
        return "but no teacher is given; pass `teacher:` with the model to learn from"
    pairs = {"chosen", "rejected"} <= set(available.roles)
    if statistic.reduction in ("head_sum", "tail_sum") and not pairs:
        return "which this trainer does not bind"
    return None
