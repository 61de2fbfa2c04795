"""Pairs and single completions to trainable rows: cutting, counted skips, checked numbers."""

import logging
import math

import pytest
from datasets import Dataset

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_preparation import finish_completions


def pairs(*rows, **columns):
    data = {
        "prompt_ids": [list(prompt) for prompt, _, _ in rows],
        "chosen_ids": [list(chosen) for _, chosen, _ in rows],
        "rejected_ids": [list(rejected) for _, _, rejected in rows],
        ROW_NUMBER: list(range(len(rows))),
        **columns,
    }
    return Dataset.from_dict(data)


def finish(dataset, columns=(), max_length=None, truncation_mode="keep_start", watched=()):
    return finish_completions(
        dataset,
        name="train",
        completions=("chosen", "rejected"),
        columns=columns,
        watched=watched,
        max_length=max_length,
        truncation_mode=truncation_mode,
    )


def test_ends_are_cut_and_the_prompt_stays_common():
    row = finish(pairs(([1, 2, 3], [4, 5, 6], [7])), max_length=5)[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([1, 2, 3], [4, 5], [7])


def test_the_prompts_start_is_cut_by_what_the_longer_completion_needs():
    row = finish(pairs(([1, 2, 3], [4, 5, 6], [7])), max_length=4, truncation_mode="keep_end")[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([3], [4, 5, 6], [7])
    row = finish(pairs(([1, 2], [4, 5, 6], [7, 8])), max_length=2, truncation_mode="keep_end")[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([], [5, 6], [7, 8])


def test_rows_that_teach_nothing_are_counted(caplog):
    dataset = pairs(
        ([1], [2], [3]), ([1], [], [3]), ([], [2], [3, 4]), ([1], [2, 2], [2, 2]), ([1, 1], [4, 5, 6], [4, 5, 7])
    )
    with caplog.at_level(logging.WARNING):
        kept = finish(dataset, max_length=4)
    assert kept[ROW_NUMBER] == [0]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "Skipped 2 of 5" in said and "rows 1, 2." in said
    assert "Skipped 2 of 3" in said and "its completions are equal" in said and "rows 3, 4." in said


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="no row left"):
        finish(pairs(([1], [], [3])))


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("score_margin", math.nan, "a finite number"),
        ("score_margin", None, "a finite number"),
        ("preference_probability", 1.7, "a number from 0 to 1"),
        ("density_weight", -1.0, "a finite number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_named(column, value, wanted):
    dataset = pairs(([1], [2], [3]), ([1], [4], [5]), **{column: [0.5, value]})
    with pytest.raises(ValueError, match=rf"{column}.*{wanted}, in 1 of 2 rows: rows 1"):
        finish(dataset, columns=(column,))
    assert len(finish(dataset, watched=(column,))) == 2


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="lacks the column 'score_margin'"):
        finish(pairs(([1], [2], [3])), columns=("score_margin",))
    assert len(finish(pairs(([1], [2], [3])), watched=("score_margin",))) == 1
