"""The side of a micro-batch, by hand."""

import math

import pytest

from posttrain.data.collation import CompletionCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "row_number": 3, "score": 1.5, "w": [0, 0, 0.25, 0.5]},
    {"input_ids": [5, 9], "labels": [-100, -100], "row_number": 4, "score": 2.5, "w": [0, 0]},
    {"input_ids": [5, 6, 9], "labels": [5, 6, 9], "row_number": 9, "score": -1, "w": [9, 1, 2]},
]


def test_targets_are_predicted_from_the_position_before():
    side = CompletionCollator(pad_token_id=0, columns=("score", "w"))(ROWS)["side"]
    # rows are padded to 4: row 0 trains tokens 2 and 3 from hidden 1 and 2, row 2 tokens 1 and 2 from hidden 8 and 9
    assert side.target_index.tolist() == [1, 2, 8, 9]
    assert side.targets.tolist() == [7, 8, 6, 9]
    assert side.lengths.tolist() == [2, 2]
    assert side.batch_row.tolist() == [0, 2] and side.row_number.tolist() == [3, 9]
    assert side.sequence_columns["score"].tolist() == [1.5, -1.0]
    assert side.token_columns["w"].tolist() == [0.25, 0.5, 1.0, 2.0]
    assert side.num_tokens == 9 and side.rows == 3


def test_packed_rows_keep_their_sequences_apart():
    packed = {
        "input_ids": [5, 6, 7, 8, 5, 6, 9],
        "labels": [-100, -100, 7, 8, 5, 6, 9],
        "seq_lengths": [4, 3],
        "row_number": [3, 9],
        "score": [1.5, -1],
        "w": [0, 0, 0.25, 0.5, 9, 1, 2],
    }
    side = CompletionCollator(pad_token_id=0, padding_free=True, columns=("score", "w"))([packed, packed])["side"]
    assert side.target_index.tolist() == [1, 2, 4, 5, 8, 9, 11, 12]
    assert side.targets.tolist() == [7, 8, 6, 9, 7, 8, 6, 9]
    assert side.lengths.tolist() == [2, 2, 2, 2] and side.batch_row.tolist() == [0, 0, 1, 1]
    assert side.row_number.tolist() == [3, 9, 3, 9]
    assert side.sequence_columns["score"].tolist() == [1.5, -1.0, 1.5, -1.0]
    assert side.token_columns["w"].tolist() == [0.25, 0.5, 1.0, 2.0] * 2


def test_teacher_slots_are_padded_with_weight_zero():
    rows = [
        {
            "input_ids": [1, 2, 3],
            "labels": [-100, 2, 3],
            "teacher_ids": [[], [4, 5], [6]],
            "teacher_ids_logp": [[], [-0.5, -1.0], [-0.25]],
        }
    ]
    side = CompletionCollator(pad_token_id=0, columns=("teacher_ids", "teacher_ids_logp"), vocab_size=7)(rows)["side"]
    assert side.token_columns["teacher_ids"].tolist() == [[4, 5], [6, 0]]
    assert side.token_columns["teacher_ids_logp"].tolist() == [[-0.5, -1.0], [-0.25, -math.inf]]


def test_an_all_masked_batch_has_no_targets():
    side = CompletionCollator(pad_token_id=0, columns=("score",))([ROWS[1]])["side"]
    assert side.size("tokens") == side.size("sequences") == 0 and side.sequence_columns["score"].shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, "'score' is missing or empty in row 3"),
        ({"score": float("nan")}, "'score' holds nan in row 3"),
        ({"score": "high"}, "'score' holds 'high' in row 3"),
        ({"score": [1.0, 2.0]}, "'score' has 2 entries in row 3 whose input_ids has 4"),
    ],
)
def test_bad_columns_are_named_with_their_row(change, message):
    with pytest.raises(ValueError, match=message):
        CompletionCollator(pad_token_id=0, columns=("score",))([{**ROWS[0], **change}])


def test_teacher_ids_outside_the_vocabulary_are_refused():
    row = {**ROWS[0], "teacher_ids": [[], [], [1], [7]], "teacher_ids_logp": [[], [], [0.0], [0.0]]}
    with pytest.raises(ValueError, match="token id 7, outside the vocabulary of 7"):
        CompletionCollator(pad_token_id=0, columns=("teacher_ids", "teacher_ids_logp"), vocab_size=7)([row])
