"""A prompt and a completion as TRL's preference trainers write and tokenise them."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config import RunConfig, trainer_config_class

Row = dict[str, Any]


def written_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """A row's ``prompt``; one of messages goes through the chat template, which opens the answer."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **_template_options(row))  # type: ignore[return-value]


def written(tokenizer: PreTrainedTokenizerBase, row: Row, column: str) -> str:
    """A row's ``prompt`` and the completion in ``column``; a plain one ends with the end-of-sequence token."""
    prompt, completion = row["prompt"], row[column]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        return prompt + (completion if completion.endswith(end) else completion + end)
    return tokenizer.apply_chat_template(prompt + completion, **_template_options(row))  # type: ignore[return-value]


def encoded(tokenizer: PreTrainedTokenizerBase, row: Row, text: str, **options: Any) -> Any:
    """The tokens of a row's written text; a chat template has written the special tokens already."""
    return tokenizer(text, add_special_tokens=isinstance(row["prompt"], str), **options)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """A row's prompt as tokens."""
    return encoded(tokenizer, row, written_prompt(tokenizer, row))["input_ids"]


def split_ids(tokenizer: PreTrainedTokenizerBase, row: Row, completions: Sequence[str]) -> dict[str, list[int]]:
    """``prompt_ids`` and ``<completion>_ids`` of a row, before a trainer cuts them.

    The completions begin where their tokens part from those of the prompt alone, all at the same token.
    """
    prompt = prompt_ids(tokenizer, row)
    whole = {name: encoded(tokenizer, row, written(tokenizer, row, name))["input_ids"] for name in completions}
    start = min(common_prefix(prompt, ids) for ids in whole.values())
    return {"prompt_ids": prompt[:start], **{f"{name}_ids": ids[start:] for name, ids in whole.items()}}


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many entries two sequences share from their start."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def max_length(config: RunConfig) -> int | None:
    """Tokens of a sequence that the configuration's trainer reads."""
    default = trainer_config_class(config.method).__dataclass_fields__["max_length"].default
    return config.trainer.get("max_length", default)


def _template_options(row: Row) -> Row:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {}), "tokenize": False}
