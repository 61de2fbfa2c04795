"""Unlearning losses of the target's likelihood: logit gradients, what they are equal to, and the ends of the range."""

import math

import pytest
import torch
from scipy.integrate import quad

from posttrain import objectives
from posttrain.objectives.unlearning import (
    gradient_ascent,
    refusal_nll,
    satimp,
    token_npo,
    unlikelihood,
    weighted_gradient_ascent,
)
from posttrain.objectives.unlearning_sequence import npo
from posttrain.statistics import signature
from tests.objectives.truth import Rows, gradient, log_of

R = torch.tensor([0.9, 0.02, 0.3, 0.5, 1e-4, 0.7, 0.05], dtype=torch.float64)
# loss of logp, and the weight w of its logit gradient w (e - s) as a function of p
WEIGHTS = {
    "gradient_ascent": (gradient_ascent, lambda p: torch.ones_like(p)),
    "weighted_gradient_ascent": (lambda logp: weighted_gradient_ascent(logp, beta=0.7), lambda p: p**0.7),
    "satimp": (lambda logp: satimp(logp, beta1=5.0, beta2=0.1), lambda p: p**5 * (1 - p) ** 0.1),
    "token_npo": (lambda logp: token_npo(logp, R.log()), lambda p: 2 * p**4 / (p**4 + R**4)),
    "weighted token_npo": (
        lambda logp: token_npo(logp, R.log(), beta=2.0, alpha=1.5),
        lambda p: 2 * p**3.5 / (p**2 + R**2),
    ),
    "unlikelihood": (unlikelihood, lambda p: p / (1 - p)),
    "refusal_nll": (refusal_nll, lambda p: -torch.ones_like(p)),
}
LOSSES = {
    "gradient_ascent": gradient_ascent,
    "weighted_gradient_ascent": weighted_gradient_ascent,
    "satimp": satimp,
    "small satimp": lambda logp: satimp(logp, beta1=0.0, beta2=0.1),
    "token_npo": lambda logp: token_npo(logp, torch.full_like(logp, -2.0)),
    "token_npo far off": lambda logp: token_npo(logp, torch.full_like(logp, -1e4), alpha=1.5),
    "unlikelihood": unlikelihood,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_logit_gradient(name):
    loss, weight = WEIGHTS[name]
    rows = Rows()
    p = rows.logp.detach().exp()
    expected = weight(p)[:, None] * (rows.e - rows.s)
    torch.testing.assert_close(rows.logits_gradient(lambda: loss(rows.logp).values), expected)
    if "gradient_weight" in loss(rows.logp).metrics:
        torch.testing.assert_close(loss(rows.logp).metrics["gradient_weight"], weight(p))


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_weighted_gradient_ascent_minimises_a_power_of_the_probability(beta):
    rows = Rows()
    found = rows.logits_gradient(lambda: weighted_gradient_ascent(rows.logp, beta=beta).values)
    expected = rows.logits_gradient(lambda: rows.z.softmax(1).gather(1, rows.targets[:, None]) ** beta / beta)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("betas", [(5.0, 1.0), (5.0, 0.1), (0.5, 3.0)])
def test_satimp_minimises_an_incomplete_beta_function(betas):
    """B(p; beta1, beta2 + 1) by numerical integration, its slope by central differences."""
    beta1, beta2 = betas
    logp = log_of([0.03, 0.4, 0.8, 0.97])
    found = gradient(satimp(logp, beta1=beta1, beta2=beta2).values, logp)
    h = 1e-5
    for i, centre in enumerate(logp.tolist()):
        low, high = (math.exp(centre + step) for step in (-h, h))
        area, _ = quad(lambda t: t ** (beta1 - 1) * (1 - t) ** beta2, low, high, epsabs=0, epsrel=1e-12)
        assert found[i].item() == pytest.approx(area / (2 * h), rel=1e-6)


def test_unlikelihood_has_the_gradient_of_cross_entropy_unlearning():
    """CE-U: cross-entropy with the policy's own distribution, held, without the target."""
    rows = Rows()

    def ceu():
        without = rows.z.detach().masked_fill(rows.e.bool(), -torch.inf).softmax(1)
        return -(without * rows.z.log_softmax(1)).sum(1)

    found = rows.logits_gradient(lambda: unlikelihood(rows.logp).values)
    torch.testing.assert_close(found, rows.logits_gradient(ceu))


def test_unlikelihood_s_logit_gradient_stays_bounded_where_the_model_is_certain():
    rows = Rows(scale=0.1)
    with torch.no_grad():
        rows.z += 30 * rows.e
    found = rows.logits_gradient(lambda: unlikelihood(rows.logp).values)
    target = found.gather(1, rows.targets[:, None])
    torch.testing.assert_close(target, torch.ones_like(target), rtol=1e-2, atol=0)


@pytest.mark.parametrize("gap", [16.5, 18.0, 20.0])
def test_unlikelihood_moves_what_float32_holds_for_certain(gap):
    """logp is 0 there, and nothing but the other tokens' own shares says how far from certain the model is."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 50, generator=generator, dtype=torch.float64)
    others = z[:, 1:].logsumexp(1)
    z[:, 0] = others + gap
    rounded = z.float().requires_grad_()
    logp = rounded.log_softmax(1)[:, 0]
    assert logp.item() == 0
    loss = unlikelihood(logp)
    found = gradient(loss.values, rounded)[:, 1:].double()
    eps = torch.finfo(torch.float32).eps
    # the truth would be -q_k; what is left out is that 1 - p is less than eps
    q = (z[:, 1:] - others).exp()
    torch.testing.assert_close(found, -q * math.exp(-gap) / eps, rtol=1e-4, atol=0)
    assert loss.values.item() == pytest.approx(-math.log(eps), rel=1e-6)


def test_token_npo_is_npo_of_one_token():
    logp, reference = log_of([0.9, 0.3, 0.01]), log_of([0.5, 0.4, 0.2]).detach()
    torch.testing.assert_close(token_npo(logp, reference, beta=4.0).values, npo(logp - reference, beta=4.0).values)
    assert torch.equal(token_npo(logp, logp.detach()).metrics["gradient_weight"], torch.ones(3, dtype=torch.float64))


def test_token_npo_unlearns_unlikely_tokens_as_well():
    """The authors' code adds 1e-5 to the weight's denominator: 0.01^4 beside it leaves a thousandth of the gradient."""
    logp = log_of([0.01])
    assert gradient(token_npo(logp, logp.detach(), beta=4.0).values, logp).item() == pytest.approx(1.0, rel=1e-12)


def test_token_npo_approaches_gradient_ascent_for_a_small_beta():
    logp, reference = log_of([0.9, 0.3]), log_of([0.2, 0.8]).detach()
    assert gradient(token_npo(logp, reference, beta=1e-6).values, logp).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_satimp_without_importance_or_saturation():
    logp = log_of([0.9, 0.3])
    torch.testing.assert_close(satimp(logp, beta1=2, beta2=0).values, weighted_gradient_ascent(logp, beta=2).values)
    torch.testing.assert_close(satimp(logp, beta1=0, beta2=0).values, gradient_ascent(logp).values)


def test_weights_ask_for_no_reference():
    """open-unlearning copies a reference model for these two and never reads it."""
    for loss in (weighted_gradient_ascent, satimp):
        assert signature(loss).required == ("logp",) and signature(loss).optional == ()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_both_ends(name, dtype):
    logp = torch.tensor([0.0, -1e-30, -1e-7, -1e-3, -1.0, -100.0, -1e4], dtype=dtype).requires_grad_()
    loss = LOSSES[name](logp)
    assert loss.values.isfinite().all() and gradient(loss.values, logp).isfinite().all()
    assert all(metric.isfinite().all() for metric in loss.metrics.values())


def test_what_is_forgotten_is_let_go_but_by_gradient_ascent():
    logp = torch.tensor([-1e4, -50.0], dtype=torch.float64).requires_grad_()
    for name, loss in LOSSES.items():
        found = gradient(loss(logp).values, logp)
        expected = 1.0 if name in ("gradient_ascent", "small satimp") else 0.0
        if name != "token_npo far off":
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=1e-20)


def test_the_refusal_is_the_role_of_its_likelihood():
    assert objectives.get("refusal_nll").declaration.role == "refusal"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: weighted_gradient_ascent(x, beta=-1.0), "beta is -1.0"),
        (lambda x: satimp(x, beta1="5"), "beta1 is '5'"),
        (lambda x: satimp(x, beta2=float("inf")), "beta2 is inf"),
        (lambda x: token_npo(x, x, beta=0.0), "beta is 0.0"),
        (lambda x: token_npo(x, x, alpha=-0.5), "alpha is -0.5"),
    ],
)
def test_settings_without_meaning_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(log_of([0.5]))
