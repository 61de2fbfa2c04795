"""The shared functions against many digits, and finite at both ends."""

import math
from decimal import Decimal

import pytest
import torch

from posttrain.objectives import maths
from tests.objectives.truth import DTYPES, ONE, gradient, probabilities

LOGPS = [-1e-30, -1e-12, -1e-7, -1e-3, -0.5, -math.log(2), -0.7, -1.0, -17.0, -80.0]


def tolerance(dtype):
    return 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("u", LOGPS)
def test_log1mexp_and_one_minus_p(u, dtype):
    point = torch.tensor([u], dtype=dtype, requires_grad=True)
    p, rest = probabilities(point.item())
    assert maths.one_minus_p(point).item() == pytest.approx(float(rest), rel=tolerance(dtype), abs=0)
    assert gradient(maths.one_minus_p(point), point).item() == pytest.approx(-float(p), rel=tolerance(dtype), abs=0)
    assert maths.log1mexp(point).item() == pytest.approx(float(rest.ln()), rel=tolerance(dtype), abs=0)
    assert gradient(maths.log1mexp(point), point).item() == pytest.approx(-float(p / rest), rel=tolerance(dtype), abs=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log1mexp_is_finite_at_both_ends(dtype):
    # a little above 0 is where rounding can put the log-probability of a sure token
    ends = torch.tensor([0.0, 1e-7, -1e4, -torch.finfo(dtype).max], dtype=dtype, requires_grad=True)
    values = maths.log1mexp(ends)
    assert values.isfinite().all() and (values <= 0).all()
    assert gradient(values, ends).tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("a", [-1.0, -0.5, -1e-9, 1e-9, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("logp", [-1e-12, -1e-3, -1.0, -12.0])
def test_powers(a, logp):
    point = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    truth = (Decimal(a) * Decimal(logp)).exp()
    assert maths.power(point, a).item() == pytest.approx(float(truth), rel=1e-13, abs=0)
    assert gradient(maths.power(point, a), point).item() == pytest.approx(float(Decimal(a) * truth), rel=1e-13, abs=0)
    divided = float((ONE - truth) / Decimal(a))
    assert maths.one_minus_power(point, a).item() == pytest.approx(divided, rel=1e-13, abs=0)
    assert gradient(maths.one_minus_power(point, a), point).item() == pytest.approx(-float(truth), rel=1e-13, abs=0)


def test_a_negative_power_goes_on_as_a_line_beyond_e_30():
    logp = torch.tensor([-29.0, -31.0, -1e4], dtype=torch.float64, requires_grad=True)
    slope = math.exp(30)
    values = maths.power(logp, -1.0)
    assert values.tolist() == pytest.approx([math.exp(29), 2 * slope, slope * (1 + 1e4 - 30)], rel=1e-12, abs=0)
    assert gradient(values, logp).tolist() == pytest.approx([-math.exp(29), -slope, -slope], rel=1e-12, abs=0)


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_quantile_is_torch_s(q, count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    assert maths.quantile(values, q).item() == pytest.approx(torch.quantile(values, q).item(), abs=1e-7)


def test_quantile_by_hand_and_of_nothing():
    values = torch.tensor([0.9, 0.1, 0.5, 0.3])
    assert maths.quantile(values, 0.5).item() == pytest.approx(0.4)
    assert maths.quantile(values, 1.0).item() == pytest.approx(0.9)
    assert maths.quantile(values[:0], 0.5).item() == 0
