"""beta_dpo: which pairs a step keeps, the beta they share, and what is remembered of earlier steps."""

import itertools
import math

import pytest
import torch

from posttrain.objectives.preference_beta_dpo import MarginAverage, batch_beta_and_kept_pairs, beta_dpo
from tests.objectives.truth import DTYPES, gradient

DEFAULTS = {"beta": 0.1, "alpha": 0.6, "rho": 0.2, "seed": 0}


def margins(pairs=20, seed=0, scale=3.0):
    return scale * torch.randn(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def remembered(mean=0.0, deviation=1.0, steps=1):
    values = {"margin_mean": mean, "margin_deviation": deviation, "margin_steps": float(steps)}
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def prepare(delta, state, **options):
    """With a + b = 0, so that the margin is the only thing to see."""
    return batch_beta_and_kept_pairs(delta / 2, -delta / 2, **state, **{**DEFAULTS, **options})


@pytest.mark.parametrize(
    ("pairs", "rho", "kept"), [(20, 0.2, 16), (4, 0.2, 3), (1, 0.9, 1), (10, 0.0, 10), (20, 0.9, 2), (3, 0.99, 1)]
)
def test_the_share_that_is_kept(pairs, rho, kept):
    keep = prepare(margins(pairs), remembered(), rho=rho)["keep"]
    assert keep.sum() == kept and set(keep.tolist()) <= {0.0, 1.0}


def test_beta_follows_the_kept_margins():
    delta = margins(seed=1) + 2
    found = prepare(delta, remembered(mean=1.5, deviation=2.0))
    kept = delta[found["keep"] > 0].mean()
    assert found["beta_batch"].item() == pytest.approx(0.1 * (1 + 0.6 * (kept.item() - 1.5)))
    assert prepare(delta, remembered(mean=100.0, deviation=50.0))["beta_batch"].item() == pytest.approx(1e-3)


def test_before_the_first_step_nothing_is_known():
    delta = margins(seed=2) + 50
    found = prepare(delta, MarginAverage(decay=0.9).tensors())
    assert found["beta_batch"].item() == pytest.approx(0.1) and found["keep"].sum() == 16


def test_the_draw_repeats_and_changes_with_step_and_seed():
    delta = margins(200)
    drawn = [
        prepare(delta, remembered(steps=steps, deviation=3.0), seed=seed)["keep"]
        for steps, seed in ((3, 0), (3, 0), (4, 0), (3, 1))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[2], drawn[3])


def test_the_draw_does_not_touch_the_global_generator_nor_depend_on_it():
    delta = margins()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = prepare(delta, remembered())["keep"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(prepare(delta, remembered())["keep"], first)


def test_the_order_of_the_pairs_does_not_matter():
    delta, order = margins(), torch.randperm(20, generator=torch.Generator().manual_seed(5))
    # so wide a deviation leaves the choice to the random numbers
    plain, shuffled = (prepare(given, remembered(deviation=50.0)) for given in (delta, delta[order]))
    assert torch.equal(shuffled["keep"], plain["keep"][order])
    torch.testing.assert_close(shuffled["beta_batch"], plain["beta_batch"])


def test_pairs_are_drawn_without_replacement_in_proportion_to_the_weights():
    delta = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    weights = torch.exp(-delta.square() / 2)
    expected = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.permutations(range(3), 2):
        left_out = 3 - first - second
        rest = weights.sum() - weights[first]
        expected[left_out] += weights[first] / weights.sum() * weights[second] / rest
    draws = 3000
    found = sum(1 - prepare(delta, remembered(), rho=1 / 3, seed=seed)["keep"] for seed in range(draws)) / draws
    # three standard errors of a share
    assert (found - expected).abs().max() < 3 * 0.5 / math.sqrt(draws)


@pytest.mark.parametrize("state", [remembered(), remembered(deviation=0.0), remembered(1e4, 1e-3, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_where_every_weight_underflows(state, dtype):
    a = torch.tensor([1e4, -1e4, 1e4, 5e3, 0.0], dtype=dtype, requires_grad=True)
    b = torch.tensor([-1e4, 1e4, 1e4, 0.0, 0.0], dtype=dtype, requires_grad=True)
    prepared = batch_beta_and_kept_pairs(a.detach(), b.detach(), **state, **DEFAULTS)
    assert prepared["keep"].sum() == 4 and all(value.dtype == dtype for value in prepared.values())
    loss = beta_dpo(a, b, **prepared)
    assert loss.values.isfinite().all() and gradient(loss.values, a).isfinite().all()


def test_a_step_without_pairs():
    none = torch.zeros(0)
    found = batch_beta_and_kept_pairs(none, none, **remembered(), **DEFAULTS)
    assert found["keep"].shape == (0,) and found["beta_batch"].item() == pytest.approx(0.1)


def test_value_and_gradient_of_the_loss():
    a, b = margins(6, seed=3).requires_grad_(), margins(6, seed=4).requires_grad_()
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    shared = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    loss = beta_dpo(a, b, shared, keep)
    torch.testing.assert_close(loss.values, -torch.log(torch.sigmoid(0.25 * (a - b))))
    slope = 0.25 * torch.sigmoid(-0.25 * (a - b))
    torch.testing.assert_close(gradient(loss.values, a), -slope)
    torch.testing.assert_close(gradient(loss.values, b), slope)
    assert not gradient(loss.values, shared).any()
    assert torch.equal(loss.weight, keep) and torch.equal(loss.metrics["kept"], keep)
    assert loss.metrics["beta_batch"].item() == 0.25
    # rewards are on the scale of beta itself, so that steps can be compared
    torch.testing.assert_close(loss.metrics["implicit_margin"], 0.1 * (a - b).detach())


def numbers(state):
    return {key: value.item() for key, value in state.tensors().items()}


def test_the_first_step_starts_the_averages_and_later_ones_move_them():
    state, zero = MarginAverage(decay=0.9), torch.zeros(2)
    assert numbers(state) == {"margin_mean": 0.0, "margin_deviation": 0.0, "margin_steps": 0.0}
    state.update(torch.tensor([1.0, 5.0]), zero)
    assert numbers(state) == pytest.approx({"margin_mean": 3.0, "margin_deviation": 2.0, "margin_steps": 1.0})
    state.update(torch.tensor([10.0, 16.0]), zero)
    # 0.9 * 3 + 0.1 * 13 and 0.9 * 2 + 0.1 * 3
    assert numbers(state) == pytest.approx({"margin_mean": 4.0, "margin_deviation": 2.1, "margin_steps": 2.0})
    state.update(zero[:0], zero[:0])
    assert numbers(state)["margin_steps"] == 2.0
    state.update(torch.tensor([4.0]), torch.tensor([0.0]))
    assert numbers(state) == pytest.approx({"margin_mean": 4.0, "margin_deviation": 1.89, "margin_steps": 3.0})


def test_a_restored_state_continues_alike():
    steps = [margins(8, seed=seed) for seed in range(6)]
    whole, first, second = (MarginAverage(decay=0.7) for _ in range(3))
    for delta in steps[:3]:
        whole.update(delta, -delta)
        first.update(delta, -delta)
    second.load_state_dict(first.state_dict())
    for delta in steps[3:]:
        found = [prepare(delta, state.tensors()) for state in (whole, second)]
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
        whole.update(delta, -delta)
        second.update(delta, -delta)
    assert whole.state_dict() == second.state_dict()
    assert first.state_dict() != second.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"rho": 1.0}, "rho is 1.0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_contracts(options, message):
    x = torch.tensor([0.5, 0.25])
    with pytest.raises(ValueError, match=message):
        beta_dpo(x, x, torch.tensor(0.1), torch.ones(2), **options)
    with pytest.raises(ValueError, match="keep has"):
        beta_dpo(x, x, torch.tensor(0.1), torch.ones(1))
    with pytest.raises(ValueError, match="decay is 1"):
        MarginAverage(decay=1)
