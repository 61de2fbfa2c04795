"""Answers with statistics written by hand."""

from collections.abc import Sequence

import numpy as np

from posttrain.evaluation.unlearning import AnswerTokens


def answers(
    logp: Sequence[Sequence[float]],
    *,
    is_top1: Sequence[Sequence[int]] | None = None,
    text_lengths: Sequence[int] | None = None,
    entropy: Sequence[Sequence[float]] | None = None,
    variance: Sequence[Sequence[float]] | None = None,
) -> AnswerTokens:
    """One list an answer; what is not given is zero, and an answer's last token closes it."""
    lengths = [len(one) for one in logp]
    zeros = [[0.0] * length for length in lengths]

    def flat(values: Sequence[Sequence[float]] | None) -> np.ndarray:
        return np.concatenate([np.asarray(one, dtype=np.float64) for one in (zeros if values is None else values)])

    return AnswerTokens(
        lengths=np.array(lengths),
        text_lengths=np.array([length - 1 for length in lengths] if text_lengths is None else text_lengths),
        logp=flat(logp),
        is_top1=flat(is_top1).astype(bool),
        entropy=flat(entropy),
        surprisal_variance=flat(variance),
        truncated=np.zeros(len(logp), bool),
    )
