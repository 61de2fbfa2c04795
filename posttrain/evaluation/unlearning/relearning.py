"""Fine-tuning a little on what was forgotten: how fast it comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.evaluation.inference import CausalLM, max_positions
from posttrain.evaluation.likelihood import collate, fastest_token_statistics
from posttrain.evaluation.rows import Row, scored_ids
from posttrain.evaluation.unlearning.tokens import Array
from posttrain.modeling import standalone_copy


@dataclass(frozen=True)
class Relearning:
    """How a model relearns.

    Args:
        epochs: over the rows that are shown; 0 leaves relearning out.
        share: of the rows to forget that are shown, drawn by the seed; the others show what comes back with them.
        learning_rate: of AdamW without decay, constant.
        batch_size: rows a step.
    """

    epochs: int = 3
    share: float = 0.5
    learning_rate: float = 2e-5
    batch_size: int = 8


def merged_copy(model: CausalLM) -> PreTrainedModel:
    """A copy to change, its adapters merged into it."""
    copied = standalone_copy(model)
    return copied.merge_and_unload() if isinstance(copied, PeftModel) else copied


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of so many rows are shown, at least one, and which are not; in ascending order.

    Args:
        count: rows there are.
        share: of them that are shown, above 0 and up to 1.
        seed: of the draw.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    shown = max(1, round(share * count))
    return sorted(order[:shown]), sorted(order[shown:])


def relearn(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: Relearning,
    *,
    seed: int,
    after_epoch: Callable[[PreTrainedModel], None],
) -> None:
    """Fine-tune a copy on rows by their answers' negative log-likelihood, a token mean over each step.

    The tokens are those that supervised training has, and so is the loss; dropout is off, so that nothing is drawn but
    the order of the rows.

    Args:
        model: it stays as it is; weights in half precision are relearned in float32.
        tokenizer: padding is done here.
        rows: prompt and completion.
        settings: of the fine-tuning.
        seed: of the rows' order, which is new in each epoch.
        after_epoch: called with the copy after each epoch.

    Raises:
        ValueError: the model's weights are quantised, which no optimizer changes.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(f"the weights of {type(model).__name__} are quantised; load it without quantization_config.")
    student = merged_copy(model).eval().requires_grad_(True)
    student = student.float() if student.dtype in (torch.float16, torch.bfloat16) else student
    limit = max_positions(student)
    sequences = [(ids[:limit], scored[:limit]) for ids, scored in (scored_ids(tokenizer, row) for row in rows)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(sequences), generator=generator).tolist()
        with fastest_token_statistics(student, sequences[0][0]) as statistics_of, torch.enable_grad():
            for start in range(0, len(order), settings.batch_size):
                # collate takes the longest first
                several = sorted((sequences[row] for row in order[start : start + settings.batch_size]), key=_length)
                batch, _ = collate(several, student.device)
                (-statistics_of(student, batch)["logp"].mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
        after_epoch(student)


def _length(sequence: tuple[list[int], list[bool]]) -> int:
    return -len(sequence[0])


def robustness(retrained: npt.ArrayLike, unlearned: npt.ArrayLike) -> Array:
    """min(1, gain of the retrained model / gain of the unlearned one): 1 where forgetting stands as if it were real.

    Args:
        retrained, unlearned: (...) what relearning added to a metric of what is known (arXiv:2506.12618).
    """
    theirs, ours = np.maximum(retrained, 0.0), np.asarray(unlearned, dtype=np.float64)
    return np.where(ours > 0, np.minimum(1.0, theirs / np.where(ours > 0, ours, 1.0)), 1.0)
