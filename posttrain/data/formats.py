"""Rows of the usual formats to the rows that TRL's SFT reads: prompt + completion, messages, or text.

Every other column stays: it may be bound by an objective or read by a verifier.
"""

import logging
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value
from transformers import PreTrainedTokenizerBase

from posttrain import __version__
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.skipping import skip
from posttrain.data.sources import Rows, columns_of
from posttrain.suggest import nearest, unknown

logger = logging.getLogger(__name__)

FORMATS = ("auto", "prompt-completion", "messages", "sharegpt", "instruction", "text", "tokenized")

_PRODUCED = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "instruction": ("prompt", "completion"),
    "text": ("text",),
}
_TEXT_COLUMNS = frozenset(["prompt", "completion", "messages", "conversations", "text"])
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
          "observation": "tool", "function_call": "assistant"}  # fmt: skip
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
    chosen = _resolve(format, columns, template, training, key)
    if chosen == "tokenized":
        return rows
    consumed = _check_columns(chosen, columns, template, training, key)
    produced = _PRODUCED[chosen]
    dropped = [name for name in columns if (name in consumed or name in _TEXT_COLUMNS) and name not in produced]
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
            if self.format == "text":
                return {"text": _text(row, "text")}
            return {"messages": _messages(row, "messages" if self.format == "messages" else "conversations")}
        except ValueError as error:
            raise ValueError(f"{self.key}, row {row.get(ROW_NUMBER)}: {error}") from error

    def _prompt_completion(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = _fill(self.template, row) if self.template is not None else _text_or_messages(row, "prompt")
        if not self.training and row.get("completion") is None:
            return {"prompt": prompt}
        completion = _text_or_messages(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("of prompt and completion one is text and the other messages; give both in one form.")
        return {"prompt": prompt, "completion": completion}

    def _instruction(self, row: dict[str, Any]) -> dict[str, Any]:
        completion = _text(row, _first_of(("output", "response"), row))
        if self.template is not None:
            return {"prompt": _fill(self.template, row), "completion": completion}
        instruction = _text(row, "instruction")
        extra = row.get("input") or row.get("context") or ""
        if self.chat:
            content = f"{instruction}\n\n{extra}" if extra else instruction
            return {"prompt": [_message("user", content)], "completion": [_message("assistant", completion)]}
        middle = f"Input:\n{extra}\n" if extra else ""
        return {"prompt": f"Instruction:\n{instruction}\n{middle}Response:\n", "completion": completion}


def _resolve(format: str, columns: Collection[str], template: str | None, training: bool, key: str) -> str:
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


def _check_columns(
    format: str, columns: Collection[str], template: str | None, training: bool, key: str
) -> tuple[str, ...]:
    """The source columns that a format reads and replaces, once they are known to be there."""
    if template is not None:
        if format not in ("prompt-completion", "instruction"):
            raise ValueError(f"{key}.template is set, and format {format!r} has no prompt to fill; leave it out.")
        for name in _template_fields(template, key):
            _require(name, columns, key, "template")
    if format == "prompt-completion":
        needed: tuple[str, ...] = () if template is not None else ("prompt",)
        needed += ("completion",) if training else ()
    elif format == "instruction":
        needed = () if template is not None else ("instruction",)
        needed += (_first_of(("output", "response"), columns),)
    else:
        needed = ("conversations",) if format == "sharegpt" else (format,)
    for name in needed:
        _require(name, columns, key, f"format {format!r}")
    # the system prompt moves into the messages; other columns may serve objectives and verifiers beside the text
    return (
        ("instruction", "input", "context", "output", "response")
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


def _require(name: str, columns: Collection[str], key: str, what: str) -> None:
    if name not in columns:
        match = nearest(name, columns)
        hint = f" (did you mean {match!r}?)" if match else ""
        raise ValueError(
            f"{key}: {what} needs the column {name!r}, which is not there{hint}; the columns are {list(columns)}, and "
            f"{key}.columns renames them."
        )


def _template_fields(template: str, key: str) -> list[str]:
    try:
        names = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{key}.template {template!r} is no format string: {error}.") from error
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{key}.template {template!r} has the field {{{name}}}; name a column between the braces.")
    return names


def _fill(template: str, row: dict[str, Any]) -> str:
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    return template.format(**{name: _text(row, name) for name in fields})


def _first_of(names: tuple[str, ...], present: Collection[str]) -> str:
    return next((name for name in names if name in present), names[0])


def _text(row: dict[str, Any], name: str) -> str:
    """A column's text; a number is written out, a whole one without decimals."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} is {'missing' if value is None else repr(value)}; expected text.")


def _text_or_messages(row: dict[str, Any], name: str) -> str | list[dict[str, Any]]:
    return _messages(row, name) if isinstance(row.get(name), list) else _text(row, name)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages in a column, ShareGPT's ``from`` and ``value`` turned into ``role`` and ``content``."""
    given = row.get(name)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{name} is {'missing' if given is None else repr(given)}; expected a list of messages.")
    messages: list[dict[str, Any]] = []
    for index, entry in enumerate(given):
        renamed = {{"from": "role", "value": "content"}.get(field, field): value for field, value in entry.items()}
        role = renamed.get("role")
        if not isinstance(role, str) or "content" not in renamed:
            raise ValueError(f"message {index} of {name} has the keys {sorted(entry)}; expected role and content.")
        if renamed["content"] is None and not renamed.get("tool_calls"):
            raise ValueError(f"message {index} of {name} has no content; expected text.")
        messages.append({**renamed, "role": _ROLES.get(role, role)})
    if name == "conversations" and row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, _message("system", row["system"]))
    return messages


def _has_target(row: dict[str, Any]) -> bool:
    """Whether anything in a prepared row can be trained."""
    target = next(row[name] for name in ("completion", "messages", "text") if name in row)
    if isinstance(target, str):
        return bool(target.strip())
    answers = [message for message in target if message["role"] == "assistant"]
    return any(message.get("tool_calls") or str(message["content"] or "").strip() for message in answers)
