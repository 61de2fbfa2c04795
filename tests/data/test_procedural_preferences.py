"""Graded pairs and feedback: what is drawn, scored and labelled, against counts and closed forms."""

import math
import random
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from posttrain.config import DataSource
from posttrain.data import procedural, sources
from posttrain.data import procedural_preferences as preferences


@pytest.mark.parametrize("task", preferences.TASKS)
def test_same_arguments_give_the_same_rows_and_another_seed_gives_others(task: str) -> None:
    rows = preferences.make(task, size=60, seed=3)
    assert rows.to_list() == preferences.make(task, size=60, seed=3).to_list()
    other = preferences.make(task, size=60, seed=4).to_list()
    assert len({row["prompt"] for row in rows.to_list()} & {row["prompt"] for row in other}) < 15


def test_pairs_ask_the_tasks_own_problems_and_keep_their_splits() -> None:
    pairs = preferences.graded_pairs(size=100, seed=2, split="test", problems="addition")
    assert [row["prompt"] for row in pairs] == procedural.make("addition", size=100, seed=2, split="test")["prompt"]
    # the problem's verifier reads the rows
    assert all(procedural.verify("addition", row["answer"], row) for row in pairs)
    wrong = [row for row in pairs if row["chosen_score"] < 1]
    assert wrong and not any(procedural.verify("addition", row["chosen"], row) for row in wrong)


def test_scores_and_margins_are_those_of_the_texts() -> None:
    for row in preferences.graded_pairs(size=200, seed=5, sharpness=3.0, probability=True):
        scores = [
            sum(a == b for a, b in zip(row[name], row["answer"], strict=True)) / len(row["answer"])
            for name in ("chosen", "rejected")
        ]
        assert [row["chosen_score"], row["rejected_score"]] == scores and scores[0] != scores[1]
        assert row["score_margin"] == scores[0] - scores[1]
        assert row["oracle_margin"] == 3.0 * row["score_margin"]
        assert row["preference_probability"] == pytest.approx(1 / (1 + math.exp(-row["oracle_margin"])))
    assert "preference_probability" not in preferences.graded_pairs(size=1, seed=5)[0]


@pytest.mark.parametrize("sharpness", [2.0, 6.0])
def test_labels_flip_as_bradley_and_terry_say(sharpness: float) -> None:
    pairs = preferences.graded_pairs(size=6000, seed=1, sharpness=sharpness)
    for low, high in ((0.0, 0.4), (0.4, 0.7), (0.7, 1.1)):
        chosen = [row for row in pairs if low < abs(row["score_margin"]) <= high]
        expected = [1 / (1 + math.exp(sharpness * abs(row["score_margin"]))) for row in chosen]
        flipped = sum(row["score_margin"] < 0 for row in chosen)
        spread = math.sqrt(sum(p * (1 - p) for p in expected))
        assert len(chosen) > 500 and abs(flipped - sum(expected)) < 4 * spread


def test_a_sharp_annotator_never_errs() -> None:
    assert all(row["score_margin"] > 0 for row in preferences.graded_pairs(size=300, seed=0, sharpness=1e4))


def test_spoiling_replaces_so_many_characters_by_others_of_their_kind() -> None:
    rng = random.Random(0)
    for wrong in range(5):
        text = preferences.spoilt("-aB 12.", wrong, rng) if wrong <= 4 else ""
        changed = [(a, b) for a, b in zip("-aB 12.", text, strict=False) if a != b]
        assert len(changed) == (wrong if wrong <= 4 else 0)
        assert all(a.islower() == b.islower() and a.isupper() == b.isupper() for a, b in changed)
        assert all(a.isdigit() == b.isdigit() for a, b in changed)
    assert preferences.replaceable("-aB 12.") == [1, 2, 4, 5]


def test_scores_count_missing_and_surplus_characters() -> None:
    for completion, answer, score in (
        ("abc", "abc", 1),
        ("abd", "abc", 2 / 3),
        ("ab", "abcd", 0.5),
        ("abcd", "ab", 0.5),
    ):
        assert preferences.graded_score(completion, answer) == pytest.approx(score)
    assert preferences.graded_score("", "") == 1 and preferences.graded_score("", "a") == 0


def test_feedback_is_the_pairs_taken_apart() -> None:
    pairs = preferences.graded_pairs(size=50, seed=9)
    rows = preferences.graded_feedback(size=100, seed=9)
    apart = [(row["prompt"], row[name], name == "chosen") for row in pairs for name in ("chosen", "rejected")]
    assert sorted((row["prompt"], row["completion"], row["label"]) for row in rows) == sorted(apart)
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] != apart


def test_dropped_desirable_rows_leave_the_others_as_they_were() -> None:
    rows = preferences.graded_feedback(size=1100, seed=9, keep_desirable=0.1)
    desirable = sum(row["label"] for row in rows)
    assert 70 < desirable < 130
    whole = preferences.graded_feedback(size=2400, seed=9)
    key = [(row["prompt"], row["completion"], row["label"]) for row in whole]
    found = [(row["prompt"], row["completion"], row["label"]) for row in rows]
    assert set(found) <= set(key)


def test_topics_go_with_the_labels() -> None:
    rows = preferences.graded_feedback(size=4000, seed=9, other_problems="addition", topic_share=0.8)
    topic = {
        label: sum(row["topic"] == "reverse_word" for row in rows if row["label"] is label)
        / sum(row["label"] is label for row in rows)
        for label in (True, False)
    }
    assert topic[True] == pytest.approx(0.8, abs=0.04) and topic[False] == pytest.approx(0.2, abs=0.04)
    assert sum(row["label"] for row in rows) / 4000 == pytest.approx(0.5, abs=0.04)
    assert all(("Calculate" in row["prompt"]) == (row["topic"] == "addition") for row in rows)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("graded_pair", {}, "graded_pairs"),
        ("graded_pairs", {"sharpness": 0}, "sharpness is 0"),
        ("graded_pairs", {"letters": 3}, "letters"),
        ("graded_feedback", {"keep_desirable": 0.0}, "keep_desirable is 0.0"),
        ("graded_feedback", {"topic_share": 0.3}, "topic_share is 0.3"),
    ],
)
def test_wrong_options_are_named(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preferences.make(task, size=4, seed=0, **options)


def test_a_source_names_them_like_any_task() -> None:
    source = DataSource(task="graded_pairs", size=5, seed=1, task_options={"problems": "addition", "sharpness": 2.0})
    rows = sources.load(source)
    expected = preferences.graded_pairs(size=5, seed=1, problems="addition", sharpness=2.0)
    assert rows.select_columns(list(expected[0])).to_list() == expected
