"""Losses without a reference: hand values, closed-form gradients, many digits at both ends, TRL's values.

With differences of log 3 the sigmoid is 3/4, so that -logsigmoid is log(4/3).
"""

import math
from decimal import Decimal

import pytest
import torch

from posttrain import objectives
from posttrain.objectives.preference_reference_free import alpha_po, cpo, orpo, simpo, slic
from posttrain.statistics import signature
from tests.objectives.trl_losses import cpo_trainer_losses, orpo_trainer_terms
from tests.objectives.truth import DTYPES, gradient, log_of, probabilities

NAMES = ["slic", "simpo", "alpha_po", "cpo", "orpo"]
THIRD = math.log(4 / 3)


def tensor(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


def random_logps(count=3, pairs=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, pairs, generator=generator, dtype=torch.float64)
    return [(-0.1 - 3 * row).requires_grad_() for row in drawn]


def inputs_of(name, numbers, dtype):
    """Every pairing of the numbers, under the names that the objective asks for."""
    grid = torch.cartesian_prod(*[torch.tensor(numbers, dtype=dtype)] * 2).T
    columns = {"chosen": grid[0], "rejected": grid[1]}
    required = signature(objectives.get(name)).required
    return {key: columns[key.split("_")[0]].clone().requires_grad_() for key in required}


HAND = [
    (slic, (-2.0, -2.5), {}, 0.5 + 0.2),
    (slic, (-1.0, -3.0), {}, 0.1),
    (slic, (-4.0, -1.0), {"delta": 0.5, "lam": 0.0}, 3.5),
    (simpo, (-1.0, -1.0 - (math.log(3) + 0.5) / 2), {}, THIRD),
    (simpo, (-1.0, -1.0), {"beta": 10.0, "gamma": math.log(3)}, math.log(4)),
    (alpha_po, (math.log(0.5), math.log(0.25)), {"alpha": 1.0, "beta": 1.0, "gamma": 2 - math.log(3)}, THIRD),
    (alpha_po, (math.log(0.5), math.log(0.25)), {"alpha": -1.0, "beta": 4 * math.log(3), "gamma": 0.0}, THIRD),
    (cpo, (-5.0, -5.0 - 2 * math.log(3), -0.25), {"beta": 0.5}, THIRD + 0.25),
    (cpo, (-5.0, -5.0, -0.25), {"alpha": 2.0}, math.log(2) + 0.5),
    (orpo, (math.log(0.75), math.log(0.5)), {}, THIRD + 0.1 * THIRD),
    (orpo, (math.log(0.5), math.log(0.75)), {"lam": 2.0}, math.log(2) + 2 * math.log(4)),
]


@pytest.mark.parametrize(("function", "logps", "options", "value"), HAND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_by_hand(function, logps, options, value, dtype):
    loss = function(*(tensor(logp, dtype=dtype) for logp in logps), **options)
    assert loss.values.item() == pytest.approx(value, rel=30 * torch.finfo(dtype).eps)


def test_gradients_are_the_closed_forms():
    w, r, m = random_logps()
    for options in ({}, {"beta": 7.0, "gamma": 0.0}):
        values, beta, gamma = simpo(w, r, **options).values, options.get("beta", 2.0), options.get("gamma", 0.5)
        slope = beta * torch.sigmoid(gamma - beta * (w - r))
        torch.testing.assert_close(gradient(values, w), -slope)
        torch.testing.assert_close(gradient(values, r), slope)
    values = cpo(w, r, m, beta=0.3, alpha=0.7).values
    slope = 0.3 * torch.sigmoid(-0.3 * (w - r))
    torch.testing.assert_close(gradient(values, w), -slope)
    torch.testing.assert_close(gradient(values, r), slope)
    torch.testing.assert_close(gradient(values, m), torch.full_like(m, -0.7))
    for alpha in (0.25, -0.5, 2.0):
        values = alpha_po(w, r, alpha=alpha, beta=1.5, gamma=0.2).values
        r_w, r_l = ((1 - torch.exp(-alpha * x)) / alpha for x in (w, r))
        slope = 1.5 * torch.sigmoid(0.2 - 1.5 * (r_w - r_l))
        torch.testing.assert_close(gradient(values, w), -slope * torch.exp(-alpha * w))
        torch.testing.assert_close(gradient(values, r), slope * torch.exp(-alpha * r))
    values, p_w, p_l = orpo(w, r, lam=0.4).values, w.exp(), r.exp()
    s = torch.sigmoid(torch.logit(p_l) - torch.logit(p_w))
    torch.testing.assert_close(gradient(values, w), -1 - 0.4 * s / (1 - p_w))
    torch.testing.assert_close(gradient(values, r), 0.4 * s / (1 - p_l))
    values = slic(w, r, delta=0.3, lam=0.2).values
    open_hinge = (w - r < 0.3).double()
    assert 0 < open_hinge.sum() < 9
    torch.testing.assert_close(gradient(values, w), -open_hinge - 0.2)
    torch.testing.assert_close(gradient(values, r), open_hinge)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_finite_in_value_and_gradient(name, dtype):
    inputs = inputs_of(name, [0.0, 1e-7, -1e-30, -1e-7, -88.0, -1e4], dtype)
    loss = objectives.get(name)(**inputs)
    assert loss.values.isfinite().all() and all(metric.isfinite().all() for metric in loss.metrics.values())
    for given in inputs.values():
        assert gradient(loss.values, given).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_odds_are_exact_where_p_is_near_one_and_where_it_vanishes(dtype):
    points = torch.tensor([-1e-30, -1e-9, -1e-6, -1e-3, -0.6, -0.8, -20.0, -1e4], dtype=dtype, requires_grad=True)
    half = torch.full_like(points, math.log(0.5))
    chosen = orpo(points, half).metrics["chosen_reward"]
    slopes = gradient(orpo(half, points).values, points)
    for row, point in enumerate(points.tolist()):
        p, miss = probabilities(point)
        assert chosen[row].item() == pytest.approx(float((p / miss).ln()), rel=20 * torch.finfo(dtype).eps, abs=2e-6)
        # lam sigmoid(logodds) / (1 - p) = lam p / (1 - p) where the chosen completion's odds are 1
        expected = Decimal("0.1") * p / miss
        assert slopes[row].item() == pytest.approx(float(expected), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, -1e-9])
def test_alpha_po_meets_simpo_where_alpha_vanishes(alpha):
    w, r, _ = random_logps(seed=1)
    bent = alpha_po(w, r, alpha=alpha, beta=2.0, gamma=0.5).values
    torch.testing.assert_close(bent, simpo(w, r, beta=2.0, gamma=0.5).values, rtol=1e-7, atol=1e-7)


def test_unlikely_completions_pull_more_above_alpha_zero():
    # both pairs are level, so that the slopes differ by the shape of the reward alone
    w = tensor(-0.5, -4.0)
    slopes = [gradient(alpha_po(w, w.detach(), alpha=alpha).values, w).abs() for alpha in (0.5, 0.0, -0.5)]
    assert slopes[0][1] > slopes[0][0] and slopes[1][1] == slopes[1][0] and slopes[2][1] < slopes[2][0]


def test_metrics_are_the_implicit_rewards():
    w, r, m = random_logps(seed=2)
    loss = simpo(w, r, beta=3.0)
    torch.testing.assert_close(loss.metrics["chosen_reward"], 3 * w.detach())
    torch.testing.assert_close(loss.metrics["implicit_margin"], 3 * (w - r).detach())
    torch.testing.assert_close(loss.metrics["reward_accuracy"], (w > r).double())
    torch.testing.assert_close(cpo(w, r, m, beta=0.2).metrics["rejected_reward"], 0.2 * r.detach())
    torch.testing.assert_close(orpo(w, r).metrics["rejected_reward"], torch.logit(r.exp()).detach())
    for loss, mean in ((cpo(w, r, m), m), (orpo(w, r), w), (slic(w, r), w)):
        torch.testing.assert_close(loss.metrics["nll"], -mean.detach())
    odd = alpha_po(log_of([0.5]), log_of([0.25]), alpha=1.0, beta=2.0)
    assert odd.metrics["chosen_reward"].item() == pytest.approx(-2.0)


class TestAgainstTRL:
    """Ours have the likelihood term beside: TRL's covers a micro-batch's tokens, for ORPO with the prompt's."""

    def test_simpo(self):
        w, r, _ = random_logps()
        theirs = cpo_trainer_losses("simpo", w, r, beta=2.5, simpo_gamma=1.2)
        torch.testing.assert_close(simpo(w, r, beta=2.5, gamma=1.2).values, theirs, rtol=1e-5, atol=1e-5)

    def test_alpha_po(self):
        w, r, _ = random_logps()
        for alpha in (0.25, -0.4):
            theirs = cpo_trainer_losses("simpo", w, r, beta=2.5, simpo_gamma=0.3, alpha=alpha)
            ours = alpha_po(w, r, alpha=alpha, beta=2.5, gamma=0.3).values
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_cpo(self):
        w, r, m = random_logps()
        ours = cpo(10 * w, 10 * r, m, beta=0.1, alpha=0.0).values
        torch.testing.assert_close(ours, cpo_trainer_losses("sigmoid", 10 * w, 10 * r, beta=0.1), rtol=1e-5, atol=1e-5)

    def test_orpo(self):
        w, r, _ = random_logps()
        theirs = -orpo_trainer_terms(w, r, beta=0.1).double() - w
        torch.testing.assert_close(orpo(w, r, lam=0.1).values, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: slic(x, x, delta=-1.0), "delta is -1.0"),
        (lambda x: slic(x, x, lam=math.inf), "lam is inf"),
        (lambda x: simpo(x, x, beta=0), "beta is 0"),
        (lambda x: simpo(x, x, gamma=-0.5), "gamma is -0.5"),
        (lambda x: alpha_po(x, x, alpha=math.nan), "alpha is nan"),
        (lambda x: alpha_po(x, x, beta="2"), "beta is '2'"),
        (lambda x: cpo(x, x, x, alpha=-1.0), "alpha is -1.0"),
        (lambda x: cpo(x, x, x[:1]), "chosen_mean_logp has"),
        (lambda x: orpo(x, x, lam=-0.1), "lam is -0.1"),
    ],
)
def test_contracts(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([-1.0, -2.0]))
