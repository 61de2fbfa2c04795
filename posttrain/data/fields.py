"""The fields of one row: text, messages, and prompts made of several columns."""

import string
from collections.abc import Collection
from typing import Any

from posttrain.suggest import nearest

# Columns that hold text to train on; beside the ones a format produces, TRL would read them as something else.
TEXT_COLUMNS = frozenset(["prompt", "completion", "messages", "conversations", "text"])
INSTRUCTION_COLUMNS = ("instruction", "input", "context")
# The prompt of a question where neither a template is given nor the tokenizer has one for chats.
QUESTION_TEMPLATE = "Question: {question}\nAnswer:"
Messages = list[dict[str, Any]]
Text = str | Messages

_KEYS = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
          "observation": "tool", "function_call": "assistant"}  # fmt: skip


def text(row: dict[str, Any], name: str) -> str:
    """A column's text; a number is written out, a whole one without decimals."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} is {'missing' if value is None else repr(value)}; expected text.")


def text_or_messages(row: dict[str, Any], name: str) -> Text:
    """A column's text, or its messages where it holds a list."""
    return messages(row, name) if isinstance(row.get(name), list) else text(row, name)


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages(row: dict[str, Any], name: str) -> Messages:
    """The messages in a column, ShareGPT's ``from`` and ``value`` turned into ``role`` and ``content``."""
    given = row.get(name)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{name} is {'missing' if given is None else repr(given)}; expected a list of messages.")
    found: Messages = []
    for index, entry in enumerate(given):
        if not isinstance(entry, dict):
            raise ValueError(f"message {index} of {name} is {entry!r}; expected role and content.")
        renamed: dict[str, Any] = {_KEYS.get(field) or field: value for field, value in entry.items()}
        role = renamed.get("role")
        if not isinstance(role, str) or "content" not in renamed:
            raise ValueError(f"message {index} of {name} has the keys {sorted(entry)}; expected role and content.")
        if renamed["content"] is None and not renamed.get("tool_calls"):
            raise ValueError(f"message {index} of {name} has no content; expected text.")
        found.append({**renamed, "role": _ROLES.get(role, role)})
    if name == "conversations" and row.get("system") and found[0]["role"] != "system":
        found.insert(0, message("system", row["system"]))
    return found


def instruction_prompt(row: dict[str, Any], template: str | None, chat: bool) -> Text:
    """The prompt of an instruction and its input, if any: a chat prompt where there is a chat template."""
    if template is not None:
        return fill(template, row)
    instruction = text(row, "instruction")
    extra = row.get("input") or row.get("context") or ""
    if chat:
        return [message("user", f"{instruction}\n\n{extra}" if extra else instruction)]
    middle = f"Input:\n{extra}\n" if extra else ""
    return f"Instruction:\n{instruction}\n{middle}Response:\n"


def question_prompt(row: dict[str, Any], template: str | None, chat: bool) -> Text:
    """The prompt of a question: by the template, else a chat prompt where there is a chat template, else plain text."""
    if template is None and chat:
        return [message("user", text(row, "question"))]
    return fill(QUESTION_TEMPLATE if template is None else template, row)


def spaced_answer(given: str, prompt: Text) -> Text:
    """An answer in the form of its prompt; in text, a space parts it from a prompt that does not end in white space."""
    if not isinstance(prompt, str):
        return [message("assistant", given)]
    return given if not prompt or prompt[-1].isspace() else " " + given


def answer(given: str, prompt: Text) -> Text:
    """An answer's text in the form of its prompt: text, or the assistant's message."""
    return given if isinstance(prompt, str) else [message("assistant", given)]


def is_empty(target: Text) -> bool:
    """Whether nothing in a completion, or by the assistant in messages, can be trained."""
    if isinstance(target, str):
        return not target.strip()
    answers = [one for one in target if one["role"] == "assistant"]
    return not any(one.get("tool_calls") or str(one["content"] or "").strip() for one in answers)


def template_fields(template: str, key: str) -> list[str]:
    """The columns a template names."""
    try:
        names = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{key}.template {template!r} is no format string: {error}.") from error
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{key}.template {template!r} has the field {{{name}}}; name a column between the braces.")
    return names


def check_template(
    template: str, columns: Collection[str], format: str, with_prompt: Collection[str], key: str
) -> None:
    """Raise a ValueError unless the format is one ``with_prompt`` to fill, and the template's columns are there."""
    if format not in with_prompt:
        raise ValueError(f"{key}.template is set, and format {format!r} has no prompt to fill; leave it out.")
    for name in template_fields(template, key):
        require(name, columns, key, "template")


def fill(template: str, row: dict[str, Any]) -> str:
    """The template's text with a row's columns in it."""
    names = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    return template.format(**{name: text(row, name) for name in names})


def first_of(names: tuple[str, ...], present: Collection[str]) -> str:
    """The first of the names that is present, else the first."""
    return next((name for name in names if name in present), names[0])


def require(name: str, columns: Collection[str], key: str, what: str) -> None:
    """Raise a ValueError where a column is missing, naming the nearest."""
    if name not in columns:
        match = nearest(name, columns)
        hint = f" (did you mean {match!r}?)" if match else ""
        raise ValueError(
            f"{key}: {what} needs the column {name!r}, which is not there{hint}; the columns are {list(columns)}, and "
            f"{key}.columns renames them."
        )
