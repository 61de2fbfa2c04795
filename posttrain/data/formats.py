"""Rows of the usual formats to the rows that TRL's SFT reads: prompt + completion, messages, or text.

Every other column stays: it may be bound by an objective or read by a verifier.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value
from transformers import PreTrainedTokenizerBase

from posttrain import __version__
from posttrain.data import fields
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.skipping import skip
from posttrain.data.sources import Rows, columns_of
from posttrain.suggest import unknown

logger = logging.getLogger(__name__)

FORMATS = ("auto", "prompt-completion", "messages", "sharegpt", "instruction", "question-answer", "text", "tokenized")

_PRODUCED = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "instruction": ("prompt", "completion"),
    "question-answer": ("prompt", "completion"),
    "text": ("text",),
}
_SCORED = "format 'scored' is for several scored answers to a prompt, which the method supervised does not read"


def prepare(
    rows: Rows,
    *,
    format: str = "auto",
    template: str | None = None,
    chat: bool = False,
    training: bool = True,
    key: str = "data",
) -> Rows:
    """Bring rows into a form that training and evaluation read.

    - ``prompt-completion``: text or message lists in ``prompt`` and ``completion``.
    - ``messages``: ``messages`` of ``role`` and ``content``.
    - ``sharegpt``: ``conversations`` of ``from`` and ``value`` (and a ``system`` column), to ``messages``.
    - ``instruction``: ``instruction``, ``input`` or ``context`` if any, ``output`` or ``response``; to a chat prompt
      where the tokenizer has a chat template, else to a plain one.
    - ``question-answer``: ``question`` and ``answer``, to a chat prompt where the tokenizer has a chat template, else
      to ``fields.QUESTION_TEMPLATE``; a space parts prompt and answer, as `posttrain.evaluation.unlearning` measures.
    - ``text``: ``text``, trained in full. ``tokenized``: ``input_ids``, as they are.

    Args:
        rows: as `posttrain.data.sources.load` gives them.
        format: one of `FORMATS`; ``auto`` decides by the columns.
        template: the prompt as a format string over the columns.
        chat: whether the tokenizer has a chat template.
        training: rows must hold a completion, and those with an empty one are skipped and reported.
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: an unknown format, columns that fit none, a template that names no column, or a row without a
            field (its number is named).
    """
    columns = columns_of(rows)
    chosen = resolve(format, columns, template, training, key)
    if chosen == "tokenized":
        return rows
    consumed = check_columns(chosen, columns, template, training, key)
    produced = _PRODUCED[chosen]
    dropped = [name for name in columns if (name in consumed or name in fields.TEXT_COLUMNS) and name not in produced]
    converter = Converter(chosen, template, chat, training, key)
    rows = rows.map(converter, remove_columns=dropped, features=_features_where_numbers(rows, produced, dropped))
    if not training:
        return rows
    return skip(rows, _has_target, name=key, cause=f"its {'text' if chosen == 'text' else 'completion'} is empty")


def holds_messages(rows: Rows) -> bool:
    """Whether prepared rows need a chat template."""
    columns = columns_of(rows)
    return "messages" in columns or ("prompt" in columns and not isinstance(next(iter(rows))["prompt"], str))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template a plain one, which is saved with it."""
    if tokenizer.chat_template is not None:
        return
    ids = tokenizer("a")["input_ids"]
    starts_with_bos = tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + _PLAIN_CHAT
    logger.info("The tokenizer has no chat template: messages are written as lines of role and content.")


# The newline after the role keeps the tokens of an open prompt a prefix of those of the whole conversation.
_PLAIN_CHAT = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token or '' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Converter:
    """One row to its text columns; ``version`` makes the data sets library forget results of other releases."""

    format: str
    template: str | None
    chat: bool
    training: bool
    key: str
    version: str = __version__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.format == "prompt-completion":
                return self._prompt_completion(row)
            if self.format == "instruction":
                return self._instruction(row)
            if self.format == "question-answer":
                prompt = fields.question_prompt(row, self.template, self.chat)
                return {"prompt": prompt, "completion": fields.spaced_answer(fields.text(row, "answer"), prompt)}
            if self.format == "text":
                return {"text": fields.text(row, "text")}
            return {"messages": fields.messages(row, "messages" if self.format == "messages" else "conversations")}
        except ValueError as error:
            raise ValueError(f"{self.key}, row {row.get(ROW_NUMBER)}: {error}") from error

    def _prompt_completion(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = (
            fields.fill(self.template, row) if self.template is not None else fields.text_or_messages(row, "prompt")
        )
        if not self.training and row.get("completion") is None:
            return {"prompt": prompt}
        completion = fields.text_or_messages(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("of prompt and completion one is text and the other messages; give both in one form.")
        return {"prompt": prompt, "completion": completion}

    def _instruction(self, row: dict[str, Any]) -> dict[str, Any]:
        completion = fields.text(row, fields.first_of(("output", "response"), row))
        prompt = fields.instruction_prompt(row, self.template, self.chat)
        return {"prompt": prompt, "completion": fields.answer(completion, prompt)}


def resolve(format: str, columns: Collection[str], template: str | None, training: bool, key: str) -> str:
    """The format itself, or for ``auto`` the one that fits the columns."""
    if format == "scored":
        raise ValueError(f"{key}.{_SCORED}; choose another format.")
    if format not in FORMATS:
        raise ValueError(unknown(f"{key}.format", format, FORMATS))
    if format != "auto":
        return format
    has = set(columns).__contains__
    answered = has("completion") or not training
    for name, fits in (
        ("instruction", has("instruction") and (has("output") or has("response")) and not has("completion")),
        ("prompt-completion", template is not None or (has("prompt") and has("completion"))),
        ("tokenized", has("input_ids")),
        ("messages", has("messages")),
        ("sharegpt", has("conversations")),
        ("text", has("text")),
        ("prompt-completion", has("prompt") and answered),
    ):
        if fits:
            return name
    raise ValueError(
        f"{key} has the columns {list(columns)}, which fit no format; rename them with {key}.columns to prompt and "
        f"completion, messages, or text, or write the prompt as {key}.template."
    )


def check_columns(
    format: str, columns: Collection[str], template: str | None, training: bool, key: str
) -> tuple[str, ...]:
    """The source columns that a format reads and replaces, once they are known to be there."""
    if template is not None:
        fields.check_template(template, columns, format, ("prompt-completion", "instruction", "question-answer"), key)
    if format == "prompt-completion":
        needed: tuple[str, ...] = () if template is not None else ("prompt",)
        needed += ("completion",) if training else ()
    elif format == "instruction":
        needed = () if template is not None else ("instruction",)
        needed += (fields.first_of(("output", "response"), columns),)
    elif format == "question-answer":
        needed = ("question", "answer")
    else:
        needed = ("conversations",) if format == "sharegpt" else (format,)
    for name in needed:
        fields.require(name, columns, key, f"format {format!r}")
    # the system prompt moves into the messages; other columns may serve objectives and verifiers beside the text
    return (
        (*fields.INSTRUCTION_COLUMNS, "output", "response")
        if format == "instruction"
        else ("system",) * (format == "sharegpt")
    )


def _features_where_numbers(rows: Rows, produced: Collection[str], dropped: Collection[str]) -> Features | None:
    """Features that turn a numeric column into text; left alone, ``map`` would turn the text into numbers again."""
    found: dict[str, Any] = dict(rows.features or {})
    if all(str(getattr(found.get(name), "dtype", "string")) in ("string", "large_string") for name in produced):
        return None
    kept = {name: feature for name, feature in found.items() if name not in dropped}
    return Features(kept | dict.fromkeys(produced, Value("string")))  # type: ignore[arg-type]


def _has_target(row: dict[str, Any]) -> bool:
    """Whether anything in a prepared row can be trained."""
    return not fields.is_empty(next(row[name] for name in ("completion", "messages", "text") if name in row))
