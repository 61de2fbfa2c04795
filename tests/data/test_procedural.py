"""Procedural tasks: the same call gives the same rows, splits never meet, and verifiers know right from wrong."""

import json
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from posttrain.data import procedural

# One of each kind: grids compared as tuples, dates, numbers, a verifier that raises on malformed text, word lists.
LEAVES_A_FILE_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OTHER_DATASETS = [
    pytest.param("arc_agi", marks=LEAVES_A_FILE_OPEN),
    "calendar_arithmetic",
    "gcd",
    "prime_factorization",
    "word_sorting",
]


@pytest.mark.parametrize("task", procedural.names())
def test_same_arguments_give_the_same_rows_and_another_seed_gives_others(task: str) -> None:
    rows = procedural.make(task, size=50, seed=3)
    assert rows.column_names == ["prompt", "completion", "answer", "metadata"]
    assert rows.to_list() == procedural.make(task, size=50, seed=3).to_list()
    # Neighbouring seeds must be unrelated, not shifted by one as reasoning-gym's own are.
    shared = set(rows["prompt"]) & set(procedural.make(task, size=50, seed=4)["prompt"])
    assert len(shared) < 10


def test_a_longer_data_set_begins_with_the_shorter_one() -> None:
    assert (
        procedural.make("addition", size=30, seed=0).to_list()
        == procedural.make("addition", size=90, seed=0).to_list()[:30]
    )


@pytest.mark.parametrize("task", procedural.names())
def test_splits_never_meet_and_evaluation_rows_are_distinct(task: str) -> None:
    train = {row["prompt"] for seed in (0, 1) for row in procedural.make(task, size=4000, seed=seed)}
    validation = procedural.make(task, size=200, seed=2, split="validation")["prompt"]
    test = procedural.make(task, size=200, seed=0, split="test")["prompt"]
    assert len(set(validation)) == len(set(test)) == 200
    assert not train & set(validation)
    assert not train & set(test)
    assert not set(validation) & set(test)


def test_splits_are_shares_of_80_10_and_10_percent_and_evaluation_rows_run_out() -> None:
    # 11 ** 3 sums of three numbers from 0 to 10: enough draws find all of train, asking for too many counts the rest.
    small: dict[str, Any] = {"min_digits": 1, "max_digits": 1}
    total = 11**3
    found = set(procedural.make("three_term_sum", size=15_000, seed=0, **small)["prompt"])
    assert len(found) / total == pytest.approx(0.8, abs=0.03)
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"distinct problems that split '{split}' of task") as error:
            procedural.make("three_term_sum", size=1000, seed=0, split=split, **small)
        count = int(str(error.value).split("more than the ")[1].split()[0])
        assert count / total == pytest.approx(0.1, abs=0.03)
        assert len(procedural.make("three_term_sum", size=count, seed=1, split=split, **small)) == count


def test_a_split_without_any_problem_is_an_error() -> None:
    # Two problems in all: at least one of the three splits is empty.
    empty = []
    for split in procedural.SPLITS:
        try:
            procedural.make("prime_factorization", size=1, seed=0, split=split, min_value=2, max_value=3)
        except ValueError as error:
            assert f"has no problem in split {split!r} among 2 distinct ones" in str(error)
            empty.append(split)
    assert empty


@pytest.mark.parametrize("task", [*procedural.names(), *OTHER_DATASETS])
def test_verifier_accepts_the_answer_and_rejects_a_wrong_one(task: str) -> None:
    for row in procedural.make(task, size=40, seed=0, split="test"):
        assert procedural.verify(task, row["completion"], row)
        assert procedural.verify(task, f" {row['completion']}\n", row)
        assert not procedural.verify(task, "", row)
        assert not procedural.verify(task, "no answer (", row)
        assert not procedural.verify(task, row["completion"] + "1", row)


def test_arithmetic_answers_are_right() -> None:
    operators = {"addition": "+", "subtraction": "-", "multiplication": "*"}
    for task, operator in operators.items():
        for row in procedural.make(task, size=50, seed=0):
            left, found, right = row["prompt"].removeprefix("Calculate ").split(".")[0].split()
            truth = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[found]
            assert found == operator
            assert row["completion"] == row["answer"] == str(truth)
            assert not procedural.verify(task, str(truth + 1), row)


def test_options_override_the_preset_and_travel_with_the_row() -> None:
    row = procedural.make("addition", size=1, seed=0, min_digits=4, max_digits=4)[0]
    assert json.loads(row["metadata"])["options"] == {"min_digits": 4, "max_digits": 4}
    assert json.loads(row["metadata"])["problem"]["num_digits"] == 4
    assert procedural.verify("addition", row["answer"], row)


def test_presets_hide_no_data_set_of_reasoning_gym() -> None:
    from reasoning_gym.factory import DATASETS

    assert not set(procedural.names()) & set(DATASETS)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="Unknown task: 'additon'; did you mean 'addition'"):
        procedural.make("additon", size=1, seed=0)
    with pytest.raises(ValueError, match="did you mean 'max_digits'"):
        procedural.make("addition", size=1, seed=0, max_digit=3)
    with pytest.raises(ValueError, match="max_digits must be >= min_digits"):
        procedural.make("addition", size=1, seed=0, max_digits=1)
    with pytest.raises(ValueError, match="Unknown split: 'tst'; did you mean 'test'"):
        procedural.make("addition", size=1, seed=0, split="tst")
    with pytest.raises(ValueError, match="size=0"):
        procedural.make("addition", size=0, seed=0)
    with pytest.raises(ValueError, match="'rubiks_cube' has no reference answer"):
        procedural.make("rubiks_cube", size=1, seed=0)
    row = procedural.make("addition", size=1, seed=0)[0]
    with pytest.raises(ValueError, match="cannot verify a row that task 'addition' made"):
        procedural.verify("subtraction", row["answer"], row)
