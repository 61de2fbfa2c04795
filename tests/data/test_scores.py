"""Scores beside pairs: margins, and what becomes of ties and of pairs that their scores contradict."""

import logging
import math
from typing import Any

import pytest
from datasets import Dataset, Features, Value, disable_progress_bars

from posttrain.data.preparation import number_rows
from posttrain.data.scores import SCORES, score, twins

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()


def scored(rows: list[dict[str, Any]], *, streaming: bool = False, **options: Any) -> list[dict[str, Any]]:
    given = number_rows(Dataset.from_list([PAIR | row for row in rows]))
    return list(score(given.to_iterable_dataset() if streaming else given, key="data.train", **options))


def both(*scores: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"chosen_score": chosen, "rejected_score": rejected} for chosen, rejected in scores]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", SCORES)
def test_scores_under_every_known_name_give_the_margin(names: tuple[str, str], streaming: bool) -> None:
    rows = scored([dict(zip(names, (2.5, 1), strict=True))], streaming=streaming)
    assert rows == [PAIR | {names[0]: 2.5, names[1]: 1, "score_margin": 1.5, "row_number": 0}]


def test_a_margin_of_the_datas_own_stays() -> None:
    (row,) = scored([{"chosen_score": 2, "rejected_score": 1, "score_margin": 5}])
    assert row["score_margin"] == 5


def test_rows_without_scores_stay_as_they_are() -> None:
    assert scored([{"weight": 2}]) == [PAIR | {"weight": 2, "row_number": 0}]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_scores_give_missing_margins_and_are_counted(caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    rows = scored(both((None, 1.0), (2.0, math.nan), (2.0, 1.0)), streaming=streaming, inverted="skip", ties="skip")
    assert [row["score_margin"] for row in rows] == [None, None, 1]
    assert "have no score_margin, each because a score is missing or NaN" in caplog.messages[0]
    assert caplog.messages[0].startswith("1 rows of the streamed" if streaming else "2 of 3 rows of data.train")


def test_a_margin_of_a_later_row_is_no_matter_of_the_first_rows() -> None:
    given: dict[str, list[Any]] = {
        "chosen": ["c"] * 1501,
        "rejected": ["r"] * 1501,
        "chosen_score": [None] * 1500 + [2.5],
        "rejected_score": [1.0] * 1501,
    }
    features = Features({name: Value("float64" if "score" in name else "string") for name in given})
    rows = score(number_rows(Dataset.from_dict(given, features=features)), inverted="swap")
    assert rows[-1]["score_margin"] == 1.5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen_score": "2", "rejected_score": "1"}, "row 1: chosen_score is '2'; give a finite number"),
        ({"chosen_score": 2.0, "rejected_score": math.inf}, "row 1: rejected_score is inf"),
        ({"chosen_score": True, "rejected_score": False}, "row 1: chosen_score is True"),
        ({"score_margin": "high"}, "row 1: score_margin is 'high'"),
        ({"reward_margin": "high"}, "row 1: reward_margin is 'high'"),
        ({"preference_probability": 1.5}, r"row 1: preference_probability is 1.5; give a number from 0 to 1"),
        ({"preference_probability": -0.5}, "row 1: preference_probability is -0.5"),
    ],
)
def test_what_is_no_score_is_named(row: dict[str, Any], words: str, streaming: bool) -> None:
    with pytest.raises(ValueError, match=f"data.train, {words}"):
        scored([dict.fromkeys(row), row], streaming=streaming)


MIXED = both((1, 2.5), (2, 1.5), (3, 3.0))


@pytest.mark.parametrize("streaming", [False, True])
def test_contradicted_pairs_are_kept_and_counted_unless_told(caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        rows = scored(MIXED, streaming=streaming)
    assert [(row["chosen"], row["score_margin"]) for row in rows] == [("c", -1.5), ("c", 0.5), ("c", 0)]
    said = "\n".join(caplog.messages)
    if streaming:
        assert "score the rejected completion above the chosen one" in said and "the last is row 0" in said
    else:
        contradiction = "score the rejected completion above the chosen one (data.train.inverted is keep): rows 0."
        assert f"1 of 3 rows of data.train {contradiction}" in said
        assert "1 of 3 rows of data.train have equal scores and stay in (data.train.ties is keep): rows 2." in said


@pytest.mark.parametrize("streaming", [False, True])
def test_contradicted_and_tied_pairs_may_be_skipped(caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    assert [row["row_number"] for row in scored(MIXED, streaming=streaming, inverted="skip")] == [1, 2]
    assert [row["row_number"] for row in scored(MIXED, streaming=streaming, ties="skip")] == [0, 1]
    assert "its scores contradict chosen and rejected" in caplog.text and "its scores are equal" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_contradicted_pairs_may_be_an_error(streaming: bool) -> None:
    with pytest.raises(ValueError, match=r"data\.train, row 0: score_margin is -1\.5, .* keep, swap or skip"):
        scored(MIXED, streaming=streaming, inverted="error")
    assert len(scored(MIXED[1:], streaming=streaming, inverted="error")) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_swapping_exchanges_all_that_belongs_to_either(streaming: bool) -> None:
    side = {"chosen_model": "a", "rejected_model": "b", "length_chosen": 3, "length_rejected": 4.5, 
            "reward_margin": -2.0, "preference_probability": 0.25, "id": 9}  # fmt: skip
    swapped, same = scored([MIXED[0] | side, MIXED[1] | side], streaming=streaming, inverted="swap")
    assert swapped == {
        "prompt": "p", "chosen": "r", "rejected": "c", "chosen_score": 2.5, "rejected_score": 1, "score_margin": 1.5,
        "chosen_model": "b", "rejected_model": "a", "length_chosen": 4.5, "length_rejected": 3, "reward_margin": 2.0,
        "preference_probability": 0.75, "id": 9, "row_number": 0,
    }  # fmt: skip
    assert same == PAIR | MIXED[1] | side | {"score_margin": 0.5, "row_number": 1}


def test_swapping_in_a_late_row_fits_the_first_ones() -> None:
    whole_and_fraction = both(*[(3, 2.0)] * 1500, (1, 2.5))
    assert scored(whole_and_fraction, inverted="swap")[-1]["chosen_score"] == 2.5


def test_a_probability_alone_tells_ties_and_contradictions() -> None:
    rows = [{"preference_probability": value} for value in (0.5, 0.25, 0.75, None)]
    kept = scored(rows, ties="skip", inverted="swap")
    assert [(row["chosen"], row["preference_probability"]) for row in kept] == [("r", 0.75), ("c", 0.75), ("c", None)]


def test_a_reward_models_margin_contradicts_nothing() -> None:
    (row,) = scored([{"reward_margin": -3.0}], inverted="error")
    assert row["reward_margin"] == -3


def test_twins_need_each_other() -> None:
    names = [
        "chosen_a",
        "rejected_a",
        "b_chosen",
        "b_rejected",
        "chosen_c",
        "d_rejected",
        "chosen",
        "rejected",
        "chosen_",
    ]
    assert twins(names) == [("a", "chosen_a", "rejected_a"), ("b", "b_chosen", "b_rejected")]
