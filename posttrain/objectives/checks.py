"""Checks of an objective's arguments. They look at shapes and plain numbers, never at a tensor's values."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from posttrain.suggest import nearest


def check_same_shape(**tensors: Tensor | None) -> None:
    """Refuse tensors that ``-`` would broadcast; None (an optional statistic that is absent) is passed over.

    Raises:
        ValueError: names the parameters and their shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} has {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listing}; give one entry for each of the same units.")


def check_same_length(**tensors: Tensor) -> None:
    """Refuse tensors that differ in their first dimension, where one has a second and the other has not.

    Raises:
        ValueError: names the parameters and their shapes.
    """
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        listing = ", ".join(f"{name} has {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"lengths differ: {listing}; give one row for each of the same units.")


def check_positive(**numbers: float) -> None:
    """Refuse hyper-parameters that are not finite numbers above 0.

    Raises:
        ValueError: names the parameter and what was found.
    """
    for name, number in numbers.items():
        if not _is_number(number) or number <= 0:
            raise ValueError(f"{name} is {number!r}; give a finite number above 0.")


def check_in_range(low: float, high: float, /, **numbers: float) -> None:
    """Refuse hyper-parameters outside ``[low, high]``; infinite bounds leave that side open.

    Raises:
        ValueError: names the parameter, what was found and what is allowed.
    """
    for name, number in numbers.items():
        if not _is_number(number) or not low <= number <= high:
            allowed = {
                (False, False): "a finite number",
                (True, False): f"a finite number of at least {low:g}",
                (False, True): f"a finite number of at most {high:g}",
                (True, True): f"a number from {low:g} to {high:g}",
            }[math.isfinite(low), math.isfinite(high)]
            raise ValueError(f"{name} is {number!r}; give {allowed}.")


def check_below_one(**shares: float) -> None:
    """Refuse hyper-parameters that are not numbers from 0 to below 1.

    Raises:
        ValueError: names the parameter and what was found.
    """
    for name, share in shares.items():
        if not _is_number(share) or not 0 <= share < 1:
            raise ValueError(f"{name} is {share!r}; give a number from 0 to below 1.")


def check_integer(low: int, /, **numbers: int) -> None:
    """Refuse hyper-parameters that are not whole numbers of at least ``low``.

    Raises:
        ValueError: names the parameter, what was found and what is allowed.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise ValueError(f"{name} is {number!r}; give a whole number of at least {low}.")


def check_choice(allowed: Iterable[str], /, **values: Any) -> None:
    """Refuse settings that are none of ``allowed``.

    Raises:
        ValueError: names the parameter, what was found, the nearest choice and all of them.
    """
    choices = list(allowed)
    for name, value in values.items():
        if value not in choices:
            match = nearest(value, choices) if isinstance(value, str) else None
            hint = f"; did you mean {match!r}?" if match else "."
            raise ValueError(f"{name} is {value!r}{hint} Choose one of {', '.join(choices)}.")


def _is_number(value: Any) -> bool:
    # YAML reads 1e-4 (no dot) as a string and `yes` as True; neither may pass for a number
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
