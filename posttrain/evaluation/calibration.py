"""Expected calibration error of top-1 predictions, from sums per confidence bin."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DEFAULT_BINS = 15


def bin_sums(
    confidence: npt.ArrayLike,
    correct: npt.ArrayLike,
    group: npt.ArrayLike | None = None,
    *,
    groups: int = 1,
    bins: int = DEFAULT_BINS,
) -> Array:
    """Sums per group and equal-width confidence bin; bin m of M holds confidences in ((m-1)/M, m/M], the first also 0.

    Args:
        confidence: (predictions,) probability of the predicted class, in [0, 1].
        correct: (predictions,) whether the predicted class was right.
        group: (predictions,) the group, such as the item, that each prediction belongs to; None for a single one.
        groups: number of groups.
        bins: number of bins M.

    Returns:
        (groups, bins, 3) float64: count, sum of confidence, number correct.

    Raises:
        ValueError: shapes differ, a confidence outside [0, 1], or bins < 1.
    """
    confidences = np.asarray(confidence, dtype=np.float64)
    hits = np.asarray(correct, dtype=np.float64)
    owner = np.zeros(len(confidences), dtype=np.int64) if group is None else np.asarray(group, dtype=np.int64)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}.")
    if not confidences.shape == hits.shape == owner.shape:
        raise ValueError(
            f"confidence, correct and group must have one length, found {confidences.shape}, {hits.shape} and "
            f"{owner.shape}."
        )
    if not ((confidences >= 0) & (confidences <= 1 + 1e-6)).all():
        raise ValueError("confidence must lie in [0, 1]; give probabilities, not logits or log-probabilities.")
    bin_index = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    cell = owner * bins + bin_index
    sums = [np.bincount(cell, weights, minlength=groups * bins) for weights in (None, confidences, hits)]
    return np.stack(sums, axis=-1).astype(np.float64).reshape(groups, bins, 3)


def expected_calibration_error(sums: Array) -> Any:
    """ECE (Guo et al., arXiv:1706.04599, Eq. 3): sum over bins of count/N * abs(accuracy - mean confidence).

    An empty bin adds nothing. Being a mean of absolute values, the estimate is biased upwards for few predictions.

    Args:
        sums: (..., bins, 3) as from `bin_sums`, added over groups.

    Returns:
        (...) in [0, 1], a scalar for one table.
    """
    return np.abs(sums[..., 2] - sums[..., 1]).sum(axis=-1) / sums[..., 0].sum(axis=-1)


def reliability_table(sums: Array) -> list[dict[str, float | int | None]]:
    """One row per bin for a reliability diagram; mean confidence and accuracy are None where a bin is empty.

    Args:
        sums: (bins, 3) as from `bin_sums`, added over groups.
    """
    bins = len(sums)
    return [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "count": int(count),
            "confidence": float(confidence / count) if count else None,
            "accuracy": float(hits / count) if count else None,
        }
        for index, (count, confidence, hits) in enumerate(sums)
    ]
