"""A term under ``reweight:``: the objective and what weighs its values, as one function with the names of both."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from posttrain import objectives
from posttrain.objectives import Declaration, Loss
from posttrain.statistics import signature
from posttrain.suggest import unknown

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Reweighted:
    """An objective whose `Loss` a reweighting gives other weights.

    It takes the positional names of both and the hyper-parameters of the objective; those of the reweighting are set.

    Args:
        objective: a function of named statistics.
        declaration: of the objective.
        reweighting: ``fn(loss, <statistics or columns>..., *, hyper-parameters) -> Loss``.
        options: the reweighting's hyper-parameters.

    Raises:
        ValueError: both have a ``prepare``.
    """

    def __init__(
        self,
        objective: Callable[..., Any],
        declaration: Declaration,
        reweighting: Callable[..., Loss],
        options: Mapping[str, Any],
    ) -> None:
        self._objective, self._reweighting, self._options = objective, reweighting, dict(options)
        own = inspect.signature(objective).parameters
        positional = [item for item in inspect.signature(reweighting).parameters.values() if item.kind != _KEYWORD][1:]
        added = [item for item in positional if item.name not in own]
        self._own = tuple(own)
        self._theirs = tuple(item.name for item in positional)
        # parameters without a default go first, and keyword-only ones last, as Signature demands
        everyone = sorted(
            [*own.values(), *added], key=lambda item: (item.kind == _KEYWORD, item.default is not item.empty)
        )
        self.__signature__ = inspect.Signature(everyone)
        self.__name__ = getattr(objective, "__name__", type(objective).__name__)
        prepare = getattr(getattr(reweighting, "reweighting", None), "prepare", None)
        if prepare is not None and declaration.prepare is not None:
            raise ValueError(
                f"objective {self.__name__!r} and its reweight both prepare numbers of the whole step; leave one out."
            )
        changes = {} if prepare is None else {"prepare": prepare, "prepare_if": None}
        # its weight may come from the model, and is not known before the forward
        self.declaration = replace(declaration, token_local=False, model_weight=True, **changes)

    def __call__(self, **given: Any) -> Loss:
        found = self._objective(**{name: given[name] for name in self._own if name in given})
        loss = Loss(found) if isinstance(found, Tensor) else found
        return self._reweighting(loss, **{name: given[name] for name in self._theirs if name in given}, **self._options)


def reweighted(objective: Callable[..., Any], declaration: Declaration, setting: Any) -> Reweighted:
    """The objective under a ``reweight:`` setting.

    Args:
        objective: a function of named statistics.
        declaration: of the objective.
        setting: a name, a dotted path, a callable, or a mapping with ``name`` and hyper-parameters.

    Raises:
        ValueError: an unknown name or hyper-parameter, or a required hyper-parameter that is missing.
    """
    options: dict[str, Any] = dict(setting) if isinstance(setting, Mapping) else {"name": setting}
    target = options.pop("name", None)
    if target is None:
        raise ValueError(f"reweight has the keys {sorted(options)} but no `name`; add `name: loreun` or another.")
    reweighting = objectives.get_reweighting(target) if isinstance(target, str) else target
    known = signature(reweighting).hyperparameters
    for key in options:
        if key not in known:
            raise ValueError(unknown(f"hyper-parameter of reweight {target!r}", key, list(known)))
    missing = [key for key, value in known.items() if value is inspect.Parameter.empty and key not in options]
    if missing:
        raise ValueError(f"reweight {target!r} needs a value for {', '.join(missing)}; set it beside its name.")
    return Reweighted(objective, declaration, reweighting, options)
