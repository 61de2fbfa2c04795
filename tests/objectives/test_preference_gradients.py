"""The DPO family's gradients in closed form, and log-ratios of +-1e4 in float32."""

import itertools
import math

import pytest
import torch

from posttrain import objectives
from posttrain.objectives.preference import discopop
from posttrain.objectives.preference_divergence import f_dpo, tdpo, wpo
from posttrain.statistics import signature
from tests.objectives.truth import gradient


def s(x):
    return 1 / (1 + torch.exp(-x))


def of_margin(slope, beta):
    """The two gradients of a loss of x = beta (a - b), from its slope in x."""
    return lambda a, b: (beta * slope(beta * (a - b)), -beta * slope(beta * (a - b)))


def of_rewards(chosen, rejected, beta):
    """The two gradients of a loss of u = beta a and v = beta b, from its slopes in them."""
    return lambda a, b: (beta * chosen(beta * a, beta * b), beta * rejected(beta * a, beta * b))


def blended(x, tau):
    m = s(x / tau)
    logistic = -(1 - m) * s(-x) + m * (1 - m) * torch.log(s(x)) / tau
    return logistic + m * torch.exp(-x) * ((1 - m) / tau - 1)


def penalised(a, b, beta=0.3, lam=2.0):
    y = beta * (a - b - lam * torch.relu(-a))
    return -beta * s(-y) * (1 + lam * (a < 0)), beta * s(-y)


def diverging(f, g, beta=0.3):
    """f' and its slope in the log-ratio."""

    def gradients(a, b):
        x = beta * (f(a) - f(b))
        return -beta * s(-x) * g(a), beta * s(-x) * g(b)

    return gradients


def calibrated(a, b, beta=0.3, alpha=0.7):
    return (
        -s(b - a) + 2 * alpha * (a - 1 / (2 * beta)),
        s(b - a) + 2 * alpha * (b + 1 / (2 * beta)),
    )


FORWARD = diverging(lambda u: 1 - torch.exp(-u), lambda u: torch.exp(-u))
JS = diverging(lambda u: torch.log(2 * s(u)), lambda u: s(-u))
ALPHA = diverging(lambda u: (torch.exp(-0.7 * u) - 1) / -0.7, lambda u: torch.exp(-0.7 * u))
BETA = {"beta": 0.3}
CLOSED = [
    ("dpo", BETA, of_margin(lambda x: -s(-x), 0.3)),
    ("dpo", {**BETA, "label_smoothing": 0.2}, of_margin(lambda x: s(x) - 0.8, 0.3)),
    ("robust_dpo", {**BETA, "label_smoothing": 0.2}, of_margin(lambda x: -(0.8 * s(-x) + 0.2 * s(x)) / 0.6, 0.3)),
    ("hinge", BETA, of_margin(lambda x: -(x < 1).double(), 0.3)),
    ("exo", {**BETA, "label_smoothing": 0.2}, of_margin(lambda x: s(x) * s(-x) * (x - math.log(4)), 0.3)),
    ("discopop", {**BETA, "tau": 0.5}, of_margin(lambda x: blended(x, 0.5), 0.3)),
    ("dpop", {**BETA, "lam": 2.0}, penalised),
    ("f_dpo", {**BETA, "divergence": "forward_kl"}, FORWARD),
    ("f_dpo", {**BETA, "divergence": "js"}, JS),
    ("f_dpo", {**BETA, "divergence": "alpha", "alpha": 0.3}, ALPHA),
    ("nca", BETA, of_rewards(lambda u, v: (3 * s(u) - 2) / 2, lambda u, v: s(v) / 2, 0.3)),
    ("bco_pair", BETA, of_rewards(lambda u, v: -s(-u), lambda u, v: s(v), 0.3)),
    ("sppo", BETA, lambda a, b: (2 * (a - 1 / 0.6), 2 * (b + 1 / 0.6))),
    ("apo_zero", BETA, of_rewards(lambda u, v: -s(u) * s(-u), lambda u, v: s(v) * s(-v), 0.3)),
    (
        "apo_down",
        BETA,
        of_rewards(lambda u, v: s(u) * s(-u) - s(u - v) * s(v - u), lambda u, v: s(u - v) * s(v - u), 0.3),
    ),
    ("cal_dpo", {**BETA, "alpha": 0.7}, calibrated),
]


def logratios(count=12, scale=4.0):
    generator = torch.Generator().manual_seed(0)
    made = scale * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return made[0].requires_grad_(), made[1].requires_grad_()


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "hyperparameters", "closed"), CLOSED)
def test_gradients_of_the_log_ratios(name, hyperparameters, closed):
    chosen, rejected = logratios()
    loss = objectives.get(name)(chosen_logratio=chosen, rejected_logratio=rejected, **hyperparameters)
    expected = closed(chosen.detach(), rejected.detach())
    agree(gradient(loss.values, chosen), expected[0])
    agree(gradient(loss.values, rejected), expected[1])


def test_gradients_through_lengths():
    chosen, rejected = logratios()
    lengths = torch.arange(1, 13).double(), torch.arange(12, 0, -1).double()
    d = chosen.detach() / lengths[0] - rejected.detach() / lengths[1]
    ipo = objectives.get("ipo")(chosen, rejected, *lengths, tau=0.2)
    agree(gradient(ipo.values, chosen), 2 * (d - 2.5) / lengths[0])
    agree(gradient(ipo.values, rejected), -2 * (d - 2.5) / lengths[1])
    normalised = objectives.get("length_normalized_dpo")(chosen, rejected, *lengths, beta=3.0)
    agree(gradient(normalised.values, chosen), -3 * s(-3 * d) / lengths[0])
    agree(gradient(normalised.values, rejected), 3 * s(-3 * d) / lengths[1])


def test_tails_pull_by_alpha_and_the_reference_gets_the_opposite():
    generator = torch.Generator().manual_seed(3)
    ld_dpo = objectives.get("ld_dpo")
    given = {
        name: (-5 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_()
        for name in signature(ld_dpo).required
    }
    loss = ld_dpo(**given, beta=0.3, alpha=0.25)
    pull = 0.3 * s(-loss.metrics["implicit_margin"])
    for name, tensor in given.items():
        sign = (-1 if name.startswith("chosen") else 1) * (-1 if "reference" in name else 1)
        agree(gradient(loss.values, tensor), sign * pull * (0.25 if "tail" in name else 1.0))


@pytest.mark.parametrize("form", ["tdpo1", "tdpo2"])
def test_gradients_of_the_divergences(form):
    chosen, rejected = logratios()
    drifts = [(torch.arange(12).double() / scale).requires_grad_() for scale in (3, 5)]
    loss = tdpo(chosen, rejected, *drifts, beta=0.3, alpha=0.25, form=form)
    share = 1.0 if form == "tdpo1" else 0.25
    pull = 0.3 * s(-0.3 * (chosen - rejected - share * (drifts[1] - drifts[0]))).detach()
    agree(gradient(loss.values, chosen), -pull)
    agree(gradient(loss.values, rejected), pull)
    agree(gradient(loss.values, drifts[1]), share * pull)
    agree(gradient(loss.values, drifts[0]), -pull if form == "tdpo1" else torch.zeros(12).double())


def test_wpos_weight_gets_no_gradient():
    chosen, rejected = logratios()
    likely = [torch.full((12,), level, dtype=torch.float64, requires_grad=True) for level in (-2.0, -1.5, -1.0, -0.8)]
    loss = wpo(chosen, rejected, *likely, beta=0.3)
    pull = 0.3 * math.exp(-2.0 + 1.5 - 1.0 + 0.8) * s(-0.3 * (chosen - rejected)).detach()
    agree(gradient(loss.values, chosen), -pull)
    agree(gradient(loss.values, rejected), pull)
    for statistic in likely:
        assert gradient(loss.values, statistic).count_nonzero() == 0


FAR = [-1e4, -1e3, -100.0, -1.0, 0.0, 1.0, 100.0, 1e3, 1e4]
VARIANTS = {
    "dpo": [{}, {"label_smoothing": 0.3}, {"beta": 10.0}],
    "f_dpo": [
        *({"divergence": d} for d in ("reverse_kl", "forward_kl", "js")),
        *({"divergence": "alpha", "alpha": alpha} for alpha in (-1.0, 0.0, 0.5, 1.0, 1.5, 3.0)),
    ],
    "tdpo": [{"form": "tdpo1"}, {"form": "tdpo2"}],
    "discopop": [{}, {"tau": 1.0}, {"tau": 5.0}, {"beta": 2.0}],
    "exo": [{}, {"beta": 10.0}],
    "ipo": [{}, {"tau": 1e-3}],
}
NAMES = (
    *("dpo", "robust_dpo", "hinge", "exo", "discopop", "dpop", "chosen_nll", "iterative_rpo", "ipo", "ld_dpo", "f_dpo"),
    *("length_normalized_dpo", "tdpo", "wpo", "nca", "bco_pair", "sppo", "apo_zero", "apo_down", "cal_dpo"),
)


@pytest.mark.parametrize("name", NAMES)
def test_far_log_ratios_are_finite_in_value_and_gradient(name):
    chosen, rejected = torch.tensor(list(itertools.product(FAR, FAR))).unbind(1)
    function = objectives.get(name)
    for hyperparameters in VARIANTS.get(name, [{}]):
        given = {}
        for key in signature(function).required:
            side = chosen if key.startswith("chosen") else rejected
            nonnegative = key.endswith(("length", "kl"))
            given[key] = (side.abs() if nonnegative else side).clone().requires_grad_()
        loss = function(**given, **hyperparameters)
        assert loss.values.isfinite().all(), hyperparameters
        for key, statistic in given.items():
            assert gradient(loss.values, statistic).isfinite().all(), (hyperparameters, key)
        assert all(metric.isfinite().all() for metric in loss.metrics.values())


@pytest.mark.parametrize("hyperparameters", [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.5}])
def test_a_lost_chosen_completion_is_still_pulled_back(hyperparameters):
    chosen = torch.tensor([-1e4, -200.0], requires_grad=True)
    loss = f_dpo(chosen, torch.zeros(2), beta=0.1, **hyperparameters)
    # s(-x) is 1 there; the slope of f' is held at e^30
    assert gradient(loss.values, chosen).tolist() == pytest.approx([-0.1 * math.exp(30)] * 2)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_up_to_e30_the_held_exponential_is_the_plain_one(divergence):
    chosen, rejected = torch.tensor([[-29.0, -5.0, 0.5, 40.0], [-28.0, 3.0, -2.0, -27.0]]).double()
    power = -1.0 if divergence == "forward_kl" else -0.5
    scores = [(torch.exp(power * logratio) - 1) / power for logratio in (chosen, rejected)]
    expected = torch.nn.functional.softplus(-1e-10 * (scores[0] - scores[1]))
    found = f_dpo(chosen, rejected, beta=1e-10, divergence=divergence).values
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_discopops_exponential_part_is_exact_where_its_factors_are_not():
    # tau = 1: m exp(-x) = s(-x), and (1 - m) = s(-x) too
    x = torch.tensor([-90.0, -3.0, 0.0, 3.0])
    found = discopop(x, torch.zeros(4), beta=1.0, tau=1.0).values
    exact = x.double()
    expected = s(-exact) * (torch.nn.functional.softplus(-exact) + 1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0.0)
