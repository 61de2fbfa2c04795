"""direct_coverage against decimals of many digits, over its whole range."""

import math
from decimal import Decimal
from itertools import pairwise

import pytest
import torch

from posttrain.objectives.confidence import direct_coverage
from tests.objectives.truth import DTYPES, ONE, gradient, probabilities

LOGPS = [-1e-12, -1e-6, -1e-3, -0.1, -1.0, -2.5, -10.0, -15.9, -16.1, -23.0, -24.5, -40.0, -100.0, -1e4]
SAMPLES = [1, 2, 8, 64, 4096]


def truth(logp: float, n: int) -> tuple[float, float, float]:
    """-log(1 - (1-x)^n), f = n (1-x)^(n-1) x / (1 - (1-x)^n), and 1 - (1-x)^n."""
    x, miss = probabilities(logp)
    # below x = 1e-50 little of 1 - x is left in so many digits: there n x is the coverage, and f is 1
    coverage = n * x if x < Decimal("1e-50") else ONE - miss**n
    # -log(coverage), by its series where the miss itself is below the digits
    value = miss**n if miss**n < Decimal("1e-100") else -coverage.ln()
    return float(value), float(n * miss ** (n - 1) * x / coverage), float(coverage)


@pytest.mark.parametrize("n", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_exact_gradient(n, dtype):
    logp = torch.tensor(LOGPS, dtype=dtype, requires_grad=True)
    loss = direct_coverage(logp, n=n)
    slopes = gradient(loss.values, logp)
    tight = {"rel": 1e-5 if dtype == torch.float32 else 1e-12, "abs": 1e-30 if dtype == torch.float32 else 1e-300}
    for row, point in enumerate(logp.tolist()):
        value, factor, coverage = truth(point, n)
        assert loss.values[row].item() == pytest.approx(value, **tight)
        assert -slopes[row].item() == pytest.approx(factor, **tight)
        assert loss.metrics["factor"][row].item() == pytest.approx(factor, **tight)
        assert loss.metrics["coverage"][row].item() == pytest.approx(coverage, rel=1e-3, abs=1e-30)


def test_two_samples_by_hand():
    # x = 1/2: 1 - 1/4 = 3/4; f = 2 * 1/2 * 1/2 / (3/4) = 2/3
    logp = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    loss = direct_coverage(logp, n=2)
    assert loss.values.item() == pytest.approx(0.2876820724517809)
    assert gradient(loss.values, logp).item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize("n", SAMPLES)
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_completion_is_finite(n, how, dtype):
    # a little above 0 is where rounding can put it
    logp = torch.tensor([0.0, 1e-6], dtype=dtype, requires_grad=True)
    loss = direct_coverage(logp, logp / 3, n=n, gradient=how)
    slopes = gradient(loss.values, logp)
    assert loss.values.tolist() == pytest.approx([0.0, 0.0], abs=2e-6)
    expected = 0.0 if n > 1 else -1.0 if how == "sum" else -1 / 3
    assert slopes.tolist() == pytest.approx([expected] * 2)
    assert loss.metrics["factor"].tolist() == ([1.0] * 2 if n == 1 else [0.0] * 2)


def test_one_sample_is_the_likelihood_of_the_whole_completion():
    logp = torch.tensor([0.0, -3.0, -1e4], requires_grad=True)
    loss = direct_coverage(logp, n=1)
    assert loss.values.tolist() == [0.0, 3.0, 1e4]
    assert gradient(loss.values, logp).tolist() == [-1.0, -1.0, -1.0]


def test_more_samples_never_cost_more_and_push_less():
    logp = -torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6 - 1e-3
    losses = [direct_coverage(logp, n=n) for n in SAMPLES]
    for fewer, more in pairwise(losses):
        assert (more.values <= fewer.values).all()
        assert (more.metrics["factor"] <= fewer.metrics["factor"]).all()


def test_the_mean_gradient_keeps_the_value_and_scales_the_mean_likelihood():
    lengths = torch.tensor([2.0, 5.0, 40.0], dtype=torch.float64)
    token_mean = torch.tensor([-0.3, -0.5, -1.5], dtype=torch.float64, requires_grad=True)
    exact = direct_coverage(token_mean * lengths, n=16)
    scaled = direct_coverage(token_mean.detach() * lengths, token_mean, n=16, gradient="mean")
    assert torch.equal(scaled.values, exact.values)
    slopes = gradient(scaled.values, token_mean)
    expected = [truth(point, 16)[1] for point in (token_mean * lengths).tolist()]
    assert slopes.tolist() == pytest.approx([-factor for factor in expected], rel=1e-12)
    # one token more or less does not matter to it, while the exact gradient counts every token
    torch.testing.assert_close(gradient(exact.values, token_mean), slopes * lengths)


def test_the_exact_loss_s_curvature_is_right_too():
    logp = torch.tensor([-0.2, -2.0, -30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda s: direct_coverage(s, n=8).values, (logp,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 2.5}, "n is 2.5"),
        ({"n": 2, "gradient": "meen"}, "did you mean 'mean'"),
        ({"n": 2, "gradient": "mean"}, "mean_logp is missing"),
        ({"n": 2, "mean_logp": torch.tensor([-1.0])}, "mean_logp has"),
    ],
)
def test_contracts(options, message):
    with pytest.raises(ValueError, match=message):
        direct_coverage(torch.tensor([-1.0, -2.0]), **options)
