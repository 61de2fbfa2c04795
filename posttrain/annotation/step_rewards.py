"""``step-rewards``: an implicit process reward model scores the steps of completions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from posttrain.annotation.rows import device, rows_to_annotate, with_columns
from posttrain.annotation.texts import common_prefix, encoded, written, written_prompt
from posttrain.annotation.writing import write
from posttrain.config import RunConfig
from posttrain.data.collation import ROW_NUMBER, CompletionCollator
from posttrain.loading import load_model, trained_model
from posttrain.modeling import StatisticsGroup, VocabRequest, attach
from posttrain.run_record import versions
from posttrain.side import Side

Array = npt.NDArray[Any]

COLUMNS = ("step_rewards", "step_ends", "cumulative_step_rewards")


@dataclass(frozen=True)
class Steps:
    """A completion in tokens and in steps.

    Args:
        input_ids: the prompt's tokens and the completion's.
        start: the completion's first token; 1 where there is no prompt, since the very first token has no probability.
        ends: (steps,) where each step ends, in characters of the completion; the last one with the completion.
        step: (tokens from ``start`` on,) each one's step, ascending.
    """

    input_ids: list[int]
    start: int
    ends: list[int]
    step: Array


def annotate_step_rewards(config: RunConfig) -> Path:
    """Write each step's reward by the implicit process reward model (arXiv:2412.01981) beside the completions.

    A step's reward is beta times the sum of log p_policy - log p_reference over its tokens, in nats times beta;
    ``cumulative_step_rewards`` is their running sum, the paper's value of the prefix, whose last entry is beta times
    the completion's log-ratio, and ``step_ends`` says where the steps end, in characters of the completion. Completions
    are scored whole, whatever ``trainer.max_length`` is.

    Raises:
        ValueError: as in `posttrain.annotation.rows.rows_to_annotate` and `split_into_steps`; no trained model, or one
            with another vocabulary; a log-probability that is not finite.
        FileExistsError: the output is there already.
    """
    settings, output = config.annotation.steps, config.annotation.output
    trained = trained_model(config, settings.policy, key="annotation.steps.policy")
    rows, tokenizer = rows_to_annotate(
        config, "step-rewards", method=config.method, needed=("prompt", "completion"), written=COLUMNS
    )
    completions = [split_into_steps(tokenizer, row, settings.separator) for row in rows]
    size, place = config.annotation.batch_size, device(config)
    reference: Any = load_model(config.model).to(place)  # type: ignore[arg-type]
    theirs = token_logps(reference, completions, batch_size=size, description="Asking the reference")
    vocabulary = reference.config.get_text_config().vocab_size
    del reference
    policy: Any = load_model(trained, key="annotation.steps.policy").to(place)  # type: ignore[arg-type]
    if policy.config.get_text_config().vocab_size != vocabulary:
        raise ValueError(
            f"annotation.steps.policy has a vocabulary of {policy.config.get_text_config().vocab_size} and the model "
            f"one of {vocabulary}; a log-ratio needs one and the same tokenizer."
        )
    ours = token_logps(policy, completions, batch_size=size, description="Asking the policy")
    scored = [
        settings.beta * np.bincount(one.step, mine - other, minlength=len(one.ends))
        for one, mine, other in zip(completions, ours, theirs, strict=True)
    ]
    annotated = with_columns(
        rows,
        {
            "step_rewards": [one.tolist() for one in scored],
            "step_ends": [one.ends for one in completions],
            "cumulative_step_rewards": [np.cumsum(one).tolist() for one in scored],
        },
    )
    about = {
        "annotation": "step-rewards",
        "paper": "arXiv:2412.01981",
        "unit": "nats times beta",
        "beta": settings.beta,
        "separator": None if "steps" in rows.column_names else settings.separator,
        "reference": config.model.name_or_path,
        "policy": trained.name_or_path,
        "rows": len(rows),
        "versions": versions(),
    }
    return write(annotated, str(output), about)


def split_into_steps(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], separator: str) -> Steps:
    """Tokenise a row's prompt and completion as training does, and give each token of the completion its step.

    A separator belongs to the step before it. A token belongs to the step in which it ends, since the prefix that the
    step completes holds it only then; what stands behind the completion (its end-of-sequence token) to the last step.

    Args:
        row: ``prompt``, ``completion`` (text, or one message of the assistant) and optionally ``steps``, the
            completion's parts in their order.
        separator: where there is no ``steps``.

    Raises:
        ValueError: a tokenizer that does not know where its tokens stand, several messages in a completion, a chat
            template that changes its text, or steps that do not make up the completion.
    """
    number = row.get(ROW_NUMBER)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where tokens stand in the text; take a fast tokenizer."
        )
    text = _completion_text(row["completion"], number)
    prompt, whole = written_prompt(tokenizer, row), written(tokenizer, row, "completion")
    begin = whole.find(text, common_prefix(prompt, whole))
    if begin < 0:
        raise ValueError(
            f"row {number}: the chat template changes the completion's text, so its steps cannot be found."
        )
    ends = _separated(text, separator) if row.get("steps") is None else _listed(text, row["steps"], number)
    found = encoded(tokenizer, row, whole, return_offsets_mapping=True)
    ids = found["input_ids"]
    start = max(1, common_prefix(encoded(tokenizer, row, prompt)["input_ids"], ids))
    # special tokens that the tokenizer adds stand nowhere: they stay with the token before them
    last = np.maximum.accumulate(np.array([stop - 1 - begin for _, stop in found["offset_mapping"][start:]], dtype=int))
    return Steps(ids, start, ends, np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1))


def _completion_text(completion: str | list[dict[str, Any]], number: Any) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(f"row {number}: the completion has {len(completion)} messages; steps are found in one.")
    return str(completion[0]["content"] or "")


def _separated(text: str, separator: str) -> list[int]:
    """Ends of the steps; separators in a row count as one, and none begins or ends the completion."""
    found = re.finditer(f"(?:{re.escape(separator)})+", text)
    return [*(one.end() for one in found if one.start() > 0 and one.end() < len(text)), len(text)]


def _listed(text: str, steps: Sequence[str], number: Any) -> list[int]:
    """Ends of the steps given as a list: each ends where the next one begins."""
    begins: list[int] = []
    position = 0
    for index, step in enumerate(steps):
        begin = text.find(step, position)
        if begin < 0 or not step or text[position:begin].strip():
            raise ValueError(
                f"row {number}: entry {index} of `steps` does not follow in the completion; give its parts in their "
                "order, with nothing but white space left out between them."
            )
        begins.append(begin)
        position = begin + len(step)
    if not steps or text[position:].strip():
        raise ValueError(f"row {number}: `steps` leaves out the end of the completion; give all its parts.")
    return [*begins[1:], len(text)]


@torch.no_grad()
def token_logps(
    model: Any, completions: Sequence[Steps], *, batch_size: int, description: str = "", progress: bool = True
) -> list[Array]:
    """Log-probabilities of every completion's tokens (those of `Steps.step`), in nats, from the streamed kernel.

    Raises:
        ValueError: one is not finite.
    """
    attach(model)
    model.eval()
    rows = [
        {"input_ids": one.input_ids, "labels": [-100] * one.start + one.input_ids[one.start :]} for one in completions
    ]
    collator = CompletionCollator(pad_token_id=0)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    place = next(model.parameters()).device
    found: list[Array] = []
    for batch in track(loader, description=description, disable=not progress):
        side: Side = batch["side"].to(place)
        request = VocabRequest(side.target_index, side.targets, (StatisticsGroup(("logp",)),))
        inputs = {name: batch[name].to(place) for name in ("input_ids", "attention_mask")}
        found.append(model(**inputs, vocab_request=request).statistics[0]["logp"].double().cpu().numpy())
    ends = np.cumsum([len(one.step) for one in completions])
    by_row = np.split(np.concatenate(found), ends[:-1])
    for number, values in enumerate(by_row):
        if not np.isfinite(values).all():
            raise ValueError(
                f"the model gives row {number} of the data a log-probability of NaN or infinity; check its weights."
            )
    return by_row
