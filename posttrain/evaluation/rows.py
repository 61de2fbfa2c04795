"""How evaluation reads a row: its prompt, its reference answer, and the token ids that training would see.

A row has ``prompt`` (text or messages) with ``completion`` and/or ``answer``, or ``messages``, or ``text``.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
Message = dict[str, Any]
Prompt = str | list[Message]


def _holds(row: Row, column: str) -> bool:
    return row.get(column) is not None


def _last_assistant(messages: list[Message]) -> int | None:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return turns[-1] if turns else None


def prompt_of(row: Row) -> Prompt | None:
    """The prompt to complete: column ``prompt``, or ``messages`` up to the last assistant turn; None for neither."""
    if _holds(row, "prompt"):
        return row["prompt"]
    if _holds(row, "messages"):
        turn = _last_assistant(row["messages"])
        return row["messages"] if turn is None else row["messages"][:turn]
    return None


def reference_of(row: Row) -> str | None:
    """The answer to compare with: ``answer``, else the completion's text, else the last assistant turn; else None."""
    if _holds(row, "answer"):
        return str(row["answer"])
    if _holds(row, "completion"):
        completion = row["completion"]
        return completion if isinstance(completion, str) else completion[-1]["content"]
    if _holds(row, "messages"):
        turn = _last_assistant(row["messages"])
        return None if turn is None else row["messages"][turn]["content"]
    return None


def is_verifiable(row: Row) -> bool:
    """Whether a completion of the row can be generated and judged: it has a prompt and a reference."""
    return prompt_of(row) not in (None, []) and reference_of(row) is not None


def is_scorable(row: Row) -> bool:
    """Whether the row holds text whose likelihood can be measured: prompt with completion, messages, or text."""
    if _holds(row, "prompt"):
        return _holds(row, "completion")
    return _holds(row, "messages") or _holds(row, "text")


def is_pair(row: Row) -> bool:
    """Whether the row holds a prompt with a chosen and a rejected completion."""
    return all(_holds(row, column) for column in ("prompt", "chosen", "rejected"))


def require(rows: Iterable[Row], what: str, accepts: str, condition: Callable[[Row], bool]) -> None:
    """Raise a ValueError naming the first row that fails ``condition`` and the columns it has."""
    for index, row in enumerate(rows):
        if not condition(row):
            found = sorted(column for column in row if _holds(row, column))
            raise ValueError(f"{what} needs {accepts}; row {index} has the columns {found}.")


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], row: Row, **options: Any
) -> Mapping[str, list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError("The rows hold chat messages but the tokenizer has no chat template; set chat_template on it.")
    tools = row.get("tools")
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
        **options,
    )
    return cast(Mapping[str, list[int]], encoded)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: Row | None = None) -> list[int]:
    """Token ids to generate from: special tokens as in training, messages with the generation prompt, never empty.

    Args:
        tokenizer: its padding settings are neither used nor changed.
        prompt: text, or chat messages.
        row: where ``tools`` and ``chat_template_kwargs`` of the chat template are looked up.

    Raises:
        ValueError: messages without a chat template, or an empty prompt for a tokenizer without bos and eos.
    """
    if not isinstance(prompt, str):
        return list(_chat_ids(tokenizer, prompt, row or {}, add_generation_prompt=True)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids and ids[-1] == eos and not prompt.endswith(str(tokenizer.eos_token)):
        # Some tokenizers close every text with eos; a prompt that is to be continued must stay open.
        ids.pop()
    if not ids:
        start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("A prompt has no tokens and the tokenizer neither bos nor eos to start from.")
        ids = [start]
    return ids


def _with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    eos = tokenizer.eos_token
    return text if eos is None or text.endswith(eos) else text + eos


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def scored_ids(
    tokenizer: PreTrainedTokenizerBase, row: Row, *, completion_only: bool = True, assistant_only: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a row and which of them are scored, as TRL's SFT prepares them.

    Prompt and prompt + completion are tokenised whole; the completion begins after their common prefix. Text gets eos
    appended unless it ends with it; chat rows take what the chat template writes.

    Args:
        completion_only: score the completion alone rather than prompt and completion.
        assistant_only: score what the chat template marks as generated (its ``{% generation %}`` blocks).

    Raises:
        ValueError: no chat template; assistant_only with plain text or with a template that marks nothing.
    """
    marks = {"return_assistant_tokens_mask": True} if assistant_only else {}
    if assistant_only and (isinstance(row.get("prompt"), str) or _holds(row, "text")):
        raise ValueError("assistant_only needs rows of chat messages, found plain text; leave it off.")
    if _holds(row, "prompt") and isinstance(row["prompt"], str):
        opening = list(tokenizer(row["prompt"])["input_ids"])
        encoded: Mapping[str, list[int]] = tokenizer(row["prompt"] + _with_eos(tokenizer, row["completion"]))
    elif _holds(row, "prompt"):
        opening = list(_chat_ids(tokenizer, row["prompt"], row, add_generation_prompt=True)["input_ids"])
        encoded = _chat_ids(tokenizer, row["prompt"] + row["completion"], row, **marks)
    else:
        opening = []
        encoded = (
            _chat_ids(tokenizer, row["messages"], row, **marks)
            if _holds(row, "messages")
            else tokenizer(_with_eos(tokenizer, row["text"]))
        )
    ids = list(encoded["input_ids"])
    start = _common_prefix(opening, ids) if completion_only else 0
    scored = [index >= start for index in range(len(ids))]
    if "assistant_masks" in encoded:
        if not any(encoded["assistant_masks"]):
            raise ValueError("assistant_only found no assistant tokens; the chat template needs generation blocks.")
        scored = [flag and bool(mark) for flag, mark in zip(scored, encoded["assistant_masks"], strict=True)]
    return ids, scored
