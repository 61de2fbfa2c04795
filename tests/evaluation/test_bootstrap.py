from itertools import product

import numpy as np
import pytest

from posttrain.evaluation.bootstrap import Statistic, estimate, mean, paired_difference, ratio


def test_mean_of_a_fair_coin_has_the_binomial_interval():
    # 100 draws from 50 ones and 50 zeros: the sum is Binomial(100, 1/2) with 2.5 % and 97.5 % quantiles 40 and 60.
    found = estimate(mean([0.0, 1.0] * 50), resamples=20000)
    assert (found.value, found.n) == (0.5, 100)
    assert found.low == pytest.approx(0.40, abs=0.005) and found.high == pytest.approx(0.60, abs=0.005)


def test_ratio_weighs_tokens_alike_and_resamples_items():
    numerator, denominator = np.array([1.0, 6.0, 2.0]), np.array([1.0, 2.0, 4.0])
    draws = [list(draw) for draw in product(range(3), repeat=3)]
    truth = np.array([numerator[draw].sum() / denominator[draw].sum() for draw in draws])
    found = estimate(ratio(numerator, denominator), level=0.5, resamples=20000)
    assert found.value == pytest.approx(9 / 7)
    # The exact bootstrap distribution has atoms: its quantiles hold to within one of them.
    for bound, share in ((found.low, 0.25), (found.high, 0.75)):
        assert (truth < bound - 1e-9).mean() <= share <= (truth <= bound + 1e-9).mean()


def test_a_seed_repeats_and_another_does_not():
    values = mean(np.random.default_rng(0).random(30))
    assert estimate(values, seed=1) == estimate(values, seed=1) != estimate(values, seed=2)


@pytest.mark.parametrize("values", [[0.3], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_degenerate_items_give_an_interval_without_width(values):
    found = estimate(mean(values))
    assert (found.value, found.low, found.high, found.n) == (values[0], values[0], values[0], len(values))


def test_pairing_removes_what_both_sides_share():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=200) * 10
    before, after = mean(difficulty), mean(difficulty + 1)
    found = paired_difference(before, after)
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1) and found.high == pytest.approx(1)
    assert estimate(after).low < estimate(before).high


def test_paired_difference_works_on_any_function_of_sums():
    left = Statistic(np.array([[1.0, 1.0], [3.0, 1.0]]), lambda sums: np.exp(sums[..., 0] / sums[..., 1]))
    right = Statistic(np.array([[2.0], [2.0]]), lambda sums: sums[..., 0])
    assert paired_difference(left, right).value == pytest.approx(4 - np.exp(2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one item"):
        estimate(mean([]))
    with pytest.raises(ValueError, match="finite"):
        estimate(mean([1.0, np.nan]))
    with pytest.raises(ValueError, match="3 before and 2 after"):
        paired_difference(mean([1.0] * 3), mean([1.0] * 2))
    with pytest.raises(ValueError, match="positive denominators"):
        ratio([1.0], [0.0])
