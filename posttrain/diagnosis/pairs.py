"""What preference pairs look like to the base and to themselves: margins, lengths, shared beginnings, scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_extract_prompt

from posttrain.diagnosis.sample import quantiles
from posttrain.evaluation import bootstrap, likelihood
from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.rows import Row, scored_ids

Array = npt.NDArray[np.float64]

# Column names that data sets give the two scores, and those of a ready-made margin.
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
MARGINS = ("score_margin", "reward_margin")


def is_preference(columns: Sequence[str]) -> bool:
    """Whether rows with these columns are pairs."""
    return {"chosen", "rejected"} <= set(columns)


def split(row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pair as two rows of prompt and completion; a prompt that both answers begin with is taken out of them.

    Raises:
        ValueError: chosen or rejected is neither text nor a list of messages.
    """
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], str | list) or not row[name]:
            raise ValueError(f"{name} is {row[name]!r}; expected text or a list of messages.")
    pair = maybe_extract_prompt(dict(row))
    one, two = ({"prompt": pair["prompt"], "completion": pair[name]} for name in ("chosen", "rejected"))
    return one, two


def diagnose_pairs(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int | None,
) -> dict[str, Any]:
    """Everything about the pairs; margins are chosen minus rejected, in nats.

    Raises:
        ValueError: a row that is no pair, or no pair with two answers left after truncation.
    """
    pairs = list(_pairs(rows))
    halves = [row for pair in pairs for row in pair]
    scored = likelihood(model, tokenizer, halves, batch_size=batch_size, max_length=max_length)
    logp, tokens = np.full(len(halves), np.nan), np.full(len(halves), np.nan)
    logp[scored.index], tokens[scored.index] = -scored.nll, scored.tokens
    kept = np.isfinite(logp.reshape(-1, 2)).all(axis=1)
    if not kept.any():
        raise ValueError("no pair of the sample has two answers left to score; raise trainer.max_length.")
    logp_pair, length_pair = logp.reshape(-1, 2)[kept], tokens.reshape(-1, 2)[kept]
    margin = logp_pair[:, 0] - logp_pair[:, 1]
    per_token = logp_pair[:, 0] / length_pair[:, 0] - logp_pair[:, 1] / length_pair[:, 1]
    difference = length_pair[:, 0] - length_pair[:, 1]
    apart = difference != 0
    used = [row for row, both in zip(rows, kept, strict=True) if both]
    prefixes = [_shared_prefix(tokenizer, pair) for pair, both in zip(pairs, kept, strict=True) if both]
    found = {
        "pairs": int(kept.sum()),
        "left_out": int((~kept).sum()),
        "base_margin": _distribution(margin),
        "base_margin_per_token": _distribution(per_token),
        "base_agrees": _interval((margin > 0).astype(float)),
        "length": {
            "chosen": float(length_pair[:, 0].mean()),
            "rejected": float(length_pair[:, 1].mean()),
            "difference": _interval(difference),
            "chosen_longer": float((difference[apart] > 0).mean()) if apart.any() else 0.5,
            "rank_correlation_with_base_margin": _rank_correlation(difference, margin),
        },
        "shared_prefix": float(np.mean(prefixes)),
        "identical": int(sum(one["completion"] == two["completion"] for one, two in pairs)),
        "histogram": _histogram(margin),
    }
    scores = _scores(used)
    return found if scores is None else found | {"scores": _judge(scores, difference, margin)}


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for index, row in enumerate(rows):
        try:
            yield split(row)
        except ValueError as error:
            raise ValueError(f"row {row.get('row_number', index)} of data.train: {error}") from error


def _shared_prefix(tokenizer: PreTrainedTokenizerBase, pair: tuple[Row, Row]) -> float:
    """Tokens that both completions begin with, as a share of the shorter one."""
    first, second = ([id for id, flag in zip(*scored_ids(tokenizer, row), strict=True) if flag] for row in pair)
    shorter = min(len(first), len(second))
    same = next((place for place in range(shorter) if first[place] != second[place]), shorter)
    return same / shorter if shorter else 0.0


def _scores(rows: Sequence[Row]) -> Array | None:
    """chosen minus rejected by the data's own scores, where it has them."""
    for chosen, rejected in SCORES:
        if chosen in rows[0] and rejected in rows[0]:
            return np.array([float(row[chosen]) - float(row[rejected]) for row in rows])
    for name in MARGINS:
        if name in rows[0]:
            return np.array([float(row[name]) for row in rows])
    return None


def _judge(scores: Array, difference: Array, margin: Array) -> dict[str, Any]:
    return {
        "margin": _distribution(scores),
        "disagree": float((scores < 0).mean()),
        "ties": float((scores == 0).mean()),
        "rank_correlation_with_length": _rank_correlation(scores, difference),
        "rank_correlation_with_base_margin": _rank_correlation(scores, margin),
    }


def _distribution(values: Array) -> dict[str, Any]:
    return {**_interval(values), "quantiles": quantiles(values)}


def _interval(values: Array) -> dict[str, float]:
    found = bootstrap.estimate(bootstrap.mean(values))
    return {"mean": found.value, "low": found.low, "high": found.high}


def _rank_correlation(one: Array, two: Array) -> float | None:
    """Spearman's; None where one of them does not vary."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(stats.spearmanr(one, two).statistic)


def _histogram(values: Array) -> Mapping[str, list[float]]:
    counts, edges = np.histogram(values, bins=20)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
