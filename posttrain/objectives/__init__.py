"""Objectives by name: functions of this package's modules under `declare`.

A family is a module, or all modules that set the same ``FAMILY``.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from posttrain.objectives.base import Declaration, Loss, Reweighting, State, declare, declare_reweighting
from posttrain.suggest import unknown

__all__ = [
    "Declaration",
    "Loss",
    "Reweighting",
    "State",
    "declare",
    "declare_reweighting",
    "families",
    "get",
    "get_reweighting",
    "names",
    "reweightings",
]


@functools.cache
def _families() -> dict[str, dict[str, Callable[..., Any]]]:
    found: dict[str, dict[str, Callable[..., Any]]] = {}
    owner: dict[str, str] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        family = getattr(module, "FAMILY", info.name)
        for name, item in vars(module).items():
            # an objective that a module merely imports belongs to the family that defines it
            if not hasattr(item, "declaration") or item.__module__ != module.__name__:
                continue
            if name in owner:
                raise ValueError(
                    f"the objective {name!r} is defined in the families {owner[name]!r} and {family!r}; rename one."
                )
            owner[name] = family
            found.setdefault(family, {})[name] = item
    return found


def families() -> dict[str, dict[str, Callable[..., Any]]]:
    """Family -> objective's name -> objective, in the order in which the modules define them."""
    return {family: dict(members) for family, members in _families().items()}


def names() -> tuple[str, ...]:
    """Names of all objectives, family by family."""
    return tuple(name for members in _families().values() for name in members)


def get(name: str) -> Callable[..., Any]:
    """The objective called ``name``.

    Args:
        name: one of `names()`, or the dotted path ``my_package.losses:my_loss`` of a callable of one's own.

    Raises:
        ValueError: no such name (the nearest one is suggested), or a path that leads to nothing callable.
    """
    if ":" in name:
        return _imported(name)
    for members in _families().values():
        if name in members:
            return members[name]
    if name in reweightings():
        raise ValueError(f"{name!r} weighs the values of another objective; give it as `reweight: {name}` under that.")
    raise ValueError(
        unknown("objective", name, names()) + " An objective of your own is named as my_package.losses:my_loss."
    )


def reweightings() -> dict[str, Callable[..., Any]]:
    """Name -> what may stand under ``reweight:`` of a term."""
    module = importlib.import_module(f"{__name__}.reweighting")
    return {name: item for name, item in vars(module).items() if hasattr(item, "reweighting")}


def get_reweighting(name: str) -> Callable[..., Any]:
    """The reweighting called ``name``, or at a dotted path.

    Raises:
        ValueError: no such name (the nearest one is suggested), or a path that leads to nothing callable.
    """
    if ":" in name:
        return _imported(name)
    if name not in reweightings():
        raise ValueError(unknown("reweight", name, list(reweightings())))
    return reweightings()[name]


def _imported(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a module that the user's own file fails to import is another mistake and keeps its own message
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"objective {path!r}: there is no module {error.name!r}; run where it can be imported or install it."
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective {path!r} is no dotted path such as my_package.losses:my_loss.") from error
    if not hasattr(module, attribute):
        functions = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise ValueError(unknown(f"objective in the module {module_name!r}", attribute, functions))
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"objective {path!r} is a {type(found).__name__}; name a function that returns Loss.")
    return found
