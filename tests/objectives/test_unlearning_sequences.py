"""Unlearning losses of whole completions: gradients, limits, and FLAT's pairs against f-divergences by number."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from posttrain.objectives.preference import dpo
from posttrain.objectives.unlearning import gradient_ascent
from posttrain.objectives.unlearning_divergence import DIVERGENCES, flat
from posttrain.objectives.unlearning_sequence import npo, preference_refusal, preference_retention, simnpo
from tests.objectives.truth import Rows, gradient

X = torch.tensor([-40.0, -3.0, 0.0, 0.5, 20.0], dtype=torch.float64)
Y = torch.tensor([1.0, -2.0, 0.0, 3.0, -5.0], dtype=torch.float64)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def test_npo_s_value_and_gradient():
    x = leaf(X)
    loss = npo(x, beta=0.1)
    torch.testing.assert_close(loss.values, 20 * torch.log1p(torch.exp(0.1 * X)))
    torch.testing.assert_close(gradient(loss.values, x), 2 / (1 + torch.exp(-0.1 * X)))
    torch.testing.assert_close(loss.metrics["gradient_weight"], 2 / (1 + torch.exp(-0.1 * X)))
    assert npo(torch.zeros(1)).values.item() == pytest.approx(20 * math.log(2), rel=1e-6)


def test_npo_for_a_small_beta_is_gradient_ascent_on_the_sequence_sum():
    """Like units: the sum over a completion's tokens, where `gradient_ascent` is trained on a mean."""
    rows, other = Rows(), Rows(seed=4)
    reference = other.logp.detach()

    def ratio():
        return (rows.logp - reference).sum(0, keepdim=True)

    found = rows.logits_gradient(lambda: npo(ratio(), beta=1e-7).values)
    expected = rows.logits_gradient(lambda: gradient_ascent(rows.logp).values)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    shifted = npo(ratio(), beta=1e-4).values - 2e4 * math.log(2)
    torch.testing.assert_close(shifted, ratio(), rtol=1e-2, atol=1e-2)


def test_npo_does_not_see_a_shift_of_all_logits():
    """muse_bench subtracts raw logits, which a shift of one model's logits changes."""
    rows = Rows()
    plain = npo(rows.logp.sum(0, keepdim=True)).values
    with torch.no_grad():
        rows.z += 7.0
    torch.testing.assert_close(npo(rows.logp.sum(0, keepdim=True)).values, plain)


def test_simnpo_s_value_and_gradient():
    x = leaf(-Y.abs())
    loss = simnpo(x, beta=2.5, delta=0.5)
    torch.testing.assert_close(loss.values, 0.8 * torch.log1p(torch.exp(2.5 * (x.detach() + 0.5))))
    torch.testing.assert_close(gradient(loss.values, x), 2 / (1 + torch.exp(-2.5 * (x.detach() + 0.5))))
    # at a negative log-likelihood of delta a completion has half let go
    half = leaf(torch.tensor([-0.5]))
    assert gradient(simnpo(half, delta=0.5).values, half).item() == 1.0


def test_preference_refusal_is_dpo_with_the_refusal_chosen():
    x, y = leaf(X), leaf(Y)
    loss = preference_refusal(x, y, beta=0.1)
    theirs = dpo(chosen_logratio=y, rejected_logratio=x, beta=0.1).values
    torch.testing.assert_close(loss.values, 20 * theirs)
    weight = 2 / (1 + torch.exp(0.1 * (Y - X)))
    torch.testing.assert_close(gradient(loss.values, x), weight)
    torch.testing.assert_close(gradient(loss.values, y), -weight)


def test_preference_retention_prefers_the_answer():
    x, y = leaf(X), leaf(Y)
    loss = preference_retention(x, y, beta=0.1)
    torch.testing.assert_close(loss.values, 10 * torch.log1p(torch.exp(-0.1 * (X - Y))))
    torch.testing.assert_close(gradient(loss.values, x), -1 / (1 + torch.exp(0.1 * (X - Y))))
    torch.testing.assert_close(gradient(loss.values, y), 1 / (1 + torch.exp(0.1 * (X - Y))))
    assert loss.metrics["preference_accuracy"].tolist() == [0.0, 0.0, 0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    "loss",
    [
        npo,
        simnpo,
        lambda x: preference_refusal(x, x.flip(0)),
        lambda x: preference_retention(x, x.flip(0)),
    ],
)
def test_finite_at_the_ends(loss):
    x = torch.tensor([-1e4, 0.0, -1e-30, 1e4], requires_grad=True)
    values = loss(x).values
    assert values.isfinite().all() and gradient(values, x).isfinite().all()


# f of the divergence, and whether its generator's activation is taken from the same table
F = {
    "tv": lambda u: abs(u - 1) / 2,
    "kl": lambda u: u * math.log(u),
    "reverse_kl": lambda u: -math.log(u),
    "jeffreys": lambda u: (u - 1) * math.log(u),
    "squared_hellinger": lambda u: (math.sqrt(u) - 1) ** 2,
    "pearson": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "js": lambda u: u * math.log(u) - (u + 1) * math.log((1 + u) / 2),
}
V = torch.tensor([0.0, 0.05, 0.4, 0.8, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_pair_is_a_conjugate(name):
    """f*(g(v)) is sup_u (g(v) u - f(u)), found by search."""
    g, conjugate = DIVERGENCES[name]
    for v in V:
        t = g(v[None]).item()
        found = minimize_scalar(lambda log_u: F[name](math.exp(log_u)) - t * math.exp(log_u), bounds=(-9, 9),  # noqa: B023
                                method="bounded", options={"xatol": 1e-11})  # fmt: skip
        assert conjugate(v[None]).item() == pytest.approx(-found.fun, abs=2e-6), v


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_function_beats_the_divergence(name):
    """E_P[g] - E_Q[f*(g)] <= D_f(P || Q), for random distributions and functions of them."""
    generator = torch.Generator().manual_seed(0)
    g, conjugate = DIVERGENCES[name]
    for _ in range(20):
        p, q = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(1)
        v = torch.rand(6, generator=generator, dtype=torch.float64)
        divergence = sum(b * F[name](a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        assert (p * g(v)).sum() - (q * conjugate(v)).sum() <= divergence + 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_flat_unlearns_the_answer_and_teaches_the_template(name):
    """With g(v) = -e^v or 1 - e^v, as in the authors' code for three of them, it would be the other way round."""
    forget, refusal = leaf(V), leaf(V.flip(0))
    values = flat(forget, refusal, divergence=name).values
    assert values.isfinite().all()
    assert (gradient(values, forget) > 0).all() and (gradient(values, refusal) < 0).all()
    assert torch.autograd.gradcheck(lambda a, b: flat(a, b, divergence=name).values, (forget, refusal))


def test_flat_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    expected = {
        "tv": -math.tanh(1) / 2,
        "kl": math.exp(-1) - 1,
        "reverse_kl": -1 + math.exp(-1),
        "jeffreys": -1.0,
        "squared_hellinger": math.exp(-1) - 1,
        "pearson": -1.0,
        "neyman": math.exp(-1) - 1,
        "js": math.log(1 + math.exp(-1)) - math.log(2),
    }
    for name, value in expected.items():
        assert flat(zero, one, divergence=name).values.item() == pytest.approx(value, abs=1e-12), name
    # substituted into f*: 2 - 2 sqrt(1 - v) would give 2
    assert DIVERGENCES["neyman"][1](one).item() == pytest.approx(2 - 2 * math.exp(-0.5), rel=1e-12)


def test_jeffreys_conjugate_starts_like_its_polynomial():
    v = torch.linspace(0, 0.1, 5, dtype=torch.float64)
    _, conjugate = DIVERGENCES["jeffreys"]
    np.testing.assert_allclose(conjugate(v), v + v**2 / 4 + v**3 / 16, atol=1e-5)
    assert conjugate(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(1.3303661247, rel=1e-9)


def test_settings_without_meaning_are_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="did you mean 'pearson'"):
        flat(x, x, divergence="person")
    for loss in (lambda: npo(x, beta=0), lambda: simnpo(x, beta=-1), lambda: preference_retention(x, x, beta="1")):
        with pytest.raises(ValueError, match="beta is"):
            loss()
    with pytest.raises(ValueError, match="delta is -1"):
        simnpo(x, delta=-1)
