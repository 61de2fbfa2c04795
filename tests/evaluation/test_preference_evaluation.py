"""Metrics of held-out pairs against float64 logits, hand values and closed forms."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from posttrain.config import EvaluationSource
from posttrain.evaluation import Source, compare, evaluate
from posttrain.evaluation.preference import Pairs, reward_beta, score_pairs
from posttrain.loading import load_evaluation_sources
from posttrain.metric_direction import direction
from tests import tiny

PAIRS = [
    {"prompt": "abc=", "chosen": "12", "rejected": "345", "score_margin": 0.5},
    {"prompt": "b=", "chosen": "7", "rejected": "21", "score_margin": -0.25},
    {"prompt": "xy=", "chosen": "0000", "rejected": "9", "score_margin": 0.0},
    {"prompt": "q=", "chosen": "55", "rejected": "56"},
]


@pytest.fixture(scope="module")
def reference():
    return tiny.model(dtype=torch.float64, seed=1).eval()


def sum_logp(model, tokenizer, prompt: str, completion: str) -> float:
    opening, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion + "<eos>")["input_ids"]
    logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
    return sum(logp[place - 1][ids[place]] for place in range(len(opening), len(ids)))


def pairs(margins: list[float], probability: list[float], beta: float | None) -> Pairs:
    """Pairs whose chosen completions carry the whole margin."""
    zero = np.zeros(len(margins))
    return Pairs(np.arange(len(margins)), np.array(margins), zero, zero, zero, np.array(probability), beta, 0, 0)


def test_log_probabilities_are_those_of_the_logits_with_the_better_completion_first(exact_model, reference, tokenizer):
    found = score_pairs(exact_model, reference, tokenizer, PAIRS, batch_size=3)
    assert found.index.tolist() == [0, 1, 2, 3]
    assert found.probability.tolist() == [1.0, 1.0, 0.5, 1.0]
    for place, row in enumerate(PAIRS):
        better, worse = (row["chosen"], row["rejected"]) if place != 1 else (row["rejected"], row["chosen"])
        expected = [sum_logp(m, tokenizer, row["prompt"], t) for m in (exact_model, reference) for t in (better, worse)]
        values = (found.chosen, found.rejected, found.reference_chosen, found.reference_rejected)
        assert [one[place] for one in values] == pytest.approx(expected, abs=1e-10)
        a, b, c, d = expected
        assert found.margin[place] == pytest.approx((a - c) - (b - d), abs=1e-10)


def test_a_probability_comes_before_a_margin_and_a_margin_before_the_label(exact_model, reference, tokenizer):
    rows = [{**PAIRS[0], "preference_probability": 0.3}, {**PAIRS[0], "preference_probability": 0.8}]
    found = score_pairs(exact_model, reference, tokenizer, rows)
    assert found.probability == pytest.approx([0.7, 0.8])
    assert found.chosen[0] == pytest.approx(found.rejected[1])


def test_values_by_hand():
    found = pairs([2.0, -1.0, 0.0, 3.0], [1.0, 0.75, 0.9, 0.5], beta=0.5)
    values = found.values()
    assert values["reward_accuracy"][:3].tolist() == [1, 0, 0.5] and math.isnan(values["reward_accuracy"][3])
    assert values["logratio_margin"][:3].tolist() == [2, -1, 0]
    p = [1 / (1 + math.exp(-0.5 * m)) for m in (2, -1, 0, 3)]
    brier = [(1 - p[0]) ** 2, 0.75 * (1 - p[1]) ** 2 + 0.25 * p[1] ** 2, 0.25, 0.5 * (1 - p[3]) ** 2 + 0.5 * p[3] ** 2]
    assert values["margin_brier_score"] == pytest.approx(brier)
    nll = [-math.log(p[0]), -0.75 * math.log(p[1]) - 0.25 * math.log(1 - p[1]), math.log(2),
           -0.5 * math.log(p[3] * (1 - p[3]))]  # fmt: skip
    assert values["margin_nll"] == pytest.approx(nll)


def test_calibration_error_by_hand():
    # confidences 0.8808, 0.6225 (for the worse completion), 0.5 and 0.8176: bins 14, 10, 8 and 13 of 15
    found = pairs([2.0, -0.5, 0.0, 1.5], [0.9, 0.75, 0.8, 0.8], beta=1.0)
    p = [1 / (1 + math.exp(-m)) for m in (2.0, 0.5, 0.0, 1.5)]
    expected = (abs(0.9 - p[0]) + abs(0.25 - p[1]) + abs(0.5 - p[2]) + abs(0.8 - p[3])) / 4
    assert found.statistics()["margin_calibration_error"][0].value == pytest.approx(expected)


def test_margins_at_the_true_log_odds_are_calibrated_and_scaled_ones_are_not():
    rng = np.random.default_rng(0)
    odds = np.abs(rng.normal(size=4000))
    truth = 1 / (1 + np.exp(-odds))

    def found(scale: float) -> dict[str, float]:
        statistics = pairs((scale * odds).tolist(), truth.tolist(), beta=1.0).statistics()
        return {name: statistic.value for name, (statistic, _) in statistics.items()}

    right = found(1.0)
    assert right["margin_calibration_error"] < 1e-12
    assert right["margin_brier_score"] == pytest.approx(np.mean(truth * (1 - truth)))
    for scale in (0.3, 3.0):
        wrong = found(scale)
        assert all(wrong[name] > right[name] + 0.005 for name in right if name.startswith("margin_"))
        assert wrong["reward_accuracy"] == right["reward_accuracy"] == 1


def test_far_margins_stay_finite():
    statistics = pairs([1e4, -1e4], [1.0, 0.6], beta=1.0).statistics()
    assert statistics["margin_nll"][0].value == pytest.approx(0.6 * 1e4 / 2)
    assert all(math.isfinite(statistic.value) for statistic, _ in statistics.values())


def test_ties_and_missing_betas_leave_metrics_out():
    names = set(pairs([1.0, 2.0], [0.5, 0.5], beta=None).statistics())
    assert names == {"chosen_logp_change", "rejected_logp_change"}


def test_a_report_holds_the_metrics_with_intervals_and_items(exact_model, reference, tokenizer):
    rows = [{**row, "answer": row["chosen"]} for row in PAIRS]
    options = {"samples": 2, "k": [1], "max_new_tokens": 4, "resamples": 100}
    metrics = ["generation", "likelihood", "preference"]
    sources = {"pairs": Source(rows, verifier="exact")}
    report = evaluate(
        exact_model, tokenizer, sources, metrics=metrics, reference=lambda: reference, beta=0.1, **options
    )
    source = report.to_dict()["sources"]["pairs"]
    assert list(source["metrics"]) == [
        "pass@1", "reward_accuracy", "logratio_margin", "chosen_logp_change", "rejected_logp_change",
        "margin_brier_score", "margin_nll", "margin_calibration_error",
    ]  # fmt: skip
    assert source["metrics"]["reward_accuracy"]["n"] == 3 and source["metrics"]["margin_nll"]["n"] == 4
    assert list(source["not_measured"]) == ["likelihood"]
    items = list(report.items())
    scored = score_pairs(exact_model, reference, tokenizer, PAIRS, beta=0.1)
    assert [item["margin_nll"] for item in items] == pytest.approx(scored.values()["margin_nll"].tolist())
    assert "reward_accuracy" not in items[2] and items[2]["chosen_logp"] == pytest.approx(scored.chosen[2])
    again = evaluate(reference, tokenizer, sources, metrics=metrics, reference=lambda: reference, beta=0.1, **options)
    assert again.sources["pairs"].measures["reward_accuracy"].estimate.value == 0.5
    assert again.sources["pairs"].measures["margin_nll"].estimate.value == pytest.approx(math.log(2))
    found = compare(again, report)["pairs"]["margin_nll"].difference
    assert found.value == pytest.approx(np.mean(scored.values()["margin_nll"]) - math.log(2))


def test_other_completions_are_other_rows(exact_model, tokenizer):
    def fingerprint(rows: list[dict[str, object]]) -> str:
        options = {"samples": 1, "k": [1], "max_new_tokens": 1, "resamples": 10}
        report = evaluate(
            exact_model, tokenizer, {"pairs": rows}, metrics=["preference"], reference=lambda: exact_model, **options
        )
        return report.sources["pairs"].fingerprint

    assert fingerprint(PAIRS) != fingerprint([{**PAIRS[0], "rejected": "8"}, *PAIRS[1:]])


def test_cut_completions_are_counted_and_lost_ones_skipped(exact_model, reference, tokenizer):
    rows = [PAIRS[0], {"prompt": "abcdefgh", "chosen": "1", "rejected": "2"}]
    found = score_pairs(exact_model, reference, tokenizer, rows, max_length=8)
    assert found.index.tolist() == [0] and found.skipped == 1 and found.truncated == 2


def test_without_a_reference_or_a_pair_it_says_so(exact_model, reference, tokenizer):
    with pytest.raises(ValueError, match="pass reference"):
        evaluate(exact_model, tokenizer, {"pairs": PAIRS}, metrics=["preference"], k=[1], samples=1)
    with pytest.raises(ValueError, match="row 1 has the columns"):
        score_pairs(exact_model, reference, tokenizer, [PAIRS[0], {"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        ("dpo", 0.1),
        ({"name": "dpo", "beta": 0.3}, 0.3),
        ({"name": "madpo", "beta": 0.2}, 0.2),
        ("mmpo", 0.01),
        ("kto", 0.1),
        ("bco", 0.1),
        ([{"name": "nll", "role": "chosen"}, {"name": "dpo", "beta": 0.7}], 0.7),
        ("ipo", None),
        ("simpo", None),
        ("orpo", None),
        ("hinge", None),
        ("f_dpo", None),
        ("nll", None),
    ],
)
def test_only_objectives_that_model_a_preference_by_their_margin_have_a_beta(objective, beta):
    assert reward_beta(objective) == beta


def test_metrics_have_their_directions():
    worse_when_larger = ("margin_brier_score", "margin_nll", "margin_calibration_error")
    assert [direction(f"pairs/{name}") for name in worse_when_larger] == [-1, -1, -1]
    assert direction("pairs/reward_accuracy") == direction("pairs/chosen_logp_change") == 1
    assert direction("pairs/logratio_margin") == direction("pairs/rejected_logp_change") == 0


def test_evaluation_reads_pairs_in_their_formats_for_preference_methods_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    Dataset.from_list(
        [{"instruction": "a", "input": "", "output": "z", "chosen": "b", "rejected": "c", "answer": "b"}]
    ).to_json(path)
    source = EvaluationSource(path=str(path), format="instruction")
    rows = load_evaluation_sources([source], tiny.tokenizer(), method="preference")["pairs"].rows
    assert {"prompt", "chosen", "rejected", "answer"} <= set(rows.column_names) and rows[0]["chosen"].strip() == "b"
    plain = load_evaluation_sources([source], tiny.tokenizer())["pairs"].rows
    assert "completion" in plain.column_names
