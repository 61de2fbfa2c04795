"""Attacks and their AUC on cases that can be worked out by hand."""

import zlib

import numpy as np
import pytest

from posttrain.evaluation.bootstrap import Estimate
from posttrain.evaluation.unlearning import membership
from posttrain.evaluation.unlearning.findings import Findings, Interval, add_leak
from tests.evaluation.unlearning.hand_made import answers


def test_min_k_is_the_mean_of_the_least_likely_tokens() -> None:
    given = answers([[-1.0, -5.0, -2.0, -4.0, -3.0], [-7.0, -1.0]])
    # 40 % of 5 tokens are 2, of 2 tokens none: at least one is taken
    np.testing.assert_allclose(membership.min_k(given, 0.4), [-4.5, -7.0])
    np.testing.assert_allclose(membership.min_k(given, 1.0), [-3.0, -4.0])


def test_a_share_is_not_rounded_down_by_its_floating_point() -> None:
    # 0.29 * 100 is 28.999999999999996
    given = answers([[-float(100 - i) for i in range(100)]])
    assert membership.min_k(given, 0.29).tolist() == [-np.arange(72, 101).mean()]


def test_min_k_plus_plus_standardises_by_the_models_own_distribution() -> None:
    # (log p + entropy) / deviation: (-3 + 1) / 2 and (-2 + 2) / 1
    given = answers([[-3.0, -2.0]], entropy=[[1.0, 2.0]], variance=[[4.0, 1.0]])
    np.testing.assert_allclose(membership.min_k_plus_plus(given, 0.5), [-1.0])
    np.testing.assert_allclose(membership.min_k_plus_plus(given, 1.0), [-0.5])


def test_min_k_plus_plus_of_a_certain_prediction_is_finite() -> None:
    assert membership.min_k_plus_plus(answers([[0.0]], entropy=[[0.0]]), 1.0).tolist() == [0.0]


def test_zlib_divides_by_the_compressed_bytes_of_the_text() -> None:
    text = "élan vital " * 20
    found = membership.zlib_ratio(answers([[-2.0, -4.0]]), [text])
    np.testing.assert_allclose(found, [-3.0 / len(zlib.compress(text.encode("utf-8")))])


def test_reference_takes_what_the_model_knows_beyond_another() -> None:
    np.testing.assert_allclose(membership.reference_ratio(answers([[-1.0]]), answers([[-3.0]])), [2.0])


def test_auc_is_one_where_every_member_is_told() -> None:
    low_loss, high_loss = answers([[-0.1], [-0.2]]), answers([[-3.0], [-2.0], [-4.0]])
    assert membership.auc(membership.loss(low_loss), membership.loss(high_loss)) == 1.0
    assert membership.auc(membership.loss(high_loss), membership.loss(low_loss)) == 0.0


def test_auc_counts_ties_half() -> None:
    # pairs: 3>1, 3>3 tie, 0<1, 0<3
    assert membership.auc(np.array([3.0, 0.0]), np.array([1.0, 3.0])) == pytest.approx(1.5 / 4)


def test_auc_agrees_with_scikit_learn_and_its_interval_covers_it() -> None:
    roc = pytest.importorskip("sklearn.metrics").roc_auc_score
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.5, 1, 50).round(1), generator.normal(0, 1, 70).round(1)
    labels = np.r_[np.ones(50), np.zeros(70)]
    found = membership.auc_estimate(members, others, resamples=500, level=0.9, seed=3)
    assert found.value == pytest.approx(roc(labels, np.r_[members, others])) == membership.auc(members, others)
    assert found.low < found.value < found.high and found.n == 120
    # the interval is about that of Hanley and McNeil's standard error
    a, q1, q2 = found.value, found.value / (2 - found.value), 2 * found.value**2 / (1 + found.value)
    error = np.sqrt((a * (1 - a) + 49 * (q1 - a * a) + 69 * (q2 - a * a)) / (50 * 70))
    assert (found.high - found.low) / (2 * 1.645 * error) == pytest.approx(1, abs=0.2)


def test_the_interval_of_the_leak_is_that_of_the_auc_turned_round() -> None:
    found = Findings(3, "", Interval(10, 0.9, 0))
    found.number("mia_min_k_auc", Estimate(0.6, 0.5, 0.8, 12))
    add_leak(found, 0.4, "")
    leak, to_half = (found.measures[name].estimate for name in ("privleak", "privleak_to_half"))
    assert [leak.value, leak.low, leak.high] == pytest.approx([-100 / 3, -200 / 3, -50 / 3]) and leak.n == 12
    assert [to_half.value, to_half.low, to_half.high] == pytest.approx([-20, -60, 0])
    add_leak(found, 1.0, "")
    assert "1 - AUC is divided by" in found.left_out["privleak"]


def test_privacy_leak_by_its_definition() -> None:
    # traces left: members are told better than by the retain model
    assert membership.privacy_leak(0.9, 0.5) == pytest.approx(-80)
    assert membership.privacy_leak(0.2, 0.5) == pytest.approx(60)
    assert membership.privacy_leak(0.4, 0.4) == 0
    with pytest.raises(ValueError, match="AUC is 1"):
        membership.privacy_leak(0.5, 1.0)
