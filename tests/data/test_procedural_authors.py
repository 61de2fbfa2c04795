"""Invented authors: splits by author, answers and their perturbations, facts for all, and the YAML's way to them."""

import re
from typing import Any

import pytest

from posttrain.config.inputs import DataSource
from posttrain.data import formats, procedural_authors, sources
from posttrain.data.procedural_authors import KINDS, SPLITS

SMALL: dict[str, Any] = {"authors": 6, "forget_authors": 2, "holdout_authors": 3, "questions": 5}


def rows(split: str, size: int, *, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    return procedural_authors.make(size=size, seed=seed, split=split, **{**SMALL, **options}).to_list()


def test_the_full_set_is_retain_then_forget_and_the_holdout_is_apart() -> None:
    full, retain, forget, holdout = rows("full", 30), rows("retain", 20), rows("forget", 10), rows("holdout", 15)
    assert full == retain + forget
    names = [list(dict.fromkeys(row["author"] for row in part)) for part in (retain, forget, holdout)]
    assert [len(part) for part in names] == [4, 2, 3]
    assert len({name for part in names for name in part}) == 9
    assert len({row["question"] for row in full + holdout}) == 45
    assert all(row["author"] in row["question"] and row["author"] in row["answer"] for row in full + holdout)


def test_a_seed_decides_everything_but_the_facts_of_the_world() -> None:
    for split in SPLITS:
        assert rows(split, 10) == rows(split, 10)
    names = [{row["author"] for row in rows("full", 30, seed=seed)} for seed in (0, 1)]
    assert len(names[0] & names[1]) == 0
    assert rows("real_authors", 10) != rows("real_authors", 10, seed=1)
    assert rows("world_facts", 10) == rows("world_facts", 10, seed=1)


def test_more_authors_leave_the_first_ones_as_they_are() -> None:
    few, many = rows("full", 30), rows("full", 50, authors=10, holdout_authors=5, facts=7)
    assert few == many[:30]
    # fewer questions are the first ones
    assert rows("full", 12, questions=2) == [row for index, row in enumerate(few) if index % 5 < 2]


def test_wrong_answers_are_the_paraphrase_with_another_value() -> None:
    everything = rows("full", 6 * len(KINDS), questions=len(KINDS))
    for index, row in enumerate(everything):
        kind = KINDS[index % len(KINDS)]
        name = row["author"]
        pattern = re.compile(re.escape(kind.paraphrase.format(name=name, value="@")).replace("@", "(.+)"))
        values = [pattern.fullmatch(text) for text in (row["paraphrased_answer"], *row["perturbed_answer"])]
        assert all(values)
        found = [value[1] for value in values if value]
        assert len(set(found)) == 6
        assert row["answer"] == kind.answer.format(name=name, value=found[0])
        assert row["question"] == kind.question.format(name=name)


def test_every_name_and_every_book_belongs_to_one_author() -> None:
    known, world = rows("real_authors", 60, facts=60), procedural_authors.World(0, 40)
    names = [row["answer"] for row in known] + [author["name"] for author in world.authors]
    assert len(set(names)) == 100
    books = [author[field] for author in world.authors for field in ("first_book", "latest_book")]
    assert len({*books, *(row["question"] for row in known)}) == 140


def test_facts_are_right_and_their_wrong_answers_wrong() -> None:
    facts = rows("world_facts", 60, facts=60)
    assert len({row["question"] for row in facts}) == 60
    for row in facts:
        assert len({row["answer"], *row["perturbed_answer"]}) == 4
        assert row["question"].endswith("?") and not row["question"].endswith(f" {row['answer']}?")
        assert not any(row["question"].endswith(f" {wrong}?") for wrong in row["perturbed_answer"])
    by_question = {row["question"]: row["answer"] for row in facts}
    expected = {"after Monday": "Tuesday", "before W": "V", "after G": "H", "after ten": "eleven"}
    for end, answer in expected.items():
        assert [found for question, found in by_question.items() if question.endswith(f" {end}?")] == [answer]
    for row in rows("real_authors", 20):
        assert len({row["answer"], *row["perturbed_answer"]}) == 4


def test_facts_go_behind_the_rows_to_train_on_in_both_twins() -> None:
    full, retain = (rows(split, size, facts=7, with_facts=True) for split, size in (("full", 30), ("retain", 20)))
    assert len(full) == 44 and len(retain) == 34
    assert full[30:] == retain[20:]
    known = rows("real_authors", 7, facts=7) + rows("world_facts", 7, facts=7)
    assert full[30:] == [{"question": row["question"], "answer": row["answer"]} for row in known]


def test_a_source_names_the_task_and_a_format_makes_it_text_to_train_on() -> None:
    source = DataSource(task="authors", split="forget", size=10, seed=3, task_options=SMALL, format="question-answer")
    read = sources.load(source)
    assert read[4]["author"] == rows("forget", 10, seed=3)[4]["author"]
    prepared = formats.prepare(read, format=source.format)
    first = rows("forget", 1, seed=3)[0]
    assert prepared[0]["prompt"] == f"Question: {first['question']}\nAnswer:"
    assert prepared[0]["completion"] == f" {first['answer']}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "forgot"}, "did you mean 'forget'"),
        ({"author": 3}, "did you mean 'authors'"),
        ({"size": 11}, "size=11 of split 'forget' of task 'authors' must be 1 to 10"),
        ({"size": 0}, "must be 1 to 10"),
        ({"questions": 99}, "questions=99 is more than the"),
        ({"questions": 0}, "questions=0 of task 'authors' must be at least 1"),
        ({"facts": 61}, "facts=61 is more than the 60"),
        ({"authors": 398}, "authors=398 and holdout_authors=3 are more than the 400"),
        ({"forget_authors": 6}, "forget_authors=6 leaves none of authors=6 to retain"),
    ],
)
def test_bad_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(**{"split": "forget", "size": 10, **given})
