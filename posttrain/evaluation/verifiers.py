"""Verifiers: does a completion answer its row, and which answer did it give (for the majority vote)?"""

import importlib.util
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack, closing
from typing import NamedTuple

from posttrain.evaluation.math_process import MathProcess
from posttrain.evaluation.rows import Row, reference_of
from posttrain.suggest import unknown

_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"[-+]?\s*[$€£]?\s*[-+]?(\d[\d,]*(\.\d*)?|\.\d+)(\s*/\s*\d+|\s+\d+/\d+)?\s*%?\.?")
_LATEX = re.compile(r"\\(boxed|[dt]?frac|sqrt)\b|^\$.*\$$")


class Verdict(NamedTuple):
    """``answer``: the normalised answer that a completion gave, None where none could be read; ``correct``."""

    answer: str | None
    correct: bool


def final_answer(text: str) -> str:
    """The rest of the line after the first ``####``, as GSM8K marks it, or the whole text where there is no mark.

    The first mark counts: a model that runs on past its answer writes further questions with marks of their own.
    """
    _, mark, tail = text.partition(_MARK)
    if not mark:
        return text.strip()
    return next((line.strip() for line in tail.splitlines() if line.strip()), "")


def normalise(text: str) -> str:
    """Unicode-compatible, case-folded text with single spaces and without a closing full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


class Verifier(ABC):
    """Judges completions; a context manager, because some hold a process.

    Attributes:
        name: as in the configuration.
        unjudged: completions that could not be judged (time ran out) and therefore count as wrong.
    """

    name: str

    def __init__(self) -> None:
        self.unjudged = 0
        self._held = ExitStack()

    @abstractmethod
    def __call__(self, completion: str, row: Row) -> Verdict:
        """Judge one completion of one row."""

    def close(self) -> None:
        """Give back what the verifier holds."""
        self._held.close()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reference(row: Row) -> str:
    reference = reference_of(row)
    if reference is None:
        found = sorted(column for column, value in row.items() if value is not None)
        raise ValueError(f"A verifier needs a column answer or completion to compare with, found the columns {found}.")
    return reference


class ExactVerifier(Verifier):
    """Equality of the normalised final answers."""

    name = "exact"

    def __call__(self, completion: str, row: Row) -> Verdict:
        answer = normalise(final_answer(completion))
        return Verdict(answer or None, answer == normalise(final_answer(_reference(row))))


class MathVerifier(Verifier):
    """Mathematical equality by math-verify: 1/2 is 0.5 is \\frac{1}{2}, and 1,000 is 1000.

    A completion with ``####`` is judged by what follows it, one without by the last expression that math-verify finds
    in it. A reference that holds no mathematics is compared as text, as `ExactVerifier` does.

    Args:
        timeout: seconds for one completion; one that needs longer counts as wrong and in ``unjudged``.

    Raises:
        ImportError: math-verify is not installed.
    """

    name = "math"

    def __init__(self, timeout: float = 10.0) -> None:
        require_extra("math_verify", "math-verify", "The verifier math")
        super().__init__()
        self._process = self._held.enter_context(closing(MathProcess(timeout)))
        self._known: dict[tuple[str, str], Verdict | None] = {}

    def __call__(self, completion: str, row: Row) -> Verdict:
        gold, candidate = final_answer(_reference(row)), final_answer(_CALCULATOR.sub("", completion))
        if (gold, candidate) not in self._known:
            self._known[gold, candidate] = self._judge(gold, candidate)
        verdict = self._known[gold, candidate]
        if verdict is None:
            self.unjudged += 1
            return Verdict(normalise(candidate) or None, False)
        return verdict

    def _judge(self, gold: str, candidate: str) -> Verdict | None:
        response = self._process.ask(gold, candidate)
        if response is None:
            return None
        if not response["readable"]:
            text = normalise(candidate)
            return Verdict(text or None, text == normalise(gold))
        return Verdict(response["answer"], bool(response["correct"]))


def _task_of(row: Row) -> str | None:
    """The procedural task that made the row, from its column ``task`` or from the metadata that tasks write."""
    metadata = row.get("metadata")
    if row.get("task") or not isinstance(metadata, str) or not metadata.startswith("{"):
        return row.get("task")
    recorded = json.loads(metadata)
    return recorded.get("task") if "problem" in recorded else None


class TaskVerifier(Verifier):
    """The procedural task's own verifier.

    Args:
        task: the task of all rows; None reads it off each row.

    Raises:
        ImportError: reasoning-gym is not installed.
    """

    name = "task"

    def __init__(self, task: str | None = None) -> None:
        require_extra("reasoning_gym", "reasoning-gym", "The verifier task")
        super().__init__()
        self._task = task

    def __call__(self, completion: str, row: Row) -> Verdict:
        from posttrain.data import procedural

        task = self._task or _task_of(row)
        if task is None:
            raise ValueError("The verifier task needs a procedural task: name it for the row set or in a column task.")
        answer = normalise(final_answer(completion))
        return Verdict(answer or None, bool(procedural.verify(task, completion, row)))


def require_extra(module: str, package: str, what: str) -> None:
    """Raise an ImportError that names the extra unless ``module`` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what} needs {package}, which is not installed; run `pip install posttrain[evaluation]`.")


def looks_mathematical(text: str) -> bool:
    """Whether a reference is a number, holds LaTeX mathematics, or marks its answer with ``####``."""
    answer = final_answer(text)
    return _MARK in text or _NUMBER.fullmatch(answer) is not None or _LATEX.search(answer) is not None


def names() -> list[str]:
    """The verifiers' names as ``verifier:`` takes them."""
    return ["auto", "exact", "math", "task"]


def resolve(name: str, rows: Iterable[Row], task: str | None = None) -> Verifier:
    """The verifier for a row set.

    ``auto`` is ``task`` for a procedural row set (a task is given, or the rows say which task made them), ``math``
    where every reference looks mathematical, and ``exact`` otherwise.

    Raises:
        ValueError: unknown name; the nearest known one is suggested.
        ImportError: the verifier's package is not installed.
    """
    if name not in names():
        raise ValueError(unknown("verifier", name, names()))
    rows = list(rows)
    if name == "task" or (name == "auto" and (task is not None or all(map(_task_of, rows)))):
        return TaskVerifier(task)
    if name == "math" or (name == "auto" and all(looks_mathematical(_reference(row)) for row in rows)):
        return MathVerifier()
    return ExactVerifier()
