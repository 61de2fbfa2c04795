"""Preference pairs by hand, on a model that finds every token equally likely."""

import math

import pytest
import torch

from posttrain.diagnosis.pairs import diagnose_pairs, is_preference, split
from tests import tiny

LOG_V = math.log(len(tiny.VOCABULARY))
ROWS = [
    {"prompt": "ab=", "chosen": "1234", "rejected": "12", "score_chosen": 3.0, "score_rejected": 1.0},
    {"prompt": "a=", "chosen": "12", "rejected": "13", "score_chosen": 1.0, "score_rejected": 1.0},
    {"prompt": "b=", "chosen": "5", "rejected": "678", "score_chosen": 0.0, "score_rejected": 2.0},
    {"prompt": "c=", "chosen": "99", "rejected": "9", "score_chosen": 1.0, "score_rejected": 0.5},
]


@pytest.fixture(scope="module")
def uniform():
    model = tiny.model(dtype=torch.float64).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def found(model, rows, **options):
    return diagnose_pairs(model, tiny.tokenizer(), rows, **{"batch_size": 2, "max_length": None, **options})


def test_margins_lengths_and_scores_by_hand(uniform):
    pairs = found(uniform, ROWS)
    # every completion has eos behind it: 5 and 3, 3 and 3, 2 and 4, 3 and 2 tokens
    assert (pairs["pairs"], pairs["left_out"], pairs["identical"]) == (4, 0, 0)
    assert pairs["length"]["chosen"] == pytest.approx(13 / 4) and pairs["length"]["rejected"] == pytest.approx(3)
    assert pairs["length"]["difference"]["mean"] == pytest.approx((2 + 0 - 2 + 1) / 4)
    assert pairs["length"]["chosen_longer"] == pytest.approx(2 / 3)
    assert pairs["base_margin"]["mean"] == pytest.approx(-LOG_V * (2 + 0 - 2 + 1) / 4)
    assert pairs["base_margin_per_token"]["mean"] == pytest.approx(0, abs=1e-12)
    assert pairs["base_agrees"]["mean"] == pytest.approx(1 / 4)
    assert pairs["length"]["rank_correlation_with_base_margin"] == pytest.approx(-1)
    # 12|34, 12; 1|2, 13; nothing; 9|9, 9: tokens in common over those of the shorter answer, eos included
    assert pairs["shared_prefix"] == pytest.approx((2 / 3 + 1 / 3 + 0 + 1 / 2) / 4)
    assert pairs["scores"]["margin"]["mean"] == pytest.approx((2 + 0 - 2 + 0.5) / 4)
    assert (pairs["scores"]["disagree"], pairs["scores"]["ties"]) == (1 / 4, 1 / 4)
    assert pairs["scores"]["rank_correlation_with_length"] == pytest.approx(1)
    assert sum(pairs["histogram"]["counts"]) == 4


def test_scores_may_come_as_a_margin_or_not_at_all(uniform):
    bare = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    assert "scores" not in found(uniform, bare)
    with_margin = [{**row, "score_margin": value} for row, value in zip(bare, (1.0, -1.0, 0.0, 2.0), strict=True)]
    assert found(uniform, with_margin)["scores"]["disagree"] == 1 / 4


def test_pairs_that_truncation_leaves_without_an_answer_are_left_out(uniform):
    rows = [*ROWS, {**ROWS[0], "prompt": "a" * 12}]
    assert found(uniform, rows, max_length=10)["left_out"] == 1
    with pytest.raises(ValueError, match="no pair of the sample has two answers left"):
        found(uniform, rows[-1:], max_length=10)


def test_a_prompt_that_both_answers_begin_with_is_taken_out():
    assert is_preference(["chosen", "rejected", "x"]) and not is_preference(["chosen"])
    question = [{"role": "user", "content": "a?"}]
    answers = [[*question, {"role": "assistant", "content": text}] for text in ("1", "2")]
    one, two = split({"chosen": answers[0], "rejected": answers[1]})
    assert one == {"prompt": question, "completion": answers[0][1:]} and two["completion"] == answers[1][1:]
    with pytest.raises(ValueError, match="rejected is None; expected text or a list of messages"):
        split({"prompt": "a", "chosen": "b", "rejected": None})


def test_a_row_that_is_no_pair_is_named(uniform):
    with pytest.raises(ValueError, match=r"row 7 of data.train: chosen is ''"):
        found(uniform, [{"prompt": "a", "chosen": "", "rejected": "b", "row_number": 7}])
