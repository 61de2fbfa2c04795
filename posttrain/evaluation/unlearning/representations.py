"""What the hidden states still tell: likeness of two models layer by layer, and whose answer a state belongs to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.inference import CausalLM, evaluation_mode, max_positions
from posttrain.evaluation.likelihood import collate
from posttrain.evaluation.rows import Row, scored_ids
from posttrain.evaluation.unlearning.tokens import Array
from posttrain.modeling import backbone_modules, causal_lm
from posttrain.modeling.logit_difference import LogitDifferenceModel


def linear_cka(one: Array, other: Array) -> float:
    """Linear centred kernel alignment of two representations of the same items (arXiv:1905.00414 Eq. 4).

    It is 1 where one is the other rotated, scaled or shifted, and 0 where no linear function relates them.

    Args:
        one, other: (items, width), the widths may differ.

    Returns:
        from 0 to 1; NaN where one of them is the same for all items.

    Raises:
        ValueError: they are of different items.
    """
    if len(one) != len(other):
        raise ValueError(f"the representations are of {len(one)} and of {len(other)} items; compare the same ones.")
    first, second = (states.astype(np.float64) - states.mean(axis=0, dtype=np.float64) for states in (one, other))
    # the smaller side of each product: (items x items) or (width x width)
    if len(one) < max(first.shape[1], second.shape[1]):
        first, second = first @ first.T, second @ second.T
        shared, own, theirs = (float((a * b).sum()) for a, b in ((first, second), (first, first), (second, second)))
    else:
        pairs = ((first, second), (first, first), (second, second))
        shared, own, theirs = (float(((a.T @ b) ** 2).sum()) for a, b in pairs)
    return shared / float(np.sqrt(own) * np.sqrt(theirs)) if own > 0 and theirs > 0 else float("nan")


def nearest_neighbours(states: Array, labels: Sequence[Any], k: int = 5) -> Array:
    """Whether an item's k nearest others, by cosine, tell its label.

    The label most frequent among them wins; of several, the one whose items are closer in sum.

    Args:
        states: (items, width).
        labels: (items,).
        k: others that vote.

    Returns:
        (items,) 1.0 where the label is told and 0.0 where not.

    Raises:
        ValueError: k is less than 1, or there are not so many other items.
    """
    if not 1 <= k < len(states):
        raise ValueError(f"k is {k} and there are {len(states)} items; give a number from 1 to {len(states) - 1}.")
    norms = np.linalg.norm(states.astype(np.float64), axis=1, keepdims=True)
    unit = states / np.where(norms > 0, norms, 1.0)
    closeness = unit @ unit.T
    np.fill_diagonal(closeness, -np.inf)
    nearest = np.argsort(-closeness, axis=1, kind="stable")[:, :k]
    told = np.zeros(len(states))
    for item, others in enumerate(nearest):
        votes: dict[Any, tuple[int, float]] = {}
        for other in others:
            count, total = votes.get(labels[other], (0, 0.0))
            votes[labels[other]] = (count + 1, total + closeness[item, other])
        told[item] = max(votes, key=lambda label: votes[label]) == labels[item]
    return told


def answer_states(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_size: int = 64
) -> Array:
    """Each layer's hidden states at the tokens of every answer, averaged over the answer.

    The states are those of the answer's own tokens, never that of the first token of the text, which is the same
    whatever follows.

    Args:
        model: a causal language model; it comes back as it was. Of a `LogitDifferenceModel` the base is looked into,
            which still knows what the assistant takes off.
        tokenizer: padding is done here.
        rows: prompt and completion.
        batch_size: sequences per forward.

    Returns:
        (layers + 1, items, width): the embeddings, then what each layer puts out (the last through the final norm).

    Raises:
        ValueError: a row has no answer within the model's positions, or the model no separate backbone.
    """
    inner = causal_lm(model)
    backbone = backbone_modules(inner.base if isinstance(inner, LogitDifferenceModel) else inner).backbone
    limit = max_positions(model)
    encoded = [(ids[:limit], scored[:limit]) for ids, scored in (scored_ids(tokenizer, row) for row in rows)]
    empty = [index for index, (_, scored) in enumerate(encoded) if not any(scored[1:])]
    if empty:
        raise ValueError(f"row {empty[0]} has no answer within the {limit} positions of the model; shorten its prompt.")
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    found: list[Any] = [None] * len(encoded)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch, owner = collate([encoded[index] for index in members], model.device)
        with evaluation_mode(model):
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            layers = backbone(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        # the position after the one that predicts a token is the token's own
        at = batch.target_index + 1
        rows_of = torch.from_numpy(owner).to(at.device)
        counts = torch.bincount(rows_of, minlength=len(members))[:, None]
        means = [
            torch.zeros(len(members), states.shape[-1], dtype=torch.float64, device=at.device).index_add_(
                0, rows_of, states.detach().flatten(0, 1)[at].double()
            )
            / counts
            for states in layers
        ]
        stacked = torch.stack(means, dim=1).cpu().numpy()
        for place, index in enumerate(members):
            found[index] = stacked[place]
    return np.stack(found, axis=1)
