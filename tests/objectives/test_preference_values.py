"""The DPO family at numbers worked out by hand, where the policy is the reference, and where two losses must agree.

With log-ratios that are multiples of log 3 the sigmoids are fractions: s(log 3) = 3/4, s(2 log 3) = 9/10.
"""

import math

import pytest
import torch

from posttrain import objectives
from posttrain.objectives.preference import chosen_nll, dpo, dpop, exo, iterative_rpo, robust_dpo
from posttrain.objectives.preference_calibration import apo_zero, cal_dpo, sppo
from posttrain.objectives.preference_divergence import f_dpo, tdpo, wpo
from posttrain.objectives.preference_length import ipo, ld_dpo, length_normalized_dpo
from posttrain.statistics import signature

L3 = math.log(3)


def pair(**numbers):
    """One pair: log-ratios of log 3 and -log 3 unless told otherwise."""
    given = {"chosen_logratio": L3, "rejected_logratio": -L3, **numbers}
    return {name: torch.tensor([number], dtype=torch.float64) for name, number in given.items()}


def batch(count=9, seed=0, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = scale * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return {"chosen_logratio": chosen, "rejected_logratio": rejected}


HAND = [
    ("dpo", {}, {"beta": 1.0}, math.log(10 / 9)),
    ("dpo", {}, {"beta": 0.5}, math.log(4 / 3)),
    ("dpo", {}, {"beta": 1.0, "label_smoothing": 0.25}, 0.75 * math.log(10 / 9) + 0.25 * math.log(10)),
    ("robust_dpo", {}, {"beta": 1.0, "label_smoothing": 0.25}, 1.5 * math.log(10 / 9) - 0.5 * math.log(10)),
    ("hinge", {"chosen_logratio": 1.5, "rejected_logratio": 0.5}, {"beta": 0.25}, 0.75),
    ("hinge", {}, {"beta": 1.0}, 0.0),
    ("exo", {}, {"beta": 1.0, "label_smoothing": 0.5}, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),
    ("exo", {}, {"beta": 0.5, "label_smoothing": 0.25}, 0.0),
    ("nca", {}, {"beta": 1.0}, 1.5 * math.log(4 / 3) + 0.5 * math.log(4)),
    ("bco_pair", {}, {"beta": 1.0}, 2 * math.log(4 / 3)),
    ("apo_zero", {}, {"beta": 1.0}, 1 / 4 + 1 / 4),
    ("apo_down", {}, {"beta": 1.0}, 3 / 4 + 1 / 10),
    ("discopop", {}, {"beta": 1.0, "tau": 1.0}, 0.1 * math.log(10 / 9) + 0.9 / 9),
    ("discopop", {}, {"beta": 0.5, "tau": 0.5}, 0.1 * math.log(4 / 3) + 0.9 / 3),
    ("dpop", {"chosen_logratio": -L3, "rejected_logratio": -2 * L3}, {"beta": 1.0, "lam": 2.0}, math.log(4)),
    ("dpop", {}, {"beta": 1.0}, math.log(10 / 9)),
    ("chosen_nll", {"chosen_mean_logp": -2.0}, {}, 2.0),
    ("iterative_rpo", {"chosen_mean_logp": -2.0}, {"beta": 1.0, "alpha": 0.5}, math.log(10 / 9) + 1),
    ("sppo", {"chosen_logratio": 2.0, "rejected_logratio": -3.0}, {"beta": 0.5}, 1.0 + 4.0),
    (
        "sppo",
        {
            "chosen_logratio": 2.0,
            "rejected_logratio": -3.0,
            "chosen_win_probability": 0.75,
            "rejected_win_probability": 0.25,
        },
        {"beta": 0.5, "form": "soft"},
        1.5**2 + 2.5**2,
    ),
    ("cal_dpo", {}, {"beta": 0.5, "alpha": 0.5}, math.log(10 / 9) + (L3 - 1) ** 2),
    (
        "ipo",
        {"chosen_logratio": 6.0, "rejected_logratio": -2.0, "chosen_length": 3, "rejected_length": 4},
        {"tau": 0.25},
        (2 + 0.5 - 2) ** 2,
    ),
    (
        "length_normalized_dpo",
        {"chosen_logratio": 3 * L3, "rejected_logratio": -2 * L3, "chosen_length": 3, "rejected_length": 2},
        {"beta": 0.5},
        math.log(4 / 3),
    ),
    ("f_dpo", {"chosen_logratio": math.log(2), "rejected_logratio": -math.log(2)},
     {"beta": L3 / 1.5, "divergence": "forward_kl"}, math.log(4 / 3)),
    ("f_dpo", {"rejected_logratio": 0.0}, {"beta": 1.0, "divergence": "js"}, math.log(5 / 3)),
    ("f_dpo", {"chosen_logratio": math.log(4), "rejected_logratio": 0.0},
     {"beta": L3, "divergence": "alpha", "alpha": 0.5}, math.log(4 / 3)),
    ("f_dpo", {"chosen_logratio": math.log(4), "rejected_logratio": 0.0},
     {"beta": L3 / 3, "divergence": "alpha", "alpha": 2.0}, math.log(4 / 3)),
    ("tdpo", {"chosen_sum_forward_kl": L3, "rejected_sum_forward_kl": 2 * L3},
     {"beta": 1.0, "form": "tdpo1"}, math.log(4 / 3)),
    ("tdpo", {"chosen_sum_forward_kl": L3, "rejected_sum_forward_kl": 3 * L3},
     {"beta": 1.0, "alpha": 0.5, "form": "tdpo2"}, math.log(4 / 3)),
    (
        "wpo",
        {
            "chosen_mean_logp": math.log(0.1),
            "chosen_mean_log_sum_sq_probs": math.log(0.2),
            "rejected_mean_logp": math.log(0.25),
            "rejected_mean_log_sum_sq_probs": math.log(0.5),
        },
        {"beta": 1.0},
        math.log(10 / 9) / 4,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "statistics", "hyperparameters", "expected"), HAND)
def test_values_by_hand(name, statistics, hyperparameters, expected):
    given = pair(**statistics)
    if name == "chosen_nll":
        given = {"chosen_mean_logp": given["chosen_mean_logp"]}
    loss = objectives.get(name)(**given, **hyperparameters)
    assert loss.values.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_ld_dpo_by_hand():
    # chosen: head log 3 and tail 2 log 3 above the reference, rejected: head log 3; 2 log 3 - log 3 at alpha 1/2
    given = pair(
        chosen_head_sum_logp=-1 + L3,
        chosen_tail_sum_logp=-2 + 2 * L3,
        rejected_head_sum_logp=-3 + L3,
        rejected_tail_sum_logp=0.0,
        chosen_reference_head_sum_logp=-1.0,
        chosen_reference_tail_sum_logp=-2.0,
        rejected_reference_head_sum_logp=-3.0,
        rejected_reference_tail_sum_logp=0.0,
    )
    del given["chosen_logratio"], given["rejected_logratio"]
    loss = ld_dpo(**given, beta=1.0, alpha=0.5)
    assert loss.values.item() == pytest.approx(math.log(4 / 3), rel=1e-12)
    assert loss.metrics["chosen_reward"].item() == pytest.approx(2 * L3)
    assert loss.metrics["rejected_reward"].item() == pytest.approx(L3)


LN2 = math.log(2)
STEP_0 = [
    ("dpo", {}, LN2),
    ("dpo", {"label_smoothing": 0.2}, LN2),
    ("robust_dpo", {"label_smoothing": 0.2}, LN2),
    ("hinge", {}, 1.0),
    ("ipo", {"tau": 0.1}, 1 / (4 * 0.1**2)),
    ("length_normalized_dpo", {}, LN2),
    ("ld_dpo", {}, LN2),
    ("f_dpo", {"divergence": "forward_kl"}, LN2),
    ("f_dpo", {"divergence": "js"}, LN2),
    ("f_dpo", {"divergence": "alpha"}, LN2),
    ("dpop", {}, LN2),
    ("iterative_rpo", {"alpha": 2.0}, LN2),
    ("exo", {"label_smoothing": 0.2}, -LN2 - math.log(0.2 * 0.8) / 2),
    ("nca", {}, 2 * LN2),
    ("bco_pair", {}, 2 * LN2),
    ("sppo", {"beta": 0.001}, 1 / (2 * 0.001**2)),
    ("sppo", {"beta": 0.1}, 50.0),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("discopop", {}, (1 + LN2) / 2),
    ("wpo", {}, LN2),
    ("tdpo", {"form": "tdpo1"}, LN2),
    ("tdpo", {"form": "tdpo2"}, LN2),
    ("cal_dpo", {"beta": 0.1, "alpha": 0.5}, LN2 + 0.5 / (2 * 0.1**2)),
]


@pytest.mark.parametrize(("name", "hyperparameters", "expected"), STEP_0)
def test_where_the_policy_is_the_reference(name, hyperparameters, expected):
    given = {key: torch.zeros(3, dtype=torch.float64) for key in signature(objectives.get(name)).required}
    loss = objectives.get(name)(**given, **hyperparameters)
    assert loss.values.tolist() == pytest.approx([expected] * 3, rel=1e-12)
    assert loss.metrics["implicit_margin"].tolist() == [0.0] * 3
    assert loss.metrics["reward_accuracy"].tolist() == [0.5] * 3


def same(found, expected):
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-12)


def test_what_is_dpo_in_other_words():
    given = batch()
    plain = dpo(**given)
    zeros = torch.zeros_like(given["chosen_logratio"])
    same(dpo(**given, label_smoothing=0.0), plain)
    same(robust_dpo(**given, label_smoothing=0.0), plain)
    same(f_dpo(**given), plain)
    same(f_dpo(**given, divergence="alpha", alpha=1.0), plain)
    same(f_dpo(**given, divergence="alpha", alpha=0.0), f_dpo(**given, divergence="forward_kl"))
    same(dpop(**given, lam=0.0), plain)
    same(iterative_rpo(**given, chosen_mean_logp=zeros - 3, alpha=0.0), plain)
    for form in ("tdpo1", "tdpo2"):
        same(tdpo(**given, chosen_sum_forward_kl=zeros, rejected_sum_forward_kl=zeros, form=form), plain)
    drifts = {"chosen_sum_forward_kl": zeros + 1, "rejected_sum_forward_kl": zeros + 2}
    same(tdpo(**given, **drifts, alpha=0.0), plain)
    same(tdpo(**given, **drifts, alpha=1.0), tdpo(**given, **drifts, form="tdpo1"))
    same(cal_dpo(**given, alpha=0.0), dpo(**given, beta=1.0))
    same(length_normalized_dpo(**given, chosen_length=zeros + 1, rejected_length=zeros + 1, beta=0.1), plain)
    kernels = ("mean_logp", "mean_log_sum_sq_probs")
    likely = {f"{role}_{kernel}": zeros - 1 for role in ("chosen", "rejected") for kernel in kernels}
    same(wpo(**given, **likely), plain)


def test_ld_dpo_is_dpo_where_tails_count_in_full():
    generator = torch.Generator().manual_seed(1)
    names = [f"{role}_{model}{part}_sum_logp" for role in ("chosen", "rejected") for model in ("", "reference_")
             for part in ("head", "tail")]  # fmt: skip
    given = {name: -10 * torch.rand(6, generator=generator, dtype=torch.float64) for name in names}
    logratios = {
        f"{role}_logratio": sum(
            given[f"{role}_{part}_sum_logp"] - given[f"{role}_reference_{part}_sum_logp"] for part in ("head", "tail")
        )
        for role in ("chosen", "rejected")
    }
    same(ld_dpo(**given, alpha=1.0), dpo(**logratios))


def test_robust_dpo_is_dpo_on_average_over_flips():
    given = batch()
    flipped = {"chosen_logratio": given["rejected_logratio"], "rejected_logratio": given["chosen_logratio"]}
    mean = (
        0.7 * robust_dpo(**given, label_smoothing=0.3).values + 0.3 * robust_dpo(**flipped, label_smoothing=0.3).values
    )
    torch.testing.assert_close(mean, dpo(**given).values, rtol=1e-12, atol=1e-12)


def test_exo_is_the_kl_of_two_choices():
    given = batch(scale=20.0)
    x = 0.1 * (given["chosen_logratio"] - given["rejected_logratio"])
    choice = torch.distributions.Bernoulli(logits=x)
    labels = torch.distributions.Bernoulli(probs=torch.full_like(x, 0.9))
    found = exo(**given, label_smoothing=0.1).values
    torch.testing.assert_close(found, torch.distributions.kl_divergence(choice, labels), rtol=1e-12, atol=1e-12)


def test_sppo_hard_is_soft_at_certain_wins_and_passes_the_columns_over():
    given = batch()
    ones = torch.ones_like(given["chosen_logratio"])
    hard = sppo(**given, beta=0.1)
    same(sppo(**given, chosen_win_probability=ones, rejected_win_probability=0 * ones, beta=0.1, form="soft"), hard)
    same(sppo(**given, chosen_win_probability=ones / 3, rejected_win_probability=ones / 3, beta=0.1), hard)


def test_iterative_rpo_is_the_sum_of_its_two_terms():
    given = batch()
    logp = -torch.rand(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    both = iterative_rpo(**given, chosen_mean_logp=logp, beta=0.3, alpha=0.7)
    assert torch.equal(both.values, dpo(**given, beta=0.3).values + 0.7 * chosen_nll(logp).values)
    assert torch.equal(both.metrics["chosen_nll"], -logp)


def test_a_weight_above_one_is_cut_off():
    numbers = {"chosen_mean_logp": -0.1, "chosen_mean_log_sum_sq_probs": -2.0}
    given = pair(**numbers, rejected_mean_logp=-1.0, rejected_mean_log_sum_sq_probs=-0.5)
    loss = wpo(**given, beta=1.0)
    assert loss.metrics["pair_weight"].item() == 1.0
    assert loss.values.item() == pytest.approx(math.log(10 / 9))


def test_rewards_are_reported_in_the_objectives_own_scale():
    given = pair(chosen_length=2, rejected_length=4)
    metrics = ipo(**given, tau=0.5).metrics
    assert metrics["chosen_reward"].item() == pytest.approx(L3 / 4)
    assert metrics["rejected_reward"].item() == pytest.approx(-L3 / 8)
    assert metrics["implicit_margin"].item() == pytest.approx(3 * L3 / 8)
    assert apo_zero(**pair(), beta=0.1).metrics["chosen_reward"].item() == pytest.approx(0.1 * L3)


def test_lengths_may_be_whole_numbers_and_an_empty_completion_counts_nothing():
    given = {"chosen_logratio": torch.tensor([2.0, 0.0]), "rejected_logratio": torch.tensor([1.0, 1.0])}
    lengths = {"chosen_length": torch.tensor([4, 0]), "rejected_length": torch.tensor([2, 2])}
    assert ipo(**given, **lengths, tau=0.5).values.tolist() == pytest.approx([1.0, 2.25])


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.6}),
        ("robust_dpo", {"label_smoothing": 0.5}),
        ("exo", {"label_smoothing": 0.0}),
        ("exo", {"label_smoothing": 0.7}),
        ("discopop", {"tau": 0.0}),
        ("dpop", {"lam": -1.0}),
        ("cal_dpo", {"alpha": -1.0}),
        ("f_dpo", {"alpha": math.inf}),
        ("f_dpo", {"divergence": "reverse"}),
        ("sppo", {"form": "medium"}),
        ("sppo", {"form": "soft"}),
        ("hinge", {"beta": "0.1"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, hyperparameters):
    (key,) = hyperparameters
    with pytest.raises(ValueError, match=key):
        objectives.get(name)(**pair(), **hyperparameters)
