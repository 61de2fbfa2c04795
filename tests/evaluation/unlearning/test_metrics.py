"""Every metric on cases that can be worked out by hand."""

import math

import numpy as np
import pytest

from posttrain.evaluation.unlearning import metrics
from posttrain.evaluation.unlearning.findings import Interval, utility
from posttrain.evaluation.unlearning.overlap import rouge_l
from tests.evaluation.unlearning.hand_made import answers

LOG = math.log


def test_probability_is_the_geometric_mean_over_an_answers_tokens() -> None:
    found = metrics.probability(answers([[LOG(0.5), LOG(0.125)], [LOG(0.2)]]))
    np.testing.assert_allclose(found, [0.25, 0.2])


def test_taking_answers_keeps_each_with_its_own_tokens() -> None:
    logp = [[-1.0], [-2.0, -3.0], [-4.0, -5.0, -6.0]]
    taken = answers(logp).take(np.array([2, 0]))
    assert [one.tolist() for one in taken.per_answer(taken.logp)] == [logp[2], logp[0]]
    np.testing.assert_allclose(taken.mean_nll, [5.0, 1.0])


def test_probability_among_wrong_answers() -> None:
    true, false = -np.log([0.5, 0.2]), [-np.log([0.25, 0.25]), -np.log([0.6])]
    np.testing.assert_allclose(metrics.normalised_probability(true, false), [0.5, 0.25])


def test_probability_among_wrong_answers_does_not_underflow() -> None:
    true, false = np.array([2000.0, 3000.0]), [np.array([2000.0, 2000.0, 2000.0]), np.array([0.0])]
    np.testing.assert_allclose(metrics.normalised_probability(true, false), [0.25, 0.0], atol=1e-300)


@pytest.mark.parametrize(("mean", "perturbed"), [("geometric", 0.2), ("arithmetic", 0.25)])
def test_truth_ratio_takes_the_mean_it_is_named_after(mean: str, perturbed: float) -> None:
    found = metrics.log_truth_ratio(-np.log([0.5]), [-np.log([0.4, 0.1])], mean)
    np.testing.assert_allclose(np.exp(found), [perturbed / 0.5])


def test_truth_ratio_of_a_collapsed_model_is_finite() -> None:
    for mean in metrics.MEANS:
        found = metrics.log_truth_ratio(np.array([5000.0]), [np.array([4000.0, 4000.0])], mean)
        np.testing.assert_allclose(found, [1000.0])
        assert metrics.forget_truth_ratio(found).tolist() == [0.0]
        assert metrics.retain_truth_ratio(found).tolist() == [0.0]


def test_truth_ratio_is_aggregated_either_way() -> None:
    ratio = np.log([0.5, 4.0, 1.0])
    np.testing.assert_allclose(metrics.forget_truth_ratio(ratio), [0.5, 0.25, 1.0])
    np.testing.assert_allclose(metrics.retain_truth_ratio(ratio), [0.5, 0.0, 0.0])


def test_forget_quality_against_a_distribution_apart_and_the_same() -> None:
    same = metrics.forget_quality(np.arange(5.0), np.arange(5.0))
    assert same == (1.0, 0.0)
    p, statistic = metrics.forget_quality(np.arange(5.0), np.arange(5.0) + 10)
    assert statistic == 1.0
    # two of the C(10, 5) orders put one sample wholly in front of the other
    assert p == pytest.approx(2 / math.comb(10, 5))


def test_forget_quality_is_the_same_for_the_ratio_and_its_inverse() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 40))
    assert metrics.forget_quality(-one, -other) == pytest.approx(metrics.forget_quality(one, other))
    assert metrics.forget_quality(np.exp(one), np.exp(other)) == pytest.approx(metrics.forget_quality(one, other))


def test_extraction_strength_is_the_longest_reproduced_end() -> None:
    # |y| = 4 and the closing token behind it; the first token that must be given is counted by the last miss
    hits = [[1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 0, 1, 1, 0], [1, 1, 1, 0, 1]]
    found = metrics.extraction_strength(answers([[-1.0] * 5] * 4, is_top1=hits))
    np.testing.assert_allclose(found, [1.0, 0.75, 0.5, 0.0])


def test_the_floor_of_extraction_strength_is_zero_and_not_one_over_the_length() -> None:
    found = metrics.extraction_strength(answers([[-1.0] * 3], is_top1=[[0, 0, 0]]))
    assert found.tolist() == [0.0]


def test_the_closing_token_counts_neither_for_extraction_nor_for_memorization() -> None:
    # the closing token is a hit in the first answer and a miss in the second: both know half of the text
    given = answers([[-1.0] * 3] * 2, is_top1=[[0, 1, 1], [0, 1, 0]])
    np.testing.assert_allclose(metrics.extraction_strength(given), [0.5, 0.5])
    np.testing.assert_allclose(metrics.exact_memorization(given), [0.5, 0.5])
    # but it does for probability
    np.testing.assert_allclose(metrics.probability(answers([[LOG(0.25), LOG(0.0625)]])), [0.125])


def test_an_answer_of_its_closing_token_alone_has_no_memorization() -> None:
    given = answers([[-1.0], [-1.0, -1.0]], is_top1=[[1], [1, 0]])
    np.testing.assert_array_equal(metrics.exact_memorization(given), [np.nan, 1.0])
    np.testing.assert_array_equal(metrics.extraction_strength(given), [np.nan, 1.0])


def test_harmonic_mean() -> None:
    np.testing.assert_allclose(metrics.harmonic_mean([[1.0, 0.5], [0.5, 0.0]]), [2 / 3, 0.0])


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    # published components of a retrained 1B model, rounded, whose harmonic mean is .58929
    parts = [[0.8803, 0.8264, 0.5138], [0.3916, 0.8145, 0.5022], [0.4280, 0.8023, 0.6156]]
    sets = [np.array([part, part]) for part in parts]
    found = utility(sets, Interval(50, 0.95, 0))
    assert found.value == pytest.approx(0.58929, abs=5e-5)
    assert (found.low, found.high, found.n) == (pytest.approx(found.value), pytest.approx(found.value), 6)


def test_the_interval_of_utility_draws_each_set_by_itself() -> None:
    generator = np.random.default_rng(1)
    sets = [generator.uniform(0.2, 0.9, size=(60, 3)), generator.uniform(0.4, 0.6, size=(2, 3)), np.full((30, 3), 0.5)]
    found = utility(sets, Interval(500, 0.9, 0))
    assert found.low < found.value < found.high and found.high - found.low < 0.1


def test_rouge_counts_the_longest_common_subsequence_of_stems() -> None:
    found = rouge_l(["the cat sat on the mat", "running"], ["a cat is sitting on a mat", "he runs"])
    # cat, on, mat of 6 reference words and 7 written; runs and running share a stem
    np.testing.assert_allclose(found["recall"], [3 / 6, 1.0])
    np.testing.assert_allclose(found["f1"], [2 * (3 / 6) * (3 / 7) / (3 / 6 + 3 / 7), 2 * 0.5 / 1.5])
