"""mmpo and madpo: targets and weights from numbers beside the pair, by hand and at every margin."""

import math

import pytest
import torch

from posttrain.objectives.preference_scores import madpo, mmpo
from tests.objectives.truth import DTYPES, gradient

L3 = math.log(3)
AUTHORS = {"c_min": 0.5, "c_max": 2.0, "tau": math.log(0.999 / 0.001)}


def tensor(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


def column(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


def batch(pairs=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b, h = 3 * torch.randn(3, pairs, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_(), h


class TestMmpo:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_by_hand(self, dtype):
        # beta Delta = log 3: -log s = log(4/3), -log s(-) = log 4; p = sigmoid(log 3) = 3/4
        a, b = tensor(L3, dtype=dtype), tensor(-L3, dtype=dtype)
        loss = mmpo(a, b, column(L3 / 2, dtype=dtype), beta=0.5, gamma=2.0)
        assert loss.values.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), rel=1e-6)
        assert loss.metrics["target_probability"].item() == pytest.approx(0.75)
        assert loss.metrics["calibration_gap"].item() == pytest.approx(0.0, abs=1e-6)
        assert gradient(loss.values, a).item() == pytest.approx(0.0, abs=1e-7)
        turned = mmpo(a, b, column(-L3 / 2, dtype=dtype), beta=0.5, gamma=2.0)
        assert turned.values.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4), rel=1e-6)
        assert turned.metrics["calibration_gap"].item() == pytest.approx(0.5, rel=1e-6)

    def test_its_gradient_is_the_calibration_gap(self):
        a, b, margin = batch()
        loss = mmpo(a, b, margin, beta=0.4, gamma=0.7)
        gap = torch.sigmoid(0.4 * (a - b)) - torch.sigmoid(0.7 * margin)
        torch.testing.assert_close(loss.metrics["calibration_gap"], gap.detach())
        torch.testing.assert_close(gradient(loss.values, a), 0.4 * gap)
        torch.testing.assert_close(gradient(loss.values, b), -0.4 * gap)

    def test_the_policy_at_the_reference_gives_ln_2(self):
        zero = tensor(0.0, 0.0, 0.0)
        values = mmpo(zero, zero, column(0.0, 5.0, -2.0)).values
        assert values.tolist() == pytest.approx([math.log(2)] * 3)
        # and no pull at all between equal scores
        assert gradient(values, zero)[0].item() == 0

    def test_a_probability_stands_in_for_the_margin(self):
        a, b, margin = batch(seed=1)
        by_margin = mmpo(a, b, margin, gamma=1.3)
        by_probability = mmpo(a, b, None, torch.sigmoid(1.3 * margin), gamma=9.0)
        torch.testing.assert_close(by_probability.values, by_margin.values)

    def test_a_sure_preference_is_dpo(self):
        a, b, _ = batch(seed=2)
        ones = torch.ones_like(a).detach()
        dpo = -torch.nn.functional.logsigmoid(0.1 * (a - b))
        torch.testing.assert_close(mmpo(a, b, None, ones, beta=0.1).values, dpo)
        torch.testing.assert_close(mmpo(a, b, 1e4 * ones, beta=0.1).values, dpo)

    def test_not_exactly_one_column_is_refused(self):
        x = column(0.5)
        with pytest.raises(ValueError, match="found both of score_margin and preference_probability"):
            mmpo(x, x, x, x)
        with pytest.raises(ValueError, match="found neither of score_margin and preference_probability"):
            mmpo(x, x)


class TestMadpo:
    # the sheet's numbers, at the authors' settings
    @pytest.mark.parametrize(
        ("margin", "weight"),
        [(0.0, 1.0), (1.0, 1.204), (4.0, 1.018), (10.0, 0.995), (-1.0, 0.446), (-3.0, 0.062), (-7.0, 1.0)],
    )
    def test_weights_by_hand(self, margin, weight):
        one = tensor(L3 / 0.1)
        loss = madpo(one, tensor(0.0), column(margin), **AUTHORS)
        assert loss.metrics["madpo_weight"].item() == pytest.approx(weight, abs=5e-4)
        assert loss.values.item() == pytest.approx(weight * math.log(4 / 3), abs=2e-4)

    def test_weights_are_the_ratio_of_sigmoids_where_that_can_be_formed(self):
        margins = torch.linspace(-6, 12, 181, dtype=torch.float64)
        for c_min, c_max, lam, tau in ((0.5, 2.0, 1.0, 2.0), (0.2, 4.0, 0.5, 5.0), (0.9, 1.05, 3.0, 0.5)):
            options = {"c_min": c_min, "c_max": c_max, "lam": lam, "tau": tau}
            weights = madpo(margins, margins, margins, **options).metrics["madpo_weight"]
            for h, found in zip(margins.tolist(), weights.tolist(), strict=True):
                c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(lam * (abs(h) - tau)))
                expected = (1 + math.exp(-h)) / (1 + math.exp(-c * h)) if h > -tau else 1.0
                assert found == pytest.approx(expected, rel=1e-12)

    def test_at_tau_the_weight_is_one_on_both_sides(self):
        margins = column(2.0, -2.0, -2.0 + 1e-9)
        weights = madpo(margins, margins, margins, tau=2.0).metrics["madpo_weight"]
        assert weights.tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-8)
        assert weights[1] == 1

    @pytest.mark.parametrize("tau", [0.5, 6.9, 1e3, 1e5])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_margin_breaks_the_weight(self, tau, dtype):
        margins = column(0.0, 1e-30, 88.0, -88.0, -89.0, -104.0, 1e4, -1e4, 3e38, -3e38, dtype=dtype)
        a = torch.zeros_like(margins).requires_grad_()
        loss = madpo(a, -a, margins, tau=tau, lam=3.0)
        weights = loss.metrics["madpo_weight"]
        assert weights.isfinite().all() and (weights >= 0).all() and (weights <= 2).all()
        assert loss.values.isfinite().all() and gradient(loss.values, a).isfinite().all()

    def test_a_missing_margin_stays_visible(self):
        x = column(0.5)
        assert madpo(x, x, column(math.nan)).values.isnan().all()

    def test_weights_scale_the_gradient_and_are_not_normalised(self):
        a, b, h = batch()
        loss = madpo(a, b, h, beta=0.3, tau=2.0)
        weight = loss.metrics["madpo_weight"]
        assert loss.weight is None and (weight != 1).any()
        slope = weight * 0.3 * torch.sigmoid(-0.3 * (a - b))
        torch.testing.assert_close(gradient(loss.values, a), -slope)
        torch.testing.assert_close(gradient(loss.values, b), slope)
        twice = madpo(torch.cat([a, a]), torch.cat([b, b]), torch.cat([h, h]), beta=0.3, tau=2.0)
        torch.testing.assert_close(twice.values.mean(), loss.values.mean())

    def test_the_constants_reach_the_weight(self):
        x, h = column(0.0), column(1.0)
        plain = madpo(x, x, h).values
        for change in ({"c_min": 0.1}, {"c_max": 5.0}, {"lam": 0.3}, {"tau": 3.0}):
            assert not torch.equal(madpo(x, x, h, **change).values, plain)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_log_ratios_are_finite(size, dtype):
    a, b = tensor(size, size, dtype=dtype), tensor(-size, size, dtype=dtype)
    for loss in (
        mmpo(a, b, column(3.0, -3.0, dtype=dtype), beta=1.0),
        madpo(a, b, column(3.0, -1.0, dtype=dtype), beta=1.0),
    ):
        assert loss.values.isfinite().all() and all(metric.isfinite().all() for metric in loss.metrics.values())
        assert gradient(loss.values, a).isfinite().all() and gradient(loss.values, b).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mmpo(x, x, x, beta=0.0), "beta is 0.0"),
        (lambda x: mmpo(x, x, x, gamma=-1.0), "gamma is -1.0"),
        (lambda x: mmpo(x, x, x[:1]), "score_margin has"),
        (lambda x: mmpo(x, x, None, x[:1]), "preference_probability has"),
        (lambda x: madpo(x, x, x[:1]), "reward_margin has"),
        (lambda x: madpo(x, x, x, c_min=0.0), "c_min is 0.0"),
        (lambda x: madpo(x, x, x, c_min=1.0), "give c_min below 1"),
        (lambda x: madpo(x, x, x, c_max=1.0), "c_max above 1"),
        (lambda x: madpo(x, x, x, lam=-1.0), "lam is -1.0"),
        (lambda x: madpo(x, x, x, tau=math.inf), "tau is inf"),
    ],
)
def test_contracts(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([0.5, 0.25]))
