"""The grammar of statistics: what the name of an objective's parameter asks for.

``role_`` + ``reference_`` + ``reduction_`` + kernel name, each part but the last optional: the reference model's
log-probability of the chosen completion, summed over its tokens, is ``chosen_reference_sum_logp``. A kernel's own name
wins over a reduction (``mean_logit`` is the kernel's statistic, ``mean_logp`` the token mean of ``logp``).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.kernels.table import STATISTICS

# a longer name before its own beginning
ROLES = ("chosen", "rejected", "refusal", "mismatched", "retain_refusal", "retain", "forget")
REDUCTIONS = ("head_sum", "tail_sum", "sum", "mean")
DERIVED = ("probability", "length", "logratio", "sequence_logp", "hidden")
TOKEN_COLUMNS = ("teacher_ids", "teacher_ids_logp")


@dataclass(frozen=True)
class Statistic:
    """One parsed name.

    Args:
        name: as the objective wrote it.
        kernel: the name of the kernel's table, or one of `DERIVED`.
        role: which completion, or "" for the only one there is.
        reference: of the frozen reference model.
        reduction: "" for per-token values, else one of `REDUCTIONS`.
    """

    name: str
    kernel: str
    role: str = ""
    reference: bool = False
    reduction: str = ""

    @property
    def unit(self) -> str:
        """``tokens`` or ``sequences``: what one entry of the bound tensor stands for."""
        per_sequence = self.reduction or self.kernel in ("length", "logratio", "sequence_logp")
        return "sequences" if per_sequence else "tokens"

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """What has to be computed of the policy for this one: kernel statistics, or ``hidden``."""
        return () if self.reference else self._needed

    @property
    def reference_kernel_names(self) -> tuple[str, ...]:
        """The same of the reference model."""
        return self._needed if self.reference or self.kernel == "logratio" else ()

    @property
    def _needed(self) -> tuple[str, ...]:
        if self.kernel == "length":
            return ()
        if self.kernel in ("probability", "logratio", "sequence_logp"):
            return ("logp",)
        return (self.kernel,)


def parse(name: str) -> Statistic | None:
    """The statistic a name asks for, or None where the grammar does not know it (it may then be a data column)."""
    rest, role, reference = name, "", False
    for candidate in ROLES:
        if rest.startswith(candidate + "_"):
            role, rest = candidate, rest.removeprefix(candidate + "_")
            break
    if rest.startswith("reference_"):
        reference, rest = True, rest.removeprefix("reference_")
    known = (*STATISTICS, *DERIVED)
    if rest in known:
        return Statistic(name, rest, role, reference)
    for reduction in REDUCTIONS:
        kernel = rest.removeprefix(reduction + "_")
        # what is per sequence already has nothing left to reduce
        if kernel != rest and kernel in (*STATISTICS, "probability"):
            return Statistic(name, kernel, role, reference, reduction)
    return None


@dataclass(frozen=True)
class Signature:
    """What a pure objective asks for, read off its parameters.

    Args:
        required: positional names without a default.
        optional: positional names whose default is None.
        hyperparameters: keyword-only names with their defaults; `inspect.Parameter.empty` where there is none.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    hyperparameters: dict[str, Any]


def signature(function: Callable[..., Any]) -> Signature:
    """Read an objective's (or a ``prepare``'s) parameters.

    Raises:
        ValueError: for ``*args``, ``**kwargs``, or a positional parameter with a default other than None, which would
            be neither a statistic nor a hyper-parameter.
    """
    required: list[str] = []
    optional: list[str] = []
    hyperparameters: dict[str, Any] = {}
    name = getattr(function, "__name__", str(function))
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            hyperparameters[parameter.name] = parameter.default
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"objective {name!r} takes {parameter}, which names no statistic; write its statistics out by name."
            )
        elif parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is None:
            optional.append(parameter.name)
        else:
            raise ValueError(
                f"parameter {parameter.name!r} of objective {name!r} has the default {parameter.default!r}: make it "
                "keyword-only if it is a hyper-parameter, or default it to None if it is an optional statistic."
            )
    return Signature(tuple(required), tuple(optional), hyperparameters)
