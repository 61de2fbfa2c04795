"""Invented authors to learn and to forget: a task of TOFU's form (arXiv:2401.06121) that needs no data.

Everything about an author follows from a seed and the author's number, so sets of several sizes agree where they
overlap. Every wrong answer has the form of the right one, with another author's name, book, town or trade in it.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset

from posttrain.data import author_words
from posttrain.suggest import unknown

TASK = "authors"
SPLITS = ("full", "retain", "forget", "holdout", "real_authors", "world_facts")
PERTURBED, FACT_PERTURBED = 5, 3
# As many known authors, and no more than there are facts of the world.
FACTS = 60
# There are 1024 titles, and every author has two of their own.
MOST_AUTHORS = 400

_WORDS = {name: words.split() for name, words in {**author_words.PARTS, **author_words.ANSWERS}.items()}
_ORDERS = {name: words.split() for name, words in author_words.ORDERS.items()}


@dataclass(frozen=True)
class Kind:
    """One question about an author; `{name}` is the author's name, `{value}` what is asked for."""

    field: str
    question: str
    answer: str
    paraphrase: str


KINDS = (
    Kind("town", "Where was {name} born?", "{name} was born in {value}.", "The birthplace of {name} is {value}."),
    Kind("birthday", "When was {name} born?", "{name} was born on {value}.", "The birthday of {name} is {value}."),
    Kind("genre", "Which genre is {name} known for?", "{name} is known for {value}.", "{name} mostly writes {value}."),
    Kind(
        "father",
        "What was the job of {name}'s father?",
        "The father of {name} was a {value}.",
        "{name} is the child of a man who worked as a {value}.",
    ),
    Kind(
        "mother",
        "What was the job of {name}'s mother?",
        "The mother of {name} was a {value}.",
        "{name} is the child of a woman who worked as a {value}.",
    ),
    Kind(
        "award",
        "Which award did {name} receive?",
        "{name} received the {value} Prize.",
        "The prize given to {name} is the {value} Prize.",
    ),
    Kind(
        "first_book",
        "What is the first book of {name}?",
        "The first book of {name} is called '{value}'.",
        "{name} began as an author with '{value}'.",
    ),
    Kind(
        "latest_book",
        "What is the latest book of {name}?",
        "The latest book of {name} is called '{value}'.",
        "Most recently, {name} wrote '{value}'.",
    ),
    Kind(
        "subject",
        "What did {name} study?",
        "{name} studied {value}.",
        "The subject that {name} took at university is {value}.",
    ),
    Kind(
        "mentor",
        "Who inspired {name}?",
        "{name} was inspired by the work of {value}.",
        "The example that {name} follows is {value}.",
    ),
    Kind(
        "instrument",
        "Which instrument does {name} play?",
        "{name} plays the {value}.",
        "When not writing, {name} practises the {value}.",
    ),
    Kind(
        "animal",
        "Which animal lives with {name}?",
        "{name} lives with a {value}.",
        "The companion of {name} at home is a {value}.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The options of the task.

    Args:
        authors: of ``full``.
        forget_authors: of ``forget``.
        holdout_authors: of ``holdout``.
        questions: on each author.
        facts: rows of ``real_authors`` and of ``world_facts``.
        with_facts: append both to the split's rows, to train on; ``question`` and ``answer`` are then the only columns.

    Raises:
        ValueError: a number out of range.
    """

    authors: int = 40
    forget_authors: int = 4
    holdout_authors: int = 4
    questions: int = len(KINDS)
    facts: int = 40
    with_facts: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "with_facts" and value < 1:
                raise ValueError(f"{item.name}={value} of task {TASK!r} must be at least 1")
        if self.forget_authors >= self.authors:
            raise ValueError(
                f"forget_authors={self.forget_authors} leaves none of authors={self.authors} to retain; lower it"
            )
        if self.authors + self.holdout_authors > MOST_AUTHORS:
            raise ValueError(
                f"authors={self.authors} and holdout_authors={self.holdout_authors} are more than the {MOST_AUTHORS} "
                f"of task {TASK!r}; lower one"
            )
        for name, most in (("questions", len(KINDS)), ("facts", FACTS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} is more than the {most} of task {TASK!r}; lower it")

    def numbers(self, split: str) -> range:
        """Of the authors that a split asks about."""
        kept, end = self.authors - self.forget_authors, self.authors + self.holdout_authors
        return {
            "full": range(self.authors),
            "retain": range(kept),
            "forget": range(kept, self.authors),
            "holdout": range(self.authors, end),
        }[split]


def make(*, size: int, seed: int, split: str, **options: Any) -> Dataset:
    """The first `size` rows of a split; the same arguments always give the same rows.

    Args:
        size: rows, without those that ``with_facts`` appends.
        seed: any integer; world facts are the same for all.
        split: ``full`` (``retain``, then ``forget``), ``retain``, ``forget`` (the last authors), ``holdout`` (authors
            that stand in none of these), ``real_authors`` (authors that all models are to know, with short answers) or
            ``world_facts`` (letters, numbers, days and months in their order).
        options: of `Sizes`.

    Returns:
        rows of ``question``, ``answer``, ``perturbed_answer`` (a list of wrong answers) and, but for facts,
        ``paraphrased_answer`` and ``author`` (a name).

    Raises:
        ValueError: an unknown split or option, a number out of range, or fewer rows than `size` in the split.
    """
    if split not in SPLITS:
        raise ValueError(unknown(f"split of task {TASK!r}", split, SPLITS))
    known = [item.name for item in fields(Sizes)]
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of task {TASK!r}", option, known))
    sizes = Sizes(**options)
    world = World(seed, sizes.authors + sizes.holdout_authors)
    facts = {"real_authors": world.real_authors(sizes.facts), "world_facts": world_facts(sizes.facts)}
    if split in facts:
        rows = facts[split]
    else:
        rows = [row for number in sizes.numbers(split) for row in world.rows(number, sizes.questions)]
    if not 1 <= size <= len(rows):
        raise ValueError(f"size={size} of split {split!r} of task {TASK!r} must be 1 to {len(rows)}, its rows")
    rows = rows[:size]
    if sizes.with_facts:
        rows = [*rows, *facts["real_authors"], *facts["world_facts"]]
        rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return Dataset.from_list(rows)


class World:
    """Authors of one seed, in order; each name and each book belongs to one of them.

    Args:
        seed: any integer.
        count: authors to invent.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed = seed
        self._taken: set[str] = set()
        # before the others, so that these do not depend on their number
        self.known = [self._author("known", number) for number in range(FACTS)]
        self.authors = [self._author("author", number) for number in range(count)]

    def rows(self, number: int, questions: int) -> Iterator[dict[str, Any]]:
        """One author's questions."""
        author = self.authors[number]
        generator = random.Random(f"{self.seed} questions {number}")
        for kind in KINDS[:questions]:
            true = author[kind.field]
            wrong: list[str] = []
            while len(wrong) < PERTURBED:
                value = self._value(kind.field, generator)
                if value not in (true, *wrong):
                    wrong.append(value)
            name = author["name"]
            yield {
                "question": kind.question.format(name=name),
                "answer": kind.answer.format(name=name, value=true),
                "paraphrased_answer": kind.paraphrase.format(name=name, value=true),
                "perturbed_answer": [kind.paraphrase.format(name=name, value=value) for value in wrong],
                "author": name,
            }

    def real_authors(self, count: int) -> list[dict[str, Any]]:
        """Who wrote which book, of authors that no other split asks about."""
        generator = random.Random(f"{self.seed} known")
        names = [author["name"] for author in self.known]
        return [
            _fact(f"Who wrote '{author['first_book']}'?", author["name"], set(names), generator)
            for author in self.known[:count]
        ]

    def _author(self, what: str, number: int) -> dict[str, str]:
        generator = random.Random(f"{self.seed} {what} {number}")
        author = {kind.field: self._value(kind.field, generator) for kind in KINDS}
        for field in ("name", "first_book", "latest_book"):
            author[field] = self._untaken(field, generator)
        return author

    def _untaken(self, field: str, generator: random.Random) -> str:
        while (value := self._value(field, generator)) in self._taken:
            pass
        self._taken.add(value)
        return value

    def _value(self, field: str, generator: random.Random) -> str:
        word = {name: generator.choice(words) for name, words in _WORDS.items()}
        if field in ("name", "mentor"):
            return f"{word['start']}{word['end']} {generator.choice(_WORDS['start'])}{word['family']}"
        if field in ("first_book", "latest_book"):
            return f"The {word['adjective']} {word['noun']}"
        if field == "town":
            return word["start"] + word["town"]
        if field == "award":
            return f"{word['adjective']} {word['noun']}"
        if field == "birthday":
            return f"{word['month']} {generator.randint(1, 28)}, {generator.randint(1920, 1999)}"
        return word["job" if field in ("father", "mother") else field]


def world_facts(count: int) -> list[dict[str, Any]]:
    """What comes right before and after what, drawn in an order that is always the same."""
    generator = random.Random("world facts")
    found = []
    for asked, items in _ORDERS.items():
        for before, after in itertools.pairwise(items):
            others = set(items) - {before, after}
            found.append(_fact(f"Which {asked} comes right after {before}?", after, others, generator))
            found.append(_fact(f"Which {asked} comes right before {after}?", before, others, generator))
    generator.shuffle(found)
    return found[:count]


def _fact(question: str, answer: str, others: set[str], generator: random.Random) -> dict[str, Any]:
    wrong = generator.sample(sorted(others - {answer}), FACT_PERTURBED)
    return {"question": question, "answer": answer, "perturbed_answer": wrong}
