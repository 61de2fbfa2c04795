"""The pull of each token against hand-derived gradients."""

import math

import pytest
import torch

from posttrain.diagnosis.silence import SILENT_BELOW, candidates, gradient_factors, silenced
from posttrain.side import Side

PROBABILITIES = [0.005, 0.1, 0.5, 0.999]
LOGP = torch.tensor(PROBABILITIES, dtype=torch.float64).log()


def side(*lengths):
    rows, none = torch.arange(len(lengths)), torch.zeros(sum(lengths), dtype=torch.long)
    return Side(none, none, torch.tensor(lengths), rows, rows, {}, {}, sum(lengths), len(lengths))


def named(label, own=None):
    return next(one for one in candidates(own) if one.label == label)


def coverage(x, n):
    return n * x * (1 - x) ** (n - 1) / (1 - (1 - x) ** n)


FACTORS = {
    "nll": [1.0] * 4,
    "probability": PROBABILITIES,
    "dft": PROBABILITIES,
    "probability_power(alpha=10)": [p**10 for p in PROBABILITIES],
    "probability_threshold(threshold=0.2)": [0.0, 0.0, 1.0, 1.0],
    "focal": [(1 - p) ** 2 - 2 * p * (1 - p) * math.log(p) for p in PROBABILITIES],
    "poly1": [1 + p for p in PROBABILITIES],
    # two sequences of two tokens, each token with its sequence's factor
    "direct_coverage(n=8)": [coverage(0.0005, 8)] * 2 + [coverage(0.4995, 8)] * 2,
}


@pytest.mark.parametrize("label", FACTORS)
def test_factors_are_the_derivatives_by_hand(label):
    found = gradient_factors(named(label), LOGP, side(2, 2))
    torch.testing.assert_close(found, torch.tensor(FACTORS[label], dtype=torch.float64), rtol=1e-9, atol=0)
    expected = sum(factor < SILENT_BELOW for factor in FACTORS[label]) / 4
    assert silenced(named(label), LOGP, side(2, 2)) == expected


def test_a_threshold_silences_exactly():
    found = gradient_factors(named("probability_threshold(threshold=0.2)"), LOGP, side(4))
    assert found[:2].tolist() == [0.0, 0.0]


def test_a_quantile_is_prepared_over_the_sample():
    own = {"name": "probability_threshold", "quantile": 0.5}
    found = gradient_factors(named("probability_threshold(quantile=0.5)", own), LOGP, side(4))
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_terms_add_up():
    own = [{"name": "nll", "weight": 0.5}, "probability"]
    found = gradient_factors(candidates(own)[-1], LOGP, side(4))
    torch.testing.assert_close(found, 0.5 + LOGP.exp())


@pytest.mark.parametrize(
    "own", ["label_smoothing", "forward_kl", "entropy", {"name": "nll", "statistics": {"temperature": 2}}]
)
def test_what_needs_more_than_the_targets_log_probability_is_left_out(own):
    assert len(candidates(own)) == len(candidates())
    assert "label_smoothing" not in [one.label for one in candidates()]


def test_an_objective_of_the_library_is_not_listed_twice():
    assert [one.label for one in candidates("nll")].count("nll") == 1
