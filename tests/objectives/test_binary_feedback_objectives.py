"""Objectives of labelled completions: hand values, closed-form gradients, baselines and shifts over steps."""

import math

import pytest
import torch

from posttrain import objectives
from posttrain.objectives.binary_feedback import (
    RewardShift,
    apo_zero_unpaired,
    bco,
    implicit_reward_ce,
    kl_baseline,
    kto,
)
from tests.objectives.trl_losses import kto_trainer_loss
from tests.objectives.truth import DTYPES, gradient

L3 = math.log(3)
LABELS = torch.tensor([1.0, 0.0], dtype=torch.float64)
ZERO = torch.tensor(0.0, dtype=torch.float64)


def both(logratio, dtype=torch.float64):
    """The same log-ratio under a desirable and an undesirable label."""
    return torch.tensor([logratio] * 2, dtype=dtype, requires_grad=True)


def batch(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logratio = 5 * torch.randn(count, generator=generator, dtype=torch.float64)
    return logratio.requires_grad_(), (torch.rand(count, generator=generator) < 0.4).double()


def shifted(value):
    return torch.tensor(value, dtype=torch.float64)


# sigmoid(log 3) = 3/4; each with a desirable and an undesirable completion of that lead
HAND = [
    (lambda r, d: kto(r, d, shifted(1.0), beta=0.5), 2 * L3 + 1, (0.25, 0.75)),
    (
        lambda r, d: kto(r, d, shifted(1.0), beta=0.5, desirable_weight=2.0, undesirable_weight=4.0),
        2 * L3 + 1,
        (0.5, 3.0),
    ),
    (lambda r, d: apo_zero_unpaired(r, d, beta=0.5), 2 * L3, (0.25, 0.75)),
    (lambda r, d: apo_zero_unpaired(r, d, beta=1.0, desirable_weight=3.0, undesirable_weight=0.0), -L3, (2.25, 0.0)),
    (lambda r, d: bco(r, d, shifted(0.5), beta=0.5), 2 * L3 + 1, (math.log(4 / 3), math.log(4))),
    (lambda r, d: bco(r, d, ZERO, torch.full_like(r, 3.0), beta=1.0), -L3, (math.log(4), 3 * math.log(4 / 3))),
    (lambda r, d: implicit_reward_ce(r, d), 20 * L3, (math.log(4 / 3), math.log(4))),
]


@pytest.mark.parametrize(("loss", "logratio", "values"), HAND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_by_hand(loss, logratio, values, dtype):
    found = loss(both(logratio, dtype), LABELS.to(dtype)).values
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(values, rel=100 * torch.finfo(dtype).eps)


def test_gradients_are_the_closed_forms():
    r, desirable = batch()
    signs = 1 - 2 * desirable
    z = shifted(0.7)
    options = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    weight = torch.where(desirable > 0, 1.5, 0.8)
    x = 0.2 * (r - z)
    expected = signs * weight * 0.2 * torch.sigmoid(x) * torch.sigmoid(-x)
    torch.testing.assert_close(gradient(kto(r, desirable, z, **options).values, r), expected)
    x = 0.2 * r
    expected = signs * weight * 0.2 * torch.sigmoid(x) * torch.sigmoid(-x)
    torch.testing.assert_close(gradient(apo_zero_unpaired(r, desirable, **options).values, r), expected)
    density = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    x = 0.2 * r - 0.7
    expected = torch.where(desirable > 0, -0.2 * torch.sigmoid(-x), density * 0.2 * torch.sigmoid(x))
    torch.testing.assert_close(gradient(bco(r, desirable, z, density, beta=0.2).values, r), expected)
    expected = signs * 0.2 * torch.sigmoid(signs * 0.2 * r)
    torch.testing.assert_close(gradient(implicit_reward_ce(r, desirable, beta=0.2).values, r), expected)


def test_where_the_policy_is_the_reference():
    zero = both(0.0)
    for loss, value in (
        (kto(zero, LABELS, **kl_baseline(zero.detach())), 0.5),
        (apo_zero_unpaired(zero, LABELS), 0.5),
        (bco(zero, LABELS, **RewardShift(beta=0.1, shift="class_means", decay=0.9).tensors()), math.log(2)),
        (implicit_reward_ce(zero, LABELS), math.log(2)),
    ):
        assert loss.values.tolist() == pytest.approx([value] * 2)
        assert loss.metrics["reward_accuracy"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_log_ratios_are_finite(size, dtype):
    r, labels, scalar = both(size, dtype), LABELS.to(dtype), torch.tensor(-size)
    for loss in (
        kto(r, labels, scalar.to(dtype), beta=1.0),
        apo_zero_unpaired(r, labels, beta=1.0),
        bco(r, labels, scalar.double(), torch.full_like(r, 10.0), beta=1.0),
        implicit_reward_ce(r, labels, beta=1.0),
    ):
        assert loss.values.isfinite().all() and gradient(loss.values, r).isfinite().all()


def test_metrics():
    r = torch.tensor([3.0, 3.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    low = kto(r, labels, shifted(0.0), beta=0.5)
    assert low.metrics["reward"].tolist() == [1.5, 1.5, -0.5, -0.5]
    assert low.metrics["reward_accuracy"].tolist() == [1.0, 0.0, 0.0, 1.0]
    # it is the baseline, or the shift, that tells right from wrong
    assert kto(r, labels, shifted(4.0), beta=0.5).metrics["reward_accuracy"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert kto(r, labels, shifted(4.0)).metrics["kl_baseline"].item() == 4.0
    moved = bco(r, labels, shifted(-1.0), beta=0.5)
    assert moved.metrics["reward_accuracy"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert moved.metrics["reward_shift"].item() == -1.0


class TestBaseline:
    def test_it_is_the_mean_over_the_step_and_never_negative(self):
        assert kl_baseline(torch.tensor([1.0, 3.0, -1.0]))["kl_baseline"].item() == 1.0
        assert kl_baseline(torch.tensor([1.0, -3.0, -1.0]))["kl_baseline"].item() == 0.0

    def test_a_step_without_mismatched_completions(self):
        found = kl_baseline(torch.zeros(0))["kl_baseline"]
        assert found.item() == 0.0 and found.shape == ()

    def test_it_carries_no_gradient(self):
        z = torch.tensor(1.0, requires_grad=True)
        r, labels = batch()
        assert not gradient(kto(r, labels, z.double()).values, z).any()
        assert not kl_baseline(r)["kl_baseline"].requires_grad


def steps_of(labels):
    generator = torch.Generator().manual_seed(3)
    return [(10 * torch.randn(len(step), generator=generator), torch.tensor(step)) for step in labels]


STEPS = steps_of([[1.0, 0.0, 1.0], [0.0], [1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [], [1.0]])


def shift_of(state):
    found = state.tensors()["reward_shift"]
    assert found.shape == () and found.dtype == torch.float64
    return found.item()


class TestShift:
    def test_the_running_mean_is_that_of_all_rewards_whatever_the_steps(self):
        state = RewardShift(beta=0.1, shift="running_mean", decay=0.9)
        assert shift_of(state) == 0.0
        seen = torch.zeros(0, dtype=torch.float64)
        for logratio, desirable in STEPS:
            state.update(logratio, desirable)
            seen = torch.cat([seen, 0.1 * logratio.double()])
            assert shift_of(state) == pytest.approx(seen.mean().item(), rel=1e-12)

    def test_the_running_mean_does_not_lose_small_rewards_over_many_steps(self):
        state = RewardShift(beta=1.0, shift="running_mean", decay=0.9)
        for step in range(2000):
            state.update(torch.full((64,), 1e4 + step % 2), torch.ones(64))
        assert shift_of(state) == pytest.approx(1e4 + 0.5, rel=1e-12)

    def test_class_means_by_hand(self):
        state = RewardShift(beta=0.5, shift="class_means", decay=0.75)
        state.update(torch.tensor([2.0, 6.0, -4.0]), torch.tensor([1.0, 1.0, 0.0]))
        # rewards of 1 and 3, mean 2; of -2
        assert shift_of(state) == pytest.approx(0.0)
        state.update(torch.tensor([12.0]), torch.tensor([1.0]))
        # 0.75 * 2 + 0.25 * 6 = 3, the other class as it was
        assert shift_of(state) == pytest.approx((3 - 2) / 2)
        state.update(torch.tensor([-12.0, -4.0]), torch.tensor([0.0, 0.0]))
        assert shift_of(state) == pytest.approx((3 - 2.5) / 2)

    def test_a_class_that_has_not_come_yet_counts_as_zero_and_then_starts_at_its_mean(self):
        state = RewardShift(beta=1.0, shift="class_means", decay=0.9)
        state.update(torch.tensor([4.0]), torch.tensor([1.0]))
        assert shift_of(state) == pytest.approx(2.0)
        state.update(torch.tensor([-2.0]), torch.tensor([0.0]))
        assert shift_of(state) == pytest.approx(1.0)

    def test_the_two_kinds_differ_where_one_label_is_more_frequent(self):
        logratio, desirable = torch.tensor([4.0, 4.0, 4.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
        found = {}
        for kind in ("running_mean", "class_means"):
            state = RewardShift(beta=1.0, shift=kind, decay=0.9)
            state.update(logratio, desirable)
            found[kind] = shift_of(state)
        assert found == pytest.approx({"running_mean": 3.0, "class_means": 2.0})

    @pytest.mark.parametrize("shift", ["running_mean", "class_means"])
    def test_a_restored_state_continues_alike(self, shift):
        whole, first, second = (RewardShift(beta=0.1, shift=shift, decay=0.8) for _ in range(3))
        for step in STEPS[:2]:
            whole.update(*step)
            first.update(*step)
        second.load_state_dict(first.state_dict())
        for step in STEPS[2:]:
            whole.update(*step)
            second.update(*step)
            assert shift_of(second) == shift_of(whole)
        assert whole.state_dict() == second.state_dict() != first.state_dict()

    def test_a_state_of_the_other_kind_is_refused(self):
        saved = RewardShift(beta=0.1, shift="running_mean", decay=0.9).state_dict()
        with pytest.raises(ValueError, match="shift is 'running_mean' and shift is 'class_means'"):
            RewardShift(beta=0.1, shift="class_means", decay=0.9).load_state_dict(saved)


def test_density_weights_leave_desirable_examples_alone():
    r, desirable = batch(seed=4)
    plain, weighted = bco(r, desirable, ZERO), bco(r, desirable, ZERO, torch.full_like(r, 2.5))
    factor = torch.where(desirable > 0, 1.0, 2.5).double()
    torch.testing.assert_close(weighted.values, factor * plain.values)
    assert weighted.weight is None


class TestAgainstTRL:
    """kto and apo_zero_unpaired on one micro-batch that is the whole step; TRL 1.16 has no bco to compare with."""

    @pytest.mark.parametrize("offset", [2.0, -2.0])
    def test_kto(self, offset):
        r, desirable = batch(seed=5)
        mismatched = torch.randn(12, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + offset
        options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
        theirs = kto_trainer_loss("kto", r - 7, torch.full_like(r, -7), mismatched, desirable, **options)
        ours = kto(r, desirable, **kl_baseline(mismatched), **options).values.mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(ours, r), gradient(theirs, r), rtol=1e-5, atol=1e-6)

    def test_apo_zero_unpaired(self):
        r, desirable = batch(seed=7)
        options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
        theirs = kto_trainer_loss("apo_zero_unpaired", r - 7, torch.full_like(r, -7), r.detach(), desirable, **options)
        ours = apo_zero_unpaired(r, desirable, **options).values.mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kto", {"beta": 0.0}, "beta is 0.0"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ("kto", {"undesirable_weight": math.nan}, "undesirable_weight is nan"),
        ("kto", {"desirable": torch.ones(1)}, "desirable has"),
        ("apo_zero_unpaired", {"desirable_weight": math.inf}, "desirable_weight is inf"),
        ("bco", {"shift": "class_mean"}, "did you mean 'class_means'"),
        ("bco", {"decay": 1.0}, "decay is 1.0"),
        ("bco", {"density_weight": torch.ones(1)}, "density_weight has"),
        ("implicit_reward_ce", {"beta": -0.05}, "beta is -0.05"),
    ],
)
def test_contracts(name, options, message):
    inputs = {"logratio": torch.ones(2), "desirable": torch.ones(2)}
    scalar = {"kto": {"kl_baseline": torch.tensor(0.0)}, "bco": {"reward_shift": torch.tensor(0.0)}}
    with pytest.raises(ValueError, match=message):
        objectives.get(name)(**{**inputs, **scalar.get(name, {}), **options})
