"""Rows of questions with their answers, paraphrases and perturbed answers."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data import fields
from posttrain.evaluation.rows import Row
from posttrain.evaluation.unlearning.tokens import AnswerScorer, AnswerTokens, Array


@dataclass(frozen=True)
class Question:
    """One row.

    Args:
        question, answer: as in the data.
        prompt: what the model is given: text, or chat messages.
        paraphrase: another wording of the answer; None where the data have none.
        perturbed: wrong answers, none where the data have none.
    """

    question: str
    answer: str
    prompt: fields.Text
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()

    def row(self, answer: str) -> Row:
        """Prompt and completion, as training sees them."""
        return {"prompt": self.prompt, "completion": fields.spaced_answer(answer, self.prompt)}


def read_questions(rows: Iterable[Row], *, template: str | None, chat: bool, key: str) -> list[Question]:
    """Questions from rows with ``question``, ``answer`` and, if any, ``paraphrased_answer`` and ``perturbed_answer``.

    Args:
        rows: of one data set.
        template: the prompt as a format string; None takes the chat template where there is one.
        chat: whether the tokenizer has a chat template.
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: no rows, a missing or empty question or answer, or a paraphrase or perturbed answers that some rows
            have and others lack; the message names the row.
    """
    found = []
    for index, row in enumerate(rows):
        given = dict(row)
        if index == 0:
            for name in ("question", "answer"):
                fields.require(name, given.keys(), key, "a question's row")
            if template is not None:
                fields.check_template(template, given.keys(), "question-answer", ("question-answer",), key)
        try:
            found.append(_question(given, template, chat))
        except ValueError as error:
            raise ValueError(f"{key}, row {index}: {error}") from error
    if not found:
        raise ValueError(f"{key} has no rows; give another source.")
    for column, has in (
        ("paraphrased_answer", [one.paraphrase is not None for one in found]),
        ("perturbed_answer", [bool(one.perturbed) for one in found]),
    ):
        if any(has) and not all(has):
            raise ValueError(
                f"{key}, row {has.index(False)}: {column} is missing, and other rows have it; complete the row or take "
                "the column out of all."
            )
    return found


def _question(row: dict[str, Any], template: str | None, chat: bool) -> Question:
    answer = _filled(row, "answer")
    paraphrase = row.get("paraphrased_answer")
    perturbed = row.get("perturbed_answer")
    several = [perturbed] if isinstance(perturbed, str) else list(perturbed or ())
    if any(not isinstance(one, str) or not one.strip() for one in several):
        raise ValueError(f"perturbed_answer is {perturbed!r}; expected texts that are not empty.")
    return Question(
        question=_filled(row, "question"),
        answer=answer,
        prompt=fields.question_prompt(row, template, chat),
        paraphrase=None if paraphrase is None else _filled(row, "paraphrased_answer"),
        perturbed=tuple(several),
    )


def _filled(row: dict[str, Any], name: str) -> str:
    found = fields.text(row, name)
    if not found.strip():
        raise ValueError(f"{name} is empty; expected text.")
    return found


def shared(one: Sequence[Question], other: Sequence[Question]) -> int:
    """How many of ``one``'s questions with their answers stand in ``other`` too."""
    known = {(row.question, row.answer) for row in other}
    return sum((row.question, row.answer) in known for row in one)


def fingerprint(questions: Iterable[Question]) -> str:
    """Digest of everything in the rows."""
    digest = hashlib.sha256()
    for one in questions:
        parts = [one.question, one.answer, one.prompt, one.paraphrase, one.perturbed]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ScoredQuestions:
    """The per-token statistics of one data set, from one pass over it.

    Args:
        answer: (items,) answers.
        paraphrase: (items,) paraphrases, None where there are none.
        perturbed: all perturbed answers, item after item, None where there are none.
        perturbed_counts: (items,) perturbed answers of each item.
    """

    answer: AnswerTokens
    paraphrase: AnswerTokens | None
    perturbed: AnswerTokens | None
    perturbed_counts: Array

    @property
    def perturbed_nll(self) -> list[Array] | None:
        """Per item, (perturbed answers,) nats a token."""
        if self.perturbed is None:
            return None
        return np.split(self.perturbed.mean_nll, np.cumsum(self.perturbed_counts)[:-1])


def score_questions(
    scorer: AnswerScorer, questions: Sequence[Question], what: str, *, answers_only: bool = False
) -> ScoredQuestions:
    """Score answers, paraphrases and perturbed answers together.

    Args:
        scorer: of the model.
        questions: of one data set.
        what: they are, for messages.
        answers_only: leave out paraphrases and perturbed answers.

    Raises:
        ValueError: as `AnswerScorer.sequences`.
    """
    rows = [one.row(one.answer) for one in questions]
    paraphrases = [] if answers_only else [one.row(one.paraphrase) for one in questions if one.paraphrase is not None]
    perturbed = [] if answers_only else [one.row(text) for one in questions for text in one.perturbed]
    counts = np.array([0 if answers_only else len(one.perturbed) for one in questions])
    tokens = scorer.rows([*rows, *paraphrases, *perturbed], what)
    ends = np.cumsum([len(rows), len(paraphrases), len(perturbed)])
    parts = [tokens.take(part) if len(part) else None for part in np.split(np.arange(len(tokens)), ends[:-1])]
    assert parts[0] is not None
    return ScoredQuestions(parts[0], parts[1], parts[2], counts)
