"""Supervised losses against numbers worked out by hand, closed-form gradients and dense softmax rows."""

import math
from itertools import pairwise

import pytest
import torch

from posttrain import objectives
from posttrain.objectives import supervised
from tests.objectives.truth import DTYPES, Rows, gradient, log_of

# (name, hyper-parameters, p, value by hand, w = -dL/dlogp from the formula sheet); ln 2 = 0.69315, ln 4 = 1.38629
BY_HAND = [
    ("nll", {}, 0.25, 1.3862943611198906, lambda p: 1),
    ("probability", {}, 0.25, 0.75, lambda p: p),
    ("probability_power", {"alpha": 2.0}, 0.5, 0.375, lambda p: p**2),
    ("probability_power", {"alpha": 0.5}, 0.25, 1.0, lambda p: p**0.5),
    ("probability_power", {"alpha": -1.0}, 0.25, 3.0, lambda p: 1 / p),
    ("probability_power", {"alpha": 10.0}, 0.5, 0.09990234375, lambda p: p**10),
    ("probability_power", {"alpha": 0.0}, 0.5, 0.6931471805599453, lambda p: 1),
    ("dft", {}, 0.25, 0.34657359027997264, lambda p: p),
    ("focal", {"gamma": 2.0}, 0.25, 0.7797905781299384, lambda p: (1 - p) ** 2 - 2 * p * (1 - p) * math.log(p)),
    (
        "focal",
        {"gamma": 0.5},
        0.75,
        0.14384103622589045,
        lambda p: (1 - p) ** 0.5 - 0.5 * p / (1 - p) ** 0.5 * math.log(p),
    ),
    ("focal", {"gamma": 0.0}, 0.5, 0.6931471805599453, lambda p: 1),
    ("poly1", {"epsilon": 1.0}, 0.25, 2.1362943611198906, lambda p: 1 + p),
    ("poly1", {"epsilon": -1.0}, 0.5, 0.1931471805599453, lambda p: 1 - p),
]


@pytest.mark.parametrize(("name", "options", "p", "value", "weight"), BY_HAND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_by_hand(name, options, p, value, weight, dtype):
    logp = log_of([p], dtype)
    loss = objectives.get(name)(logp, **options)
    assert loss.values.item() == pytest.approx(value, rel=20 * torch.finfo(dtype).eps)
    assert gradient(loss.values, logp).item() == pytest.approx(-weight(p), rel=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("name", "options", "p", "value", "weight"), BY_HAND)
def test_logit_gradient_is_w_times_s_minus_e(name, options, p, value, weight):
    rows = Rows()
    w = torch.tensor([weight(probability) for probability in rows.logp.exp().tolist()], dtype=torch.float64)
    found = rows.logits_gradient(lambda: objectives.get(name)(rows.logp, **options).values)
    torch.testing.assert_close(found, w[:, None] * (rows.s - rows.e), rtol=1e-11, atol=1e-13)


EXTREMES = [
    *((name, options) for name, options, *_ in BY_HAND),
    ("focal", {"gamma": 5.0}),
    ("focal", {"gamma": 1e-3}),
    ("probability_power", {"alpha": -10.0}),
    ("probability_power", {"alpha": 1e-300}),
    ("probability_threshold", {"threshold": 0.2}),
    ("probability_threshold", {"threshold": 0.2, "keep": "below", "inner": "probability"}),
]


@pytest.mark.parametrize(("name", "options"), EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_finite_in_value_and_gradient(name, options, dtype):
    logp = torch.tensor([0.0, 1e-7, -1e-30, -1e-7, -88.0, -1e4], dtype=dtype, requires_grad=True)
    values = objectives.get(name)(logp, **options).values
    assert values.isfinite().all()
    assert gradient(values, logp).isfinite().all()


def test_the_power_family_falls_with_alpha_and_meets_its_members():
    logp = Rows(50, seed=3).logp.detach().requires_grad_()
    grid = (-1.0, -0.3, 0.0, 0.2, 1.0, 3.0, 10.0)
    values = torch.stack([supervised.probability_power(logp, alpha=alpha).values for alpha in grid])
    assert (values[1:] < values[:-1]).all()
    for alpha in (0.0, 1e-300, -1e-300, 1e-25, 1e-12, -1e-12):
        torch.testing.assert_close(supervised.probability_power(logp, alpha=alpha).values, -logp, rtol=1e-10, atol=0)
    torch.testing.assert_close(values[4], supervised.probability(logp).values)


@pytest.mark.parametrize("name, options", [("focal", {"gamma": 0.0}), ("poly1", {"epsilon": 0.0})])
def test_members_that_are_the_likelihood(name, options):
    logp = Rows().logp
    torch.testing.assert_close(objectives.get(name)(logp, **options).values, supervised.nll(logp).values)


def test_poly1_raises_the_first_coefficient_of_the_expansion():
    logp = log_of([0.5, 0.7, 0.9])
    rest = 1 - logp.exp()
    series = sum(rest**j / j for j in range(2, 200)) + (1 + 0.75) * rest
    torch.testing.assert_close(supervised.poly1(logp, epsilon=0.75).values, series)


def test_focal_never_exceeds_the_likelihood_and_falls_with_gamma():
    logp = Rows(50, seed=4).logp
    values = [supervised.focal(logp, gamma=gamma).values for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)]
    assert all((after < before).all() for before, after in pairwise(values))


def test_focal_s_gradient_vanishes_at_sure_tokens_for_small_gamma():
    logp = torch.tensor([-1e-2, -1e-6, -1e-12, 0.0], dtype=torch.float64, requires_grad=True)
    slopes = -gradient(supervised.focal(logp, gamma=0.5).values, logp)
    # (1 + gamma)(1 - p)^gamma to first order in 1 - p
    assert slopes[:3].tolist() == pytest.approx([1.5 * 0.1, 1.5e-3, 1.5e-6], rel=1e-2)
    assert 0 <= slopes[3] < 1e-100


def test_dft_has_the_gradient_of_probability_and_another_value():
    logp = Rows().logp.detach().requires_grad_()
    dft, probability = supervised.dft(logp).values, supervised.probability(logp).values
    torch.testing.assert_close(gradient(dft, logp), gradient(probability, logp))
    assert (dft != probability).all()


def test_label_smoothing_by_hand():
    # two tokens with probabilities 1/4 and 3/4: 0.8 * ln(4/3) + 0.2 * (ln 4 + ln(4/3)) / 2
    z = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    logp = z.log_softmax(1)[:, 1]
    loss = supervised.label_smoothing(logp, z.logsumexp(1), z.mean(1), epsilon=0.2)
    assert loss.values.item() == pytest.approx(0.3975433013185919, rel=1e-12)
    assert loss.metrics["nll"].item() == pytest.approx(0.28768207245178, rel=1e-12)


def test_label_smoothing_against_dense_rows():
    rows, epsilon = Rows(), 0.3

    def loss(share=epsilon):
        return supervised.label_smoothing(rows.logp, rows.z.logsumexp(1), rows.z.mean(1), epsilon=share).values

    mixed = (1 - epsilon) * rows.e + epsilon / rows.vocab
    torch.testing.assert_close(loss(), -(mixed * rows.z.log_softmax(1)).sum(1))
    torch.testing.assert_close(rows.logits_gradient(loss), rows.s - mixed)
    # fairseq: epsilon over the other V - 1 tokens
    others = (1 - epsilon) * rows.e + epsilon / (rows.vocab - 1) * (1 - rows.e)
    theirs = -(others * rows.z.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss(epsilon * rows.vocab / (rows.vocab - 1)), theirs)
    torch.testing.assert_close(loss(0.0), -rows.logp)


def test_z_loss():
    assert supervised.z_loss(torch.tensor([3.0, -2.0, 0.0])).values.tolist() == [9.0, 4.0, 0.0]
    rows = Rows()
    found = rows.logits_gradient(lambda: supervised.z_loss(rows.z.logsumexp(1)).values)
    torch.testing.assert_close(found, 2 * rows.z.detach().logsumexp(1, keepdim=True) * rows.s)


def test_entropy():
    rows = Rows()

    def loss():
        return supervised.entropy(-(rows.z.softmax(1) * rows.z.log_softmax(1)).sum(1)).values

    log_s = rows.s.log()
    entropy = -(rows.s * log_s).sum(1, keepdim=True)
    torch.testing.assert_close(rows.logits_gradient(loss), -rows.s * (log_s + entropy))
    torch.testing.assert_close(loss().detach(), entropy[:, 0])


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_terms_on_huge_statistics(size):
    statistic = torch.tensor([size], requires_grad=True)
    logp = torch.tensor([-abs(size)])
    for values in (
        supervised.z_loss(statistic).values,
        supervised.label_smoothing(logp, statistic, statistic, epsilon=0.1).values,
        supervised.label_smoothing(logp, statistic, -statistic.detach(), epsilon=0.1).values,
    ):
        assert values.isfinite().all() and gradient(values, statistic).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: supervised.probability_power(x, alpha=math.nan), "alpha is nan"),
        (lambda x: supervised.probability_power(x, alpha="1e-1"), "alpha is '1e-1'"),
        (lambda x: supervised.focal(x, gamma=-0.5), "gamma is -0.5"),
        (lambda x: supervised.poly1(x, epsilon=-2), "epsilon is -2"),
        (lambda x: supervised.label_smoothing(x, x, x, epsilon=1.1), "epsilon is 1.1"),
        (lambda x: supervised.label_smoothing(x, x[:1], x), "logsumexp has"),
    ],
)
def test_contracts(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([-1.0, -2.0]))
