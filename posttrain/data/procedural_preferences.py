"""Procedural preference data: answers spoilt to several degrees, a verifier's scores, and an annotator who errs.

The problems are those of a task of `posttrain.data.procedural`, so that splits never meet. A completion is the true
answer with some of its letters and digits replaced; its score is the share of characters that are right. Of two
completions the annotator prefers the better one with probability sigmoid(sharpness * difference of their scores)
(Bradley and Terry, 1952): labels of close pairs are often wrong, those of clear ones hardly ever.
"""

import hashlib
import json
import math
import random
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset

from posttrain.data import procedural
from posttrain.suggest import unknown

Row = dict[str, Any]

_ALPHABETS = (string.ascii_lowercase, string.ascii_uppercase, string.digits)


def make(task: str, *, size: int, seed: int, split: str = "train", **options: Any) -> Dataset:
    """Rows of `graded_pairs` or `graded_feedback`; the same arguments always give the same rows.

    Args:
        task: ``graded_pairs`` or ``graded_feedback``.
        size, seed, split: as in `posttrain.data.procedural.make`.
        options: the task's own, and those of the task that its problems come from.

    Raises:
        ValueError: an unknown task, an option out of range, or as `posttrain.data.procedural.make`.
    """
    if task not in TASKS:
        raise ValueError(unknown("task", task, TASKS))
    return Dataset.from_list(TASKS[task](size=size, seed=seed, split=split, **options))


def graded_pairs(
    *,
    size: int,
    seed: int,
    split: str = "train",
    problems: str = "reverse_word",
    sharpness: float = 4.0,
    probability: bool = False,
    **options: Any,
) -> list[Row]:
    """Pairs of completions of different scores, labelled by the annotator.

    Args:
        size, seed, split: as in `posttrain.data.procedural.make`.
        problems: the task whose problems are asked.
        sharpness: the annotator's log-odds of a right label per unit of score difference, > 0; a large one never errs.
        probability: write ``preference_probability`` as well, which `mmpo` would take in place of ``score_margin``.
        options: of the problems' task, such as ``max_word_len``.

    Returns:
        rows with ``prompt``, ``chosen``, ``rejected`` in the annotator's order; ``chosen_score`` and
        ``rejected_score`` in [0, 1]; ``score_margin``, their difference, negative where the label is wrong;
        ``oracle_margin``, the annotator's own log-odds for the labelled order, which is what a perfect reward model
        would say; ``preference_probability``, its sigmoid, where asked for; ``answer`` and ``metadata``.

    Raises:
        ValueError: sharpness is not above 0, an answer holds nothing that can be spoilt, or as
            `posttrain.data.procedural.make`.
    """
    rows = procedural.make(problems, size=size, seed=seed, split=split, **options)
    return list(_pairs(rows, problems, seed, split, sharpness, probability))


def graded_feedback(
    *,
    size: int,
    seed: int,
    split: str = "train",
    problems: str = "reverse_word",
    sharpness: float = 4.0,
    keep_desirable: float = 1.0,
    other_problems: str | None = None,
    topic_share: float = 0.9,
    **options: Any,
) -> list[Row]:
    """Single completions with labels: the pairs of `graded_pairs` taken apart, and some of the rows left out.

    Args:
        size, seed, split, problems, sharpness, options: as in `graded_pairs`; ``size`` counts completions.
        keep_desirable: share of the desirable completions that stay, in (0, 1].
        other_problems: a second task, at its own settings, whose problems alternate with those of the first.
        topic_share: with two tasks, the share of the desirable completions that the first task has, and of the
            undesirable ones that the second has, in [0.5, 1]; 0.5 is no difference.

    Returns:
        rows in random order with ``prompt``, ``completion``, ``label`` (true where the annotator chose it), ``score``,
        ``topic`` (the task of its problem), ``answer`` and ``metadata``.

    Raises:
        ValueError: as in `graded_pairs`, or a share out of range.
    """
    for name, value, low in (("keep_desirable", keep_desirable, 0.0), ("topic_share", topic_share, 0.5)):
        if not (low <= value <= 1 and value > 0):
            raise ValueError(f"{name} is {value}; give a share from {low:g} to 1, above 0.")
    topics = [(problems, options)] if other_problems is None else [(problems, options), (other_problems, {})]
    drawn = [
        _pairs(procedural.generate(topic, seed=seed, split=split, **own), topic, seed, split, sharpness, False)
        for topic, own in topics
    ]
    rng = _generator("feedback", seed, split, problems, other_problems)

    def rows() -> Iterator[Row]:
        for pairs in zip(*drawn, strict=True):
            for number, pair in enumerate(pairs):
                share = 1.0 if other_problems is None else topic_share if number == 0 else 1 - topic_share
                other = 1.0 if other_problems is None else 1 - share
                # one draw for each completion, kept or not, so that other shares leave the rest of the rows alone
                keep = rng.random() < share * keep_desirable, rng.random() < other
                yield from (row for row, kept in zip(_apart(pair, topics[number][0]), keep, strict=True) if kept)

    found = list(islice(rows(), size))
    rng.shuffle(found)
    return found


TASKS: Mapping[str, Callable[..., list[Row]]] = {"graded_pairs": graded_pairs, "graded_feedback": graded_feedback}


def graded_score(completion: str, answer: str) -> float:
    """Share of characters that are right in their place, over the longer of the two texts; 1 for two empty ones."""
    longest = max(len(completion), len(answer))
    if longest == 0:
        return 1.0
    return sum(one == other for one, other in zip(completion, answer, strict=False)) / longest


def spoilt(answer: str, wrong: int, rng: random.Random) -> str:
    """The answer with ``wrong`` of its letters and digits replaced, each by another one of its kind.

    Args:
        answer: with at least ``wrong`` letters and digits (`replaceable`).
    """
    characters = list(answer)
    for place in rng.sample(replaceable(answer), wrong):
        (alphabet,) = (kind for kind in _ALPHABETS if characters[place] in kind)
        characters[place] = rng.choice([one for one in alphabet if one != characters[place]])
    return "".join(characters)


def replaceable(answer: str) -> list[int]:
    """Places of an answer's letters (of the English alphabet) and digits."""
    return [place for place, one in enumerate(answer) if any(one in kind for kind in _ALPHABETS)]


def _pairs(
    rows: Iterable[Mapping[str, Any]], task: str, seed: int, split: str, sharpness: float, probability: bool
) -> Iterator[Row]:
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness is {sharpness}; give a finite number above 0.")
    rng = _generator("pairs", seed, split, task)
    for row in rows:
        answer = row["answer"]
        places = len(replaceable(answer))
        if not places:
            raise ValueError(f"task {task!r} has the answer {answer!r}, in which no letter or digit can be replaced.")
        texts = [spoilt(answer, wrong, rng) for wrong in sorted(rng.sample(range(places + 1), 2))]
        scores = [graded_score(text, answer) for text in texts]
        if rng.random() >= _sigmoid(sharpness * (scores[0] - scores[1])):
            texts, scores = texts[::-1], scores[::-1]
        margin = scores[0] - scores[1]
        pair: Row = {
            "prompt": row["prompt"],
            "chosen": texts[0],
            "rejected": texts[1],
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "score_margin": margin,
            "oracle_margin": sharpness * margin,
        }
        if probability:
            pair["preference_probability"] = _sigmoid(sharpness * margin)
        yield {**pair, "answer": answer, "metadata": row["metadata"]}


def _apart(pair: Row, topic: str) -> tuple[Row, Row]:
    """The desirable and the undesirable row of a pair."""
    shared = {"topic": topic, "answer": pair["answer"], "metadata": pair["metadata"]}
    desirable, undesirable = (
        {
            "prompt": pair["prompt"],
            "completion": pair[name],
            "label": name == "chosen",
            "score": pair[f"{name}_score"],
            **shared,
        }
        for name in ("chosen", "rejected")
    )
    return desirable, undesirable


def _generator(*what: Any) -> random.Random:
    """Neighbouring seeds, splits and tasks give unrelated draws."""
    return random.Random(hashlib.sha256(json.dumps(what).encode()).digest())


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
