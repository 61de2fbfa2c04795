"""Truncation, counted skips and packing keep every column beside its row."""

import logging

import pytest
from datasets import Dataset

from posttrain.data.preparation import finish, number_rows


def rows(count=7):
    return Dataset.from_list(
        [
            {
                "input_ids": list(range(i, i + 2 + i % 4)),
                "labels": [-100, *range(i + 1, i + 2 + i % 4)],
                "score": float(i),
                "per_token": [[i, j] for j in range(2 + i % 4)],
            }
            for i in range(count)
        ]
    )


def run(dataset, **changes):
    settings = {
        "name": "train",
        "columns": ["score", "per_token"],
        "max_length": 8,
        "truncation_mode": "keep_start",
        "packing": None,
        "shuffle_seed": None,
        **changes,
    }
    return finish(number_rows(dataset), **settings)


@pytest.mark.parametrize(("mode", "ids", "first"), [("keep_start", [3, 4], 0), ("keep_end", [6, 7], 3)])
def test_lists_are_cut_with_their_tokens(mode, ids, first):
    row = run(rows(), max_length=2, truncation_mode=mode)[3]
    assert row["input_ids"] == ids and row["score"] == 3.0 and row["row_number"] == 3
    assert row["per_token"] == [[3, first], [3, first + 1]]


def test_rows_truncated_to_nothing_are_counted_and_named(caplog):
    data = Dataset.from_list(
        [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    )
    with caplog.at_level(logging.WARNING):
        kept = run(data, columns=[], max_length=2)
    assert kept["row_number"][:] == [1]
    assert "Skipped 1 of 2 rows of the train data" in caplog.text and "rows 0." in caplog.text


def test_nothing_left_is_an_error():
    data = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}])
    with pytest.raises(ValueError, match="no row of the train data has a trained token"):
        run(data, columns=[], max_length=2)


def test_packing_loses_and_mixes_nothing():
    packed = run(rows(), packing="bfd")
    seen = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 8
        offset = 0
        for length, score, number in zip(row["seq_lengths"], row["score"], row["row_number"], strict=True):
            part = slice(offset, offset + length)
            assert score == number
            assert row["input_ids"][part] == list(range(number, number + length))
            assert row["per_token"][part] == [[number, j] for j in range(length)]
            seen.append(number)
            offset += length
    assert sorted(seen) == list(range(7)) and len(packed) < 7


def test_cutting_strategies_cannot_carry_columns():
    with pytest.raises(ValueError, match="packing a 'wrapped' cannot carry"):
        run(rows(), packing="wrapped")


def test_a_stream_is_filtered_with_a_count(caplog):
    stream = rows(3).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        kept = list(run(stream, max_length=2))
    assert [row["row_number"] for row in kept] == [0, 1, 2]
    one = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, -100]}]).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        assert list(run(one, columns=[])) == []
    assert "Skipped 1 rows of the streamed train data" in caplog.text
