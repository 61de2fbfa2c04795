"""Per-item pass@k and maj@k from n samples per item; intervals over items come from `bootstrap`."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and the number of samples, found k={k} with {samples} samples.")


def pass_at_k(correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k) with c of n samples correct (Chen et al., arXiv:2107.03374, Eq. 1).

    Args:
        correct: (items, n) booleans, one per sample.
        k: 1 <= k <= n.

    Returns:
        (items,) probabilities that at least one of k samples drawn without replacement is correct.

    Raises:
        ValueError: k outside 1..n, or correct without two axes.
    """
    hits = np.asarray(correct, dtype=bool)
    if hits.ndim != 2:
        raise ValueError(f"correct must have the shape (items, samples), found {hits.shape}.")
    samples = hits.shape[1]
    _check_k(k, samples)
    wrong = samples - hits.sum(axis=1, keepdims=True)
    drawn = np.arange(k)
    # C(n-c, k) / C(n, k) as a product of k factors within [0, 1]: binomials themselves overflow.
    return 1.0 - np.prod(np.clip(wrong - drawn, 0, None) / (samples - drawn), axis=1)


def maj_at_k(answers: Sequence[Sequence[Hashable | None]], correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """Majority vote over the first k samples of each item (self-consistency, arXiv:2203.11171).

    Samples vote for their normalised answer; None, an answer that could not be read, does not vote. Where several
    answers share the most votes the vote is decided by a fair draw, so an item scores the fraction of tied answers
    that are correct. Where the samples of one answer were judged differently (a verifier that reads the whole
    completion), the answer counts with the fraction judged correct. An item without any vote scores 0.

    Args:
        answers: per item the normalised answers of its n samples.
        correct: (items, n) booleans.
        k: 1 <= k <= n; only the first k samples vote, which is one draw of size k and not its expectation.

    Returns:
        (items,) in [0, 1].

    Raises:
        ValueError: k outside 1..n, or answers and correct of different shapes.
    """
    hits = np.asarray(correct, dtype=bool)
    if hits.ndim != 2 or hits.shape[0] != len(answers) or any(len(row) != hits.shape[1] for row in answers):
        raise ValueError(f"answers and correct must both be (items, samples); correct has the shape {hits.shape}.")
    _check_k(k, hits.shape[1])
    return np.array([_vote(row[:k], flags) for row, flags in zip(answers, hits, strict=True)], dtype=np.float64)


def _vote(answers: Sequence[Hashable | None], correct: npt.NDArray[np.bool_]) -> float:
    ballots: defaultdict[Hashable, list[bool]] = defaultdict(list)
    for answer, hit in zip(answers, correct, strict=False):
        if answer is not None:
            ballots[answer].append(bool(hit))
    if not ballots:
        return 0.0
    most = max(map(len, ballots.values()))
    winners = [sum(votes) / len(votes) for votes in ballots.values() if len(votes) == most]
    return sum(winners) / len(winners)
