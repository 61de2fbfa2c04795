"""The ``objective`` of unlearning: terms to forget, terms to retain, and how they are combined."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.presets import PRESETS, changes_constants, expand
from posttrain.suggest import unknown
from posttrain.terms import Objective

KEYS = ("forget", "retain", "combine")


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Minimise the forget loss subject to the retain loss being at most ``epsilon`` (arXiv:2506.05314).

    The retain loss counts with the dual variable as its weight; after every optimizer step the dual variable becomes
    max(0, dual + step (retain loss - epsilon)), from the loss of that whole step.

    Args:
        epsilon: bound of the retain loss, in its own unit (nats a token for nll).
        step: of the dual variable, per unit of retain loss.
        initial: dual variable at the start, and throughout the warm-up.
        warmup_epochs: of the forget data, before the dual variable moves.
    """

    epsilon: float
    step: float = 1.0
    initial: float = 1.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"objective.combine.constraint.{item.name} is {value!r}; give a number of at least 0.")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How the two sides add up.

    Args:
        forget: weight of the forget terms.
        retain: weight of the retain terms; the dual variable stands in its place under a constraint.
        constraint: None for a weighted sum.
    """

    forget: float = 1.0
    retain: float = 1.0
    constraint: Constraint | None = None


@dataclass(frozen=True)
class ForgetRetain:
    """A parsed objective.

    Args:
        terms: as `posttrain.terms.build_terms` takes them, those to forget first, each with its role.
        forgets: how many of them are forget terms.
        combination: of the two sides.
        preset: whose forget terms these are, or None.
    """

    terms: list[dict[str, Any]]
    forgets: int
    combination: Combination
    preset: str | None = field(default=None, compare=False)

    def check_trained(self, *, assistant: bool) -> None:
        """Refuse a preset that is not meant for what is trained.

        Args:
            assistant: whether that is an assistant, whose logits are taken off the model's, and not the model.

        Raises:
            ValueError: the preset is meant for the other one.
        """
        if self.preset is None or ("assistant" in PRESETS[self.preset].beside) == assistant:
            return
        if assistant:
            raise ValueError(
                f"objective.preset is {self.preset!r}, which makes a model forget, and an assistant has to know what "
                "is to be forgotten; set it to uld, or take assistant out."
            )
        raise ValueError(
            f"objective.preset is {self.preset!r}, which teaches an assistant what is to be forgotten, and the model "
            "itself is trained; set assistant (LogitDifferenceTrainer in Python)."
        )


def parse(objective: Any) -> ForgetRetain:
    """Read ``{forget: ..., retain: ..., combine: ...}``; a term alone is a forget term without a retain term.

    ``{preset: npo}`` stands for a published method, see `posttrain.presets`.

    Raises:
        ValueError: an unknown key or preset, no forget term, terms without a side, a preset's name in place of a loss,
            or a combination that is neither a sum nor a constraint.
    """
    preset = None
    if isinstance(objective, list | tuple):
        raise ValueError(
            "objective is a list, and unlearning has to know what its terms are for; give {forget: [...], retain: "
            "[...]}."
        )
    if isinstance(objective, Mapping) and "preset" in objective:
        replaced = "forget" in objective and not changes_constants(objective["forget"])
        preset = None if replaced else str(objective["preset"])
        objective = expand(objective)
    if not isinstance(objective, Mapping) or "forget" not in objective:
        given = f"the keys {sorted(objective)}" if isinstance(objective, Mapping) else repr(objective)
        if isinstance(objective, Mapping) and "name" not in objective:
            raise ValueError(f"objective has {given} and no `forget`; name the loss on the forget data there.")
        objective = {"forget": objective}
    for key in objective:
        if key not in KEYS:
            raise ValueError(unknown("key of objective", f"objective.{key}", [f"objective.{one}" for one in KEYS]))
    combination = _combination(objective.get("combine"))
    if not objective["forget"]:
        raise ValueError("objective.forget names no loss; name at least one, such as npo.")
    forget = _side(objective["forget"], "forget", combination.forget)
    retain = _side(objective.get("retain") or [], "retain", combination.retain)
    if combination.constraint is not None and not retain:
        raise ValueError("objective.combine is a constraint on the retain loss, and objective.retain is missing.")
    return ForgetRetain(forget + retain, len(forget), combination, preset)


def _side(given: Objective | list[Any], role: str, weight: float) -> list[dict[str, Any]]:
    terms: list[dict[str, Any]] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        term: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"name": item}
        if "name" not in term:
            raise ValueError(f"objective.{role} has the keys {sorted(term)} and no `name`; name the loss there.")
        function = term["name"]
        if isinstance(function, str) and function in PRESETS and function not in objectives.names():
            raise ValueError(
                f"objective.{role} is {function!r}, which is a preset and no loss; write objective: {{preset: "
                f"{function}}}."
            )
        function = objectives.get(function) if isinstance(function, str) else function
        declared = getattr(getattr(function, "declaration", None), "role", None)
        term.setdefault("role", declared or role)
        term["weight"] = weight * _number(term.get("weight", 1.0), f"objective.{role}.weight")
        terms.append(term)
    return terms


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}; give a number.")
    return value


def _combination(given: Any) -> Combination:
    if given is None:
        return Combination()
    kind, options = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (None, None)
    if kind not in ("sum", "constraint") or not isinstance(options, Mapping):
        raise ValueError(
            f"objective.combine is {given!r}; give {{sum: {{forget: 1.0, retain: 1.0}}}} or "
            "{constraint: {epsilon: 0.3}}."
        )
    known = ["forget", "retain"] if kind == "sum" else [item.name for item in fields(Constraint)]
    for key in options:
        if key not in known:
            raise ValueError(unknown(f"key of objective.combine.{kind}", key, known))
    if kind == "sum":
        weights = {key: _number(value, f"objective.combine.sum.{key}") for key, value in options.items()}
        return Combination(forget=weights.get("forget", 1.0), retain=weights.get("retain", 1.0))
    if "epsilon" not in options:
        raise ValueError("objective.combine.constraint.epsilon is missing; give the bound of the retain loss.")
    return Combination(constraint=Constraint(**options))


class DualVariable:
    """The multiplier of the retain loss under a `Constraint`.

    Args:
        constraint: of the run.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.value: Tensor = torch.tensor(float(constraint.initial), dtype=torch.float64)

    def update(self, retain_loss: Tensor, epoch: float) -> None:
        """One ascent step on the dual, from the whole step's retain loss; nothing during the warm-up."""
        if epoch < self.constraint.warmup_epochs:
            return
        violation = retain_loss.to(self.value) - self.constraint.epsilon
        self.value = torch.clamp(self.value + self.constraint.step * violation, min=0.0)

    def state_dict(self) -> dict[str, float]:
        """What goes into the checkpoint."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from what `state_dict` gave."""
        self.value = torch.tensor(state["value"], dtype=torch.float64)
