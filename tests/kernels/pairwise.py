"""A small set of combinations in which any two levels of different factors meet."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Combination = dict[str, object]
Pair = tuple[tuple[str, object], tuple[str, object]]

# Random combinations weighed for each one that is kept: more of them give a smaller set, more slowly.
CANDIDATES = 60


def pairs(combination: Combination) -> set[Pair]:
    """Every two of its levels."""
    return set(combinations(combination.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[object]], allowed: Callable[[Combination], bool]) -> set[Pair]:
    """Every pair of levels that `allowed`, asked about the two alone, does not forbid."""
    found: set[Pair] = set()
    for (first, firsts), (second, seconds) in combinations(factors.items(), 2):
        couples = ({first: a, second: b} for a in firsts for b in seconds)
        found |= {pair for couple in couples if allowed(couple) for pair in pairs(couple)}
    return found


def pairwise(
    factors: Mapping[str, Sequence[object]],
    *,
    allowed: Callable[[Combination], bool],
    cost: Callable[[Combination], float],
    given: Sequence[Combination] = (),
    seed: int = 0,
) -> list[Combination]:
    """Combinations that cover all pairs, greedily: the one with most new pairs for its cost next.

    Args:
        factors: name -> levels, hashable.
        allowed: whether a combination (or a part of one) may occur.
        cost: of a combination, > 0.
        given: combinations that are part of the set in any case.
        seed: the same set for the same seed.
    """
    order = {pair: i for i, pair in enumerate(sorted(all_pairs(factors, allowed), key=repr))}
    chosen, missing = list(given), set(order).difference(*map(pairs, given))
    generator = random.Random(seed)
    while missing:
        needed = dict(min(missing, key=order.__getitem__))
        drawn = ({name: generator.choice(levels) for name, levels in factors.items()} for _ in range(CANDIDATES))
        candidates = [one for one in ({**free, **needed} for free in drawn) if allowed(one)]
        if candidates:
            best = max(candidates, key=lambda one: len(pairs(one) & missing) / cost(one))
            chosen.append(best)
            missing -= pairs(best)
    return chosen
