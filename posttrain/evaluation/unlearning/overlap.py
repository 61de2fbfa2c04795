"""ROUGE-L between what a model wrote and what stands in the data."""

from collections.abc import Sequence

import numpy as np

from posttrain.evaluation.unlearning.tokens import Array
from posttrain.evaluation.verifiers import require_extra


def require_rouge() -> None:
    """Raise an ImportError that names the extra unless rouge-score is installed."""
    require_extra("rouge_score", "rouge-score", "ROUGE")


def rouge_l(references: Sequence[str], written: Sequence[str]) -> dict[str, Array]:
    """ROUGE-L by word, stemmed (rouge-score).

    Returns:
        ``recall`` (the longest common subsequence over the reference's words) and ``f1``, (items,) each.

    Raises:
        ImportError: rouge-score is not installed.
    """
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [scorer.score(one, other)["rougeL"] for one, other in zip(references, written, strict=True)]
    return {"recall": np.array([one.recall for one in found]), "f1": np.array([one.fmeasure for one in found])}
