"""Differences in words."""

from typing import Literal

from posttrain.experiments.statistics import Difference
from posttrain.metric_direction import direction

Outcome = Literal["better", "worse", "different", "open", "untested"]


def outcome(difference: Difference, alpha: float = 0.05) -> Outcome:
    """How the objective stands to the baseline.

    ``open``: they cannot be told apart after correction. ``different``: they can, but neither way is better.
    """
    if difference.corrected_p is None or difference.value is None:
        return "untested"
    if difference.corrected_p > alpha:
        return "open"
    gain = difference.value * direction(difference.metric)
    return "different" if gain == 0 else "better" if gain > 0 else "worse"


def verdict(difference: Difference, alpha: float = 0.05) -> str:
    """The difference in words, with its interval."""
    ours, theirs, found = difference.objective, difference.baseline, outcome(difference, alpha)
    if found == "untested":
        return f"{ours} and {theirs} cannot be compared: {difference.gap}"
    value, low, high = (float(one or 0.0) for one in (difference.value, difference.low, difference.high))
    if found == "open":
        words = f"{ours} and {theirs} cannot be told apart: difference {signed(value)} [{signed(low)}, {signed(high)}]"
        if low * high > 0:
            words += f", p = {difference.corrected_p:.2g} after correction for many comparisons"
    else:
        word = found if found != "different" else "higher" if value > 0 else "lower"
        if value < 0:
            value, low, high = -value, -high, -low
        size = f"{number(value)} [{number(low)}, {number(high)}]"
        words = f"{ours} is {word} than {theirs} by {size}"
    return words + (" (one seed: what varies between seeds is unknown)" if difference.seeds == 1 else "")


def number(value: float) -> str:
    """Three decimals for the sizes that metrics have, two digits for smaller ones."""
    size = abs(value)
    return "0" if size == 0 else f"{value:.3f}" if 0.001 <= size < 1000 else f"{value:.2g}"


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)
