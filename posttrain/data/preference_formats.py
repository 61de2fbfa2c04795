"""Rows of the usual formats of pairs to ``prompt``, ``chosen`` and ``rejected``, all text or all messages.

Every other column stays: it may be bound by an objective.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import __version__
from posttrain.data import fields, scored
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.fields import Messages, Text
from posttrain.data.replacing import replace
from posttrain.data.scores import score
from posttrain.data.skipping import skip
from posttrain.data.sources import Rows, columns_of
from posttrain.data.transcripts import split_conversations, split_transcripts
from posttrain.suggest import unknown

FORMATS = ("auto", "preference", "sharegpt", "instruction", "dialogue", "scored")
PRODUCED = ("prompt", "chosen", "rejected")

_WITH_PROMPT = ("preference", "instruction", "scored")


def prepare(
    rows: Rows,
    *,
    format: str = "auto",
    template: str | None = None,
    chat: bool = False,
    pairs: str = "all",
    inverted: str = "keep",
    ties: str = "keep",
    key: str = "data",
) -> Rows:
    """Bring rows into the form that pairs are trained in.

    - ``preference``: text or messages in ``prompt``, ``chosen`` and ``rejected``; messages of chosen and rejected may
      be whole conversations with a common start, and need no prompt beside them.
    - ``sharegpt``: ``conversations`` or ``messages`` as the prompt, ``chosen`` and ``rejected`` one message each.
    - ``instruction``: ``instruction``, ``input`` or ``context`` if any, ``chosen`` and ``rejected``; to a chat prompt
      where the tokenizer has a chat template, else to a plain one.
    - ``dialogue``: ``chosen`` and ``rejected`` are transcripts of turns of ``Human:`` and ``Assistant:``, cut at the
      last turn of the assistant that both begin; to messages where the tokenizer has a chat template.
    - ``scored``: a list of answers and a list of their scores, see `posttrain.data.scored`.

    Pairs with an empty completion or with equal ones are skipped and reported; scores are checked as in
    `posttrain.data.scores.score`.

    Args:
        rows: as `posttrain.data.sources.load` gives them.
        format: one of `FORMATS`; ``auto`` decides by the columns.
        template: the prompt as a format string over the columns.
        chat: whether the tokenizer has a chat template.
        pairs: of a list of scored answers: ``all`` or ``best_worst``.
        inverted, ties: as in `posttrain.data.scores.score`.
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: an unknown format, columns that fit none, a template that names no column, a row without a field or
            with a score that is no number (its number is named), or no row is left.
    """
    columns = columns_of(rows)
    chosen = _resolve(format, rows, columns, template, key)
    consumed = _check_columns(chosen, columns, template, key)
    if chosen == "scored":
        rows = scored.to_pairs(rows, template=template, chat=chat, pairs=pairs, key=key)
    else:
        dropped = (*consumed, *fields.TEXT_COLUMNS.difference(PRODUCED))
        rows = replace(rows, PairConverter(chosen, template, chat, key), produced=PRODUCED, dropped=dropped)
    rows = skip(rows, _is_complete, name=key, cause="its chosen or rejected completion is empty")
    rows = skip(rows, _differ, name=key, cause="chosen and rejected are equal")
    return score(rows, inverted=inverted, ties=ties, key=key)


def holds_pairs(rows: Rows, format: str) -> bool:
    """Whether rows read as pairs: their format says so, or they have both completions."""
    return format in ("preference", "dialogue", "scored") or {"chosen", "rejected"} <= set(columns_of(rows))


@dataclass(frozen=True)
class PairConverter:
    """One row to its prompt and completions; ``version`` as in `posttrain.data.formats.Converter`."""

    format: str
    template: str | None
    chat: bool
    key: str
    version: str = __version__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            prompt, chosen, rejected = self._pair(row)
        except ValueError as error:
            raise ValueError(f"{self.key}, row {row.get(ROW_NUMBER)}: {error}") from error
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _pair(self, row: dict[str, Any]) -> tuple[Text, Text, Text]:
        if self.format == "preference":
            return self._preference(row)
        if self.format == "sharegpt":
            prompt: Text = fields.messages(row, fields.first_of(("conversations", "messages"), row))
            return prompt, _one_message(row, "chosen"), _one_message(row, "rejected")
        texts = [fields.text(row, name) for name in ("chosen", "rejected")]
        if self.format == "dialogue":
            prompt, answers = split_transcripts(texts, self.chat)
        else:
            prompt = fields.instruction_prompt(row, self.template, self.chat)
            answers = [fields.answer(text, prompt) for text in texts]
        return prompt, answers[0], answers[1]

    def _preference(self, row: dict[str, Any]) -> tuple[Text, Text, Text]:
        chosen, rejected = (fields.text_or_messages(row, name) for name in ("chosen", "rejected"))
        if self.template is not None:
            prompt: Text | None = fields.fill(self.template, row)
        else:
            prompt = None if row.get("prompt") is None else fields.text_or_messages(row, "prompt")
        if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
            common, chosen, rejected = split_conversations(chosen, rejected)
            if prompt not in (None, common, *(one["content"] for one in common)):
                raise ValueError("prompt is not what the conversations chosen and rejected begin with; leave it out.")
            return common, chosen, rejected
        if prompt is None:
            raise ValueError("prompt is missing; expected text or messages.")
        require_one_form(prompt, chosen, rejected)
        return prompt, chosen, rejected


def require_one_form(prompt: Text, *completions: Text) -> None:
    """Raise a ValueError unless a prompt and its completions are all text or all messages."""
    if any(isinstance(completion, str) != isinstance(prompt, str) for completion in completions):
        raise ValueError("of the prompt and its completions one is text and another messages; give all in one form.")


def _one_message(row: dict[str, Any], name: str) -> Messages:
    value = row.get(name)
    if isinstance(value, str):
        return [fields.message("assistant", value)]
    return fields.messages({name: [value] if isinstance(value, dict) else value}, name)


def _resolve(format: str, rows: Rows, columns: Collection[str], template: str | None, key: str) -> str:
    if format not in FORMATS:
        raise ValueError(unknown(f"{key}.format", format, FORMATS))
    if format != "auto":
        return format
    has = set(columns).__contains__
    if has("chosen") and has("rejected"):
        example = next(iter(rows))["chosen"]
        for name, fits in (
            ("sharegpt", has("conversations") or (has("messages") and isinstance(example, dict))),
            ("instruction", has("instruction") and not has("prompt")),
            ("preference", template is not None or has("prompt") or isinstance(example, list)),
            ("dialogue", True),
        ):
            if fits:
                return name
    if scored.list_columns(columns) is not None:
        return "scored"
    raise ValueError(
        f"{key} has the columns {list(columns)}, which fit no format of pairs; rename them with {key}.columns to "
        "prompt, chosen and rejected, or to answers and scores."
    )


def _check_columns(format: str, columns: Collection[str], template: str | None, key: str) -> Sequence[str]:
    """The source columns that a format reads and replaces, once they are known to be there."""
    if template is not None:
        fields.check_template(template, columns, format, _WITH_PROMPT, key)
    needed: Mapping[str, tuple[str, ...]] = {
        "sharegpt": (fields.first_of(("conversations", "messages"), columns),),
        "instruction": () if template is not None else ("instruction",),
    }
    if format != "scored":
        for name in (*needed.get(format, ()), "chosen", "rejected"):
            fields.require(name, columns, key, f"format {format!r}")
    return {"instruction": fields.INSTRUCTION_COLUMNS, "sharegpt": ("system",)}.get(format, ())


def _is_complete(row: dict[str, Any]) -> bool:
    return not (fields.is_empty(row["chosen"]) or fields.is_empty(row["rejected"]))


def _differ(row: dict[str, Any]) -> bool:
    return bool(row["chosen"] != row["rejected"])
