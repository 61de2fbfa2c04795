"""Held-out likelihood of completions: NLL, perplexity, target probability, accuracy, entropy and calibration."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from posttrain.evaluation import bootstrap, calibration
from posttrain.evaluation.inference import CausalLM, evaluation_mode, max_positions
from posttrain.evaluation.rows import Row, is_scorable, require, scored_ids
from posttrain.modeling import StatisticsGroup, VocabRequest, attach, detach, head_difference, is_attached

logger = logging.get_logger(__name__)

Array = npt.NDArray[Any]

# Logit rows are turned into float32 in blocks of this many elements (64 MB).
_BLOCK_ELEMENTS = 2**24
_PROBE_TOKENS = 64

PROBABILITY_BINS = 20


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences and the positions to score.

    Args:
        input_ids, attention_mask: (sequences, length) int64.
        target_index: (tokens,) positions in the flattened (sequences x length) grid whose *next* token is scored.
        targets: (tokens,) the ids of those next tokens.
    """

    input_ids: Int[Tensor, "sequences length"]
    attention_mask: Int[Tensor, "sequences length"]
    target_index: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]


TokenStatistics = Callable[..., dict[str, Tensor]]


def token_statistics(model: CausalLM, batch: Batch, *, surprisal_variance: bool = False) -> dict[str, Tensor]:
    """Statistics of the next-token distribution at every scored position, from the model's own logits.

    Returns:
        (tokens,) each: ``logp`` of the target and ``max_logp`` of the most probable token in nats, ``entropy`` in nats,
        ``is_top1`` boolean and, where wanted, ``surprisal_variance`` in nats squared; float32, or float64 for a float64
        model.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    rows = logits.flatten(0, 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, _BLOCK_ELEMENTS // rows.shape[-1])
    blocks: dict[str, list[Tensor]] = {"logp": [], "max_logp": [], "entropy": [], "is_top1": []}
    if surprisal_variance:
        blocks["surprisal_variance"] = []
    for index, targets in zip(batch.target_index.split(size), batch.targets.split(size), strict=True):
        logp = rows[index].to(dtype).log_softmax(dim=-1)
        max_logp, top = logp.max(dim=-1)
        blocks["logp"].append(logp.gather(-1, targets[:, None])[:, 0])
        blocks["max_logp"].append(max_logp)
        # entr(p) = -p log p with 0 at p = 0, where a vocabulary entry is masked to minus infinity
        entropy = torch.special.entr(logp.exp()).sum(dim=-1)
        blocks["entropy"].append(entropy)
        blocks["is_top1"].append(top == targets)
        if surprisal_variance:
            centred = torch.where(logp > -torch.inf, logp + entropy[:, None], 0.0)
            blocks["surprisal_variance"].append((logp.exp() * centred**2).sum(dim=-1))
    return {name: torch.cat(parts) for name, parts in blocks.items()}


def streamed_token_statistics(model: CausalLM, batch: Batch, *, surprisal_variance: bool = False) -> dict[str, Tensor]:
    """`token_statistics` of an attached model, without ever holding tokens x vocabulary logits."""
    extra = ("surprisal_variance",) if surprisal_variance else ()
    group = StatisticsGroup(("logp", "logsumexp", "max_logit", "entropy", "is_top1", *extra))
    request = VocabRequest(batch.target_index, batch.targets, (group,))
    found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, vocab_request=request).statistics[0]
    return {
        "logp": found["logp"],
        "max_logp": found["max_logit"] - found["logsumexp"],
        "entropy": found["entropy"],
        "is_top1": found["is_top1"] > 0,
    } | {name: found[name] for name in extra}


@contextmanager
def fastest_token_statistics(model: CausalLM, probe: Sequence[int]) -> Iterator[TokenStatistics]:
    """The streamed statistics where they give the model's own log-probabilities on ``probe``, else the dense ones.

    A model that was not attached before is detached again.

    Args:
        model: plain, or wrapped by PEFT.
        probe: token ids, of which at most `_PROBE_TOKENS` are compared.
    """
    ids = torch.tensor([list(probe[:_PROBE_TOKENS])], device=model.device)
    with ExitStack() as undo:
        try:
            if not is_attached(model):
                attach(model)
                undo.callback(detach, model)
            difference, accepted, _ = head_difference(model, ids)
        except (TypeError, ValueError) as error:
            logger.info(f"Likelihood is computed from whole logits: {error}")
            chosen = token_statistics
        else:
            chosen = streamed_token_statistics if difference <= accepted else token_statistics
            if chosen is token_statistics:
                logger.warning(
                    f"Likelihood is computed from whole logits: those of {type(model).__name__} differ from its hidden "
                    f"states times its head by {difference:.3g} nats."
                )
        yield chosen


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Sums over the scored tokens of each item, and what could not be scored.

    Args:
        index: (items,) row numbers of the scored rows, ascending.
        tokens: (items,) scored tokens, at least 1.
        nll: (items,) nats, summed over the item's tokens.
        target_probability, correct, entropy: (items,) summed over tokens; entropy in nats.
        bins: (items, bins, 3) as from `calibration.bin_sums`.
        histogram: (`PROBABILITY_BINS`,) scored tokens by the probability of the target, in equal bins over [0, 1].
        truncated: rows cut at ``max_length``.
        skipped: row numbers without a scored token, such as a completion truncated to nothing.
    """

    index: Array
    tokens: Array
    nll: Array
    target_probability: Array
    correct: Array
    entropy: Array
    bins: Array
    histogram: Array
    truncated: int
    skipped: list[int]

    def statistics(self) -> dict[str, bootstrap.Statistic]:
        """Metric name -> statistic over items; per-token means weigh every token alike. Empty without any item."""
        if not len(self.index):
            return {}
        nll = bootstrap.ratio(self.nll, self.tokens)
        groups, bins, sums = self.bins.shape
        return {
            "nll": nll,
            "perplexity": bootstrap.Statistic(nll.terms, lambda totals: np.exp(nll.combine(totals))),
            "mean_target_probability": bootstrap.ratio(self.target_probability, self.tokens),
            "token_accuracy": bootstrap.ratio(self.correct, self.tokens),
            "entropy": bootstrap.ratio(self.entropy, self.tokens),
            "expected_calibration_error": bootstrap.Statistic(
                self.bins.reshape(groups, bins * sums),
                lambda totals: calibration.expected_calibration_error(totals.reshape(*totals.shape[:-1], bins, sums)),
            ),
        }

    def reliability(self) -> list[dict[str, float | int | None]]:
        """The reliability table over all scored tokens."""
        return calibration.reliability_table(self.bins.sum(axis=0))


def token_scores(
    model: CausalLM,
    sequences: Sequence[tuple[list[int], list[bool]]],
    *,
    batch_size: int,
    surprisal_variance: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Array, Array, dict[str, Array]]]:
    """Per-token statistics of token-id sequences, batch by batch, longest sequences first.

    Args:
        sequences: (ids, scored flags) as from `rows.scored_ids`; the first token is never scored, having no context.
        batch_size, surprisal_variance, progress: as in `likelihood` and `token_statistics`.

    Yields:
        (members,) numbers of the batch's sequences; (tokens,) which of these members a token belongs to; and
        `token_statistics` as numpy arrays.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    if not order:
        return
    with fastest_token_statistics(model, sequences[order[-1]][0]) as statistics_of:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch, owner = collate([sequences[index] for index in chosen], model.device)
            with evaluation_mode(model):
                statistics = statistics_of(model, batch, surprisal_variance=surprisal_variance)
            yield np.array(chosen), owner, {name: value.cpu().numpy() for name, value in statistics.items()}
            if progress is not None:
                progress(len(chosen))


def collate(sequences: Sequence[tuple[list[int], list[bool]]], device: torch.device) -> tuple[Batch, Array]:
    """Sequences, longest first, as a batch, and which of them each scored token belongs to."""
    ids = np.zeros((len(sequences), len(sequences[0][0])), dtype=np.int64)
    mask, scored = np.zeros_like(ids), np.zeros_like(ids, dtype=bool)
    for row, (tokens, flags) in enumerate(sequences):
        ids[row, : len(tokens)], mask[row, : len(tokens)], scored[row, : len(tokens)] = tokens, 1, flags
    row_index, column = scored[:, 1:].nonzero()
    arrays = (ids, mask, row_index * ids.shape[1] + column, ids[row_index, column + 1])
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays)), row_index


def likelihood(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    completion_only: bool = True,
    assistant_only: bool = False,
    bins: int = calibration.DEFAULT_BINS,
    progress: Callable[[int], None] | None = None,
) -> Likelihood:
    """Likelihood of the completions (of all tokens for ``messages`` and ``text``), on the tokens training would see.

    Args:
        model: a causal language model, plain or PEFT; it runs in evaluation mode and comes back as it was.
        tokenizer: padding is done here, on the right; it needs no padding token.
        rows: prompt and completion, ``messages``, or ``text``.
        batch_size: sequences per forward.
        max_length: longest sequence in tokens, the beginning is kept; None takes the model's positions, and no
            setting exceeds them.
        completion_only, assistant_only: which tokens are scored, see `rows.scored_ids`.
        bins: of the calibration error.
        progress: called with the number of rows of each finished batch.

    Raises:
        ValueError: a row holds no text to score, batch_size or max_length < 1, or the model gives a target a
            probability of zero or NaN.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}.")
    rows = list(rows)
    require(rows, "likelihood", "prompt with completion, messages, or text", is_scorable)
    limits = [limit for limit in (max_length, max_positions(model)) if limit is not None]
    limit = min(limits, default=None)
    encoded = [
        scored_ids(tokenizer, row, completion_only=completion_only, assistant_only=assistant_only) for row in rows
    ]
    cut = [(ids[:limit], scored[:limit]) for ids, scored in encoded]
    truncated = sum(len(short[0]) < len(full[0]) for short, full in zip(cut, encoded, strict=True))
    kept = [index for index, (_, scored) in enumerate(cut) if any(scored[1:])]
    skipped = sorted(set(range(len(cut))) - set(kept))
    if skipped:
        logger.warning(f"{len(skipped)} of {len(cut)} rows have no token to score within {limit} tokens; skipped.")
    if progress is not None and skipped:
        progress(len(skipped))
    sums = _sum_tokens(
        token_scores(model, [cut[i] for i in kept], batch_size=batch_size, progress=progress), kept, bins
    )
    return Likelihood(index=np.array(kept, dtype=np.int64), truncated=truncated, skipped=skipped, **sums)


def _sum_tokens(
    scores: Iterator[tuple[Array, Array, dict[str, Array]]], rows: list[int], bins: int
) -> dict[str, Array]:
    """Add per-token statistics up per item, in float64."""
    sums = {name: np.zeros(len(rows)) for name in ("tokens", "nll", "target_probability", "correct", "entropy")}
    sums["bins"] = np.zeros((len(rows), bins, 3))
    sums["histogram"] = np.zeros(PROBABILITY_BINS, dtype=np.int64)
    for members, owner, token in scores:
        broken = ~np.isfinite(token["logp"])
        if broken.any():
            row = rows[members[owner[broken.argmax()]]]
            raise ValueError(f"The model gives a token of row {row} the log-probability {token['logp'][broken][0]}.")
        logp = token["logp"].astype(np.float64)
        values = {
            "tokens": np.ones_like(logp),
            "nll": -logp,
            "target_probability": np.exp(logp),
            "correct": token["is_top1"],
            "entropy": token["entropy"],
        }
        for name, value in values.items():
            sums[name][members] = np.bincount(owner, value, minlength=len(members))
        # rounding may carry a probability past 1, where a histogram would not count it
        probability = np.minimum(values["target_probability"], 1.0)
        sums["histogram"] += np.histogram(probability, PROBABILITY_BINS, range=(0.0, 1.0))[0]
        confidence = np.exp(token["max_logp"].astype(np.float64))
        sums["bins"][members] = calibration.bin_sums(
            confidence, token["is_top1"], owner, groups=len(members), bins=bins
        )
    return sums
