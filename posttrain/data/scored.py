"""Lists of scored answers to pairs."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import __version__
from posttrain.data import fields
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.fields import Text
from posttrain.data.replacing import replace
from posttrain.data.skipping import skip
from posttrain.data.sources import Rows, columns_of
from posttrain.data.transcripts import split_transcripts

PRODUCED = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
_ANSWERS = ("answers", "responses", "completions", "text")
_SCORES = ("scores", "ratings", "score")


def list_columns(columns: Collection[str]) -> tuple[str, str] | None:
    """The columns of answers and of scores, or None where there are not both."""
    found = fields.first_of(_ANSWERS, columns), fields.first_of(_SCORES, columns)
    return found if set(found) <= set(columns) else None


def to_pairs(rows: Rows, *, template: str | None, chat: bool, pairs: str, key: str) -> Rows:
    """Rows of answers and scores to rows of two answers, with ``chosen_score`` and ``rejected_score``.

    The prompt is the template's, the column ``prompt`` or an instruction; without these each answer is a whole
    transcript. ``all`` makes a pair of any two answers, the earlier one chosen as given; ``best_worst`` one pair a row,
    the answer with the highest score chosen, that with the lowest rejected. Rows with fewer than two answers (for
    ``best_worst`` with scores) are skipped and reported. A pair has the number of its row.

    Raises:
        ValueError: there are no such columns, a row's lists are none or differ in length, or a score is no number.
    """
    columns = columns_of(rows)
    found = list_columns(columns)
    if found is None:
        raise ValueError(
            f"{key}: format 'scored' needs a column of answers and one of their scores, and the columns are "
            f"{list(columns)}; rename two of them with {key}.columns to answers and scores."
        )
    converter = ScoredConverter(*found, template, chat, pairs, key)
    usable = "answers" if pairs == "all" else "scored answers"
    rows = skip(rows, converter.makes_pairs, name=key, cause=f"it has fewer than two {usable}")
    dropped = (*found, *fields.INSTRUCTION_COLUMNS, *fields.TEXT_COLUMNS)
    return replace(rows, converter, produced=PRODUCED, dropped=dropped, batched=True)


@dataclass(frozen=True)
class ScoredConverter:
    """A batch of rows to a batch of pairs; ``version`` as in `posttrain.data.formats.Converter`."""

    answers: str
    scores: str
    template: str | None
    chat: bool
    pairs: str
    key: str
    version: str = __version__

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = [pair for row in rows for pair in self._row(row)]
        return {name: [pair[name] for pair in pairs] for name in pairs[0]}

    def makes_pairs(self, row: dict[str, Any]) -> bool:
        """Whether a row has two answers, with scores where these decide."""
        scores = self._scores(row)
        return len(scores) - (sum(map(math.isnan, scores)) if self.pairs == "best_worst" else 0) >= 2

    def _row(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        scores = self._scores(row)
        try:
            prompt, answers = self._answers(row)
        except ValueError as error:
            raise ValueError(f"{self.key}, row {row.get(ROW_NUMBER)}: {error}") from error
        replaced = (self.answers, self.scores, *fields.INSTRUCTION_COLUMNS, *fields.TEXT_COLUMNS)
        kept = {name: value for name, value in row.items() if name not in replaced}
        return [
            {
                **kept, "prompt": prompt, "chosen": answers[i], "rejected": answers[j],
                "chosen_score": scores[i], "rejected_score": scores[j],
            }
            for i, j in self._chosen_and_rejected(scores)
        ]  # fmt: skip

    def _chosen_and_rejected(self, scores: Sequence[float]) -> list[tuple[int, int]]:
        if self.pairs == "all":
            return list(itertools.combinations(range(len(scores)), 2))
        order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])
        return [(order[0], order[-1])]

    def _answers(self, row: dict[str, Any]) -> tuple[Text, list[Text]]:
        given = row[self.answers]
        whole = self.template is None and row.get("prompt") is None and "instruction" not in row
        if whole:
            return split_transcripts([_text(self.answers, i, text) for i, text in enumerate(given)], self.chat)
        if row.get("prompt") is None or self.template is not None:
            prompt = fields.instruction_prompt(row, self.template, self.chat)
        else:
            prompt = fields.text_or_messages(row, "prompt")
        answers: list[Text] = []
        for i, entry in enumerate(given):
            if isinstance(entry, list) and isinstance(prompt, list):
                answers.append(
                    fields.messages({f"answer {i} of {self.answers}": entry}, f"answer {i} of {self.answers}")
                )
            else:
                answers.append(fields.answer(_text(self.answers, i, entry), prompt))
        return prompt, answers

    def _scores(self, row: dict[str, Any]) -> list[float]:
        """The scores, NaN for a missing one."""
        place = f"{self.key}, row {row.get(ROW_NUMBER)}"
        answers, scores = row.get(self.answers), row.get(self.scores)
        if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
            raise ValueError(
                f"{place}: {self.answers} and {self.scores} are no lists of one length; give each answer a score."
            )
        for value in scores:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{place}: {self.scores} holds {value!r}; give numbers, or null where there is none.")
        return [math.nan if value is None else float(value) for value in scores]


def _text(column: str, index: int, value: Any) -> str:
    name = f"answer {index} of {column}"
    return fields.text({name: value}, name)
