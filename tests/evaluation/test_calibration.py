import numpy as np
import pytest

from posttrain.evaluation.calibration import bin_sums, expected_calibration_error, reliability_table


def test_expected_calibration_error_by_hand():
    # Bins of width 0.5: (0.2, 0.4) has mean confidence 0.3 and accuracy 0.5; (0.6, 0.8, 1.0) 0.8 and 1/3.
    sums = bin_sums([0.2, 0.4, 0.6, 0.8, 1.0], [True, False, True, False, False], bins=2)[0]
    assert expected_calibration_error(sums) == pytest.approx(2 / 5 * 0.2 + 3 / 5 * (0.8 - 1 / 3))
    low, high = reliability_table(sums)
    assert low == {"low": 0.0, "high": 0.5, "count": 2, "confidence": pytest.approx(0.3), "accuracy": 0.5}
    assert high["count"] == 3 and high["accuracy"] == pytest.approx(1 / 3)


def test_bins_are_open_below_and_closed_above():
    sums = bin_sums([0.0, 0.25, 0.5, 0.75, 1.0], [True] * 5, bins=4)[0]
    assert sums[:, 0].tolist() == [2, 1, 1, 1]


def test_empty_bins_add_nothing_and_show_no_mean():
    sums = bin_sums([1.0, 1.0], [True, True], bins=15)[0]
    assert expected_calibration_error(sums) == 0.0
    assert reliability_table(sums)[0]["confidence"] is None


def test_groups_add_up_to_the_whole():
    generator = np.random.default_rng(0)
    confidence, correct, group = generator.random(50), generator.random(50) < 0.5, generator.integers(0, 4, 50)
    parts = bin_sums(confidence, correct, group, groups=4)
    np.testing.assert_allclose(parts.sum(axis=0), bin_sums(confidence, correct)[0])
    np.testing.assert_allclose(parts[2], bin_sums(confidence[group == 2], correct[group == 2])[0])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="probabilities, not logits"):
        bin_sums([-0.5], [True])
    with pytest.raises(ValueError, match="bins"):
        bin_sums([0.5], [True], bins=0)
    with pytest.raises(ValueError, match="one length"):
        bin_sums([0.5], [True, False])
