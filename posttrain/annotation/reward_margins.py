"""``reward-margins``: how far apart a reward model sees the two completions of a pair."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from posttrain.annotation.reward_model import (
    accuracy,
    check_trainer,
    has_reward_head,
    load_reward_model,
    rewards,
    train_reward_model,
)
from posttrain.annotation.rows import rows_to_annotate, whole_rows, with_columns
from posttrain.annotation.texts import max_length, split_ids, written_prompt
from posttrain.annotation.writing import write
from posttrain.config import RunConfig
from posttrain.config.schema import without_secrets
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_preparation import finish_completions
from posttrain.run_record import versions

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

PAIR = ("prompt", "chosen", "rejected")
COLUMNS = ("reward_margin", "chosen_reward", "rejected_reward")


def annotate_reward_margins(config: RunConfig) -> Path:
    """MADPO's first step (arXiv:2510.05342): write ``reward_margin`` = r(chosen) - r(rejected) beside the pairs.

    The reward model is trained by ``trl.RewardTrainer`` and reads the tokens that the policy will be trained on.
    ``chosen_reward`` and ``rejected_reward`` are written too. Rewards have no zero of their own, and with several folds
    not even a common one: only the difference within a pair has a meaning.

    Raises:
        ValueError: as in `posttrain.annotation.rows.rows_to_annotate`; a setting of the reward trainer that stands
            elsewhere; too few prompts for the folds or the holdout; a reward that is not finite.
        FileExistsError: the output is there already.
    """
    settings, output = config.annotation.reward, config.annotation.output
    check_trainer(config)
    rows, tokenizer = rows_to_annotate(config, "reward-margins", method="preference", needed=PAIR, written=COLUMNS)
    pairs, rows = encoded_pairs(config, rows, tokenizer, name="train")
    (chosen, rejected), about = _scored(config, pairs, rows, tokenizer)
    logger.info(
        "Reward model: accuracy %.3f on all %d pairs%s.",
        accuracy(chosen, rejected),
        len(rows),
        ", {held_out_accuracy:.3f} on {held_out_pairs} held out".format(**about) if about["held_out_pairs"] else "",
    )
    values = (chosen - rejected, chosen, rejected)
    annotated = with_columns(rows, {name: one.tolist() for name, one in zip(COLUMNS, values, strict=True)})
    about = {
        "annotation": "reward-margins",
        "paper": "arXiv:2510.05342",
        "reward_model": (settings.model or config.model).name_or_path,
        **about,
        "accuracy": accuracy(chosen, rejected),
        "reward": without_secrets(dataclasses.asdict(settings)),
        "rows": len(rows),
        "versions": versions(),
    }
    return write(annotated, str(output), about)


def _scored(
    config: RunConfig, pairs: Dataset, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """Rewards of all pairs, and how good the reward model is where it was not trained."""
    settings, size = config.annotation.reward, config.annotation.batch_size
    start = load_reward_model(config, tokenizer)
    if has_reward_head(start):
        # on what pairs it was trained is not known here
        return rewards(start, pairs, batch_size=size), {"trained_here": False, "held_out_pairs": 0}
    del start
    if settings.folds > 1:
        scored = _cross_fitted(config, pairs, tokenizer, _places(rows, tokenizer, settings.seed))
        return scored, {"trained_here": True, **_held_out(scored)}
    material = pairs
    if settings.data is not None:
        key = "annotation.reward.data"
        rows = whole_rows(settings.data, tokenizer, key=key, method="preference", needed=PAIR)
        material, rows = encoded_pairs(config, rows, tokenizer, name="reward")
    held = _places(rows, tokenizer, settings.seed) < settings.holdout
    if held.all():
        raise ValueError(
            f"annotation.reward.holdout is {settings.holdout}, which leaves none of the prompts to train on; lower it."
        )
    model = train_reward_model(config, material.select(np.flatnonzero(~held)), tokenizer, name="")
    held_out = rewards(model, material.select(np.flatnonzero(held)), batch_size=size)
    return rewards(model, pairs, batch_size=size), {"trained_here": True, **_held_out(held_out)}


def _cross_fitted(
    config: RunConfig, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, places: Array
) -> tuple[Array, Array]:
    """Each pair's rewards by a model that was trained on the other folds."""
    folds = config.annotation.reward.folds
    fold = np.floor(places * folds).astype(int)
    if len(np.unique(fold)) < folds:
        raise ValueError(
            f"annotation.reward.folds is {folds}, and pairs of one prompt stay together: the prompts of data.train "
            f"fill {len(np.unique(fold))} of them; lower it."
        )
    chosen, rejected = np.empty(len(pairs)), np.empty(len(pairs))
    for number in range(folds):
        inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        model = train_reward_model(config, pairs.select(outside), tokenizer, name=f"fold_{number}")
        scored = rewards(model, pairs.select(inside), batch_size=config.annotation.batch_size)
        chosen[inside], rejected[inside] = scored
    return chosen, rejected


def encoded_pairs(
    config: RunConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> tuple[Dataset, Dataset]:
    """Pairs in tokens as the policy's trainer will read them.

    Args:
        name: of the rows, for messages.

    Returns:
        ``chosen_ids`` and ``rejected_ids``, each with the prompt; and the rows they come from, without those that the
        trainer would skip since a completion is cut to nothing.
    """
    split = [{**split_ids(tokenizer, row, PAIR[1:]), ROW_NUMBER: row.get(ROW_NUMBER, -1)} for row in rows]
    found = finish_completions(
        Dataset.from_list([{**one, "position": position} for position, one in enumerate(split)]),
        name=name,
        completions=PAIR[1:],
        columns=("position",),
        max_length=max_length(config),
        truncation_mode=config.trainer.get("truncation_mode", "keep_start"),
    )
    whole = {f"{name}_ids": [one["prompt_ids"] + one[f"{name}_ids"] for one in found] for name in PAIR[1:]}
    return Dataset.from_dict(whole), rows.select(found["position"])


def _places(rows: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int) -> Array:
    return shuffled_places([written_prompt(tokenizer, row) for row in rows], seed)


def shuffled_places(prompts: Sequence[str], seed: int) -> Array:
    """(rows,) where a row's prompt begins in a random order of the prompts, as a share of the rows, 0 <= share < 1.

    Rows of one prompt have one place, so that a split by it keeps them together.
    """
    _, prompt, counts = np.unique(np.array(prompts, dtype=object), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    begins = np.empty(len(counts))
    begins[order] = np.cumsum(counts[order]) - counts[order]
    return begins[prompt] / len(prompts)


def _held_out(scored: tuple[Array, Array]) -> dict[str, Any]:
    pairs = len(scored[0])
    return {"held_out_pairs": pairs} | ({"held_out_accuracy": accuracy(*scored)} if pairs else {})
