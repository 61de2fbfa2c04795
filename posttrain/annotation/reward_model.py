"""A reward model: trained on pairs by trl.RewardTrainer, and asked for its rewards."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from posttrain.annotation.rows import device
from posttrain.config import RunConfig, peft_config
from posttrain.loading import load_model

Array = npt.NDArray[Any]

# Settings of TRL's with which the reward model would read another text than the policy, and where ours stand.
ELSEWHERE = {
    "max_length": "trainer.max_length",
    "eos_token": "tokenizer.eos_token",
    "pad_token": "tokenizer.pad_token",
    "chat_template_path": "tokenizer.chat_template",
    "model_init_kwargs": "annotation.reward.model",
}


def load_reward_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of ``annotation.reward.model`` with a head of one output, which is random unless it was saved with one.

    The reward is read at the last token that is no padding; where the tokenizer pads with its end-of-sequence token,
    that is the last one before the end.
    """
    given = config.annotation.reward.model
    key = "model" if given is None else "annotation.reward.model"
    set_seed(config.annotation.reward.seed)
    model = load_model(given or config.model, key=key, kind=AutoModelForSequenceClassification, num_labels=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.to(device(config)).eval()  # type: ignore[arg-type]


def has_reward_head(model: PreTrainedModel) -> bool:
    """Whether the checkpoint a model was loaded from is a sequence classifier, so that its head is trained."""
    return any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ())


def check_trainer(config: RunConfig) -> None:
    """Raise a ValueError where ``annotation.reward.trainer`` sets what stands elsewhere."""
    for name, key in ELSEWHERE.items():
        value = config.annotation.reward.trainer.get(name)
        if value is not None:
            raise ValueError(
                f"annotation.reward.trainer.{name} is {value!r}; the reward model reads what the policy reads, so set "
                f"{key} instead."
            )


def train_reward_model(
    config: RunConfig, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> PreTrainedModel:
    """Train a reward model on -log sigmoid(r(chosen) - r(rejected)).

    Args:
        pairs: ``chosen_ids`` and ``rejected_ids``.
        name: of its folder in ``annotation.reward.trainer.output_dir``, where that is set.

    Returns:
        the model in eval mode, adapters merged.
    """
    from trl import RewardConfig, RewardTrainer

    settings = config.annotation.reward
    hardware = {key: config.trainer[key] for key in ("use_cpu", "bf16", "fp16") if config.trainer.get(key) is not None}
    chosen = {**hardware, "seed": settings.seed, "report_to": "none", "save_strategy": "no", **settings.trainer}
    adapter = None if settings.peft is None else peft_config({"task_type": "SEQ_CLS", **settings.peft})
    with tempfile.TemporaryDirectory() as temporary:
        kept = settings.trainer.get("output_dir")
        folder = str(Path(kept) / name) if kept else temporary
        trainer: Any = RewardTrainer(
            load_reward_model(config, tokenizer),
            # the pairs are cut already; TRL would leave out the long ones
            RewardConfig(**{**chosen, "output_dir": folder, "max_length": None}),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        # without the wrapper that mixed precision put around forward
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        model = model.merge_and_unload() if adapter is not None else model
        if kept:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return model.eval()


def rewards(model: PreTrainedModel, pairs: Dataset, *, batch_size: int, progress: bool = True) -> tuple[Array, Array]:
    """Rewards of the chosen and of the rejected completions, (pairs,) each.

    Raises:
        ValueError: a reward is not finite.
    """
    found = [_rewards(model, pairs[name], batch_size, progress) for name in ("chosen_ids", "rejected_ids")]
    for name, values in zip(("chosen", "rejected"), found, strict=True):
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise ValueError(
                f"the reward model gives the {name} completion of pair {row} a reward of {values[row]}; check its "
                "weights, or lower annotation.reward.trainer.learning_rate."
            )
    return found[0], found[1]


@torch.no_grad()
def _rewards(model: PreTrainedModel, sequences: list[list[int]], batch_size: int, progress: bool) -> Array:
    pad: Any = model.config.get_text_config().pad_token_id
    starts = range(0, len(sequences), batch_size)
    found: list[float] = []
    for start in track(starts, description="Asking the reward model", disable=not progress):
        ids = [torch.tensor(one) for one in sequences[start : start + batch_size]]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        }
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits
        found.extend(logits.float().squeeze(-1).tolist())
    return np.array(found)


def accuracy(chosen: Array, rejected: Array) -> float:
    """Share of the pairs whose chosen completion has the higher reward; a tie counts half."""
    return float(np.mean((np.sign(chosen - rejected) + 1) / 2))
