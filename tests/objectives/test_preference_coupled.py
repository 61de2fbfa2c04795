"""aot against the sorted loss written out densely, over the whole step, however the step is split."""

import math

import pytest
import torch

from posttrain.objectives import Loss
from posttrain.objectives.preference_coupled import aot, aot_unpaired, matched_logratios, matched_reference_margin
from tests.objectives.trl_losses import dpo_trainer_loss
from tests.objectives.truth import DTYPES, gradient

PAIRS = 8


def random_logps(seed=0, pairs=PAIRS):
    """Log-probabilities of chosen and rejected completions under the policy, then under the reference."""
    drawn = torch.randn(4, pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen, rejected, reference_chosen, reference_rejected = -20 + 5 * drawn
    return chosen.requires_grad_(), rejected.requires_grad_(), reference_chosen, reference_rejected


def logistic(x, label_smoothing=0.0):
    s = torch.sigmoid(x)
    return -(1 - label_smoothing) * s.log() - label_smoothing * (1 - s).log()


def in_parts(function, inputs, size, **options) -> Loss:
    """The objective on one micro-batch after the other."""
    pairs = next(iter(inputs.values())).shape[0]
    starts = range(0, pairs, size)
    parts = [
        function(**{key: value[start : start + size] for key, value in inputs.items()}, **options) for start in starts
    ]
    return Loss(torch.cat([part.values for part in parts]))


@pytest.mark.parametrize("size", [1, 2, 3, PAIRS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_aot_is_the_sorted_loss_of_the_whole_step(size, label_smoothing):
    chosen, rejected, reference_chosen, reference_rejected = random_logps()
    options = {"beta": 0.3, "label_smoothing": label_smoothing}
    lead = (chosen - rejected).sort().values - (reference_chosen - reference_rejected).sort().values
    dense = logistic(0.3 * lead, label_smoothing)
    matched = matched_reference_margin(chosen.detach(), rejected.detach(), reference_chosen, reference_rejected)
    inputs = {"chosen_sequence_logp": chosen, "rejected_sequence_logp": rejected, **matched}
    split = in_parts(aot, inputs, size, **options)
    torch.testing.assert_close(split.values.sum(), dense.sum())
    for given in (chosen, rejected):
        torch.testing.assert_close(gradient(split.values, given), gradient(dense, given))


@pytest.mark.parametrize("size", [1, 2, 3, PAIRS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_aot_unpaired_is_the_sorted_loss_of_the_whole_step(size, label_smoothing):
    a, b, _, _ = random_logps(seed=1)
    options = {"beta": 0.3, "label_smoothing": label_smoothing}
    dense = logistic(0.3 * (a.sort().values - b.sort().values), label_smoothing)
    inputs = {"chosen_logratio": a, "rejected_logratio": b, **matched_logratios(a.detach(), b.detach())}
    split = in_parts(aot_unpaired, inputs, size, **options)
    torch.testing.assert_close(split.values.sum(), dense.sum())
    for given in (a, b):
        torch.testing.assert_close(gradient(split.values, given), gradient(dense, given))


def test_matches_by_hand():
    a = torch.tensor([3.0, -1.0, 0.5])
    b = torch.tensor([10.0, 30.0, 20.0])
    found = matched_logratios(a, b)
    assert found["matched_rejected_logratio"].tolist() == [30.0, 10.0, 20.0]
    assert found["matched_chosen_logratio"].tolist() == [-1.0, 3.0, 0.5]
    zero = torch.zeros(3)
    margins = matched_reference_margin(a, zero, b, zero)
    assert margins["matched_reference_margin"].tolist() == [30.0, 10.0, 20.0]


def test_values_and_slopes_by_hand():
    # leads of log 3: values log(4/3), slopes of size beta / 4
    a = torch.tensor([5.0, 1.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 5.0], dtype=torch.float64).sub(math.log(3)).requires_grad_()
    loss = aot_unpaired(a, b, **matched_logratios(a.detach(), b.detach()), beta=1.0)
    assert loss.values.tolist() == pytest.approx([math.log(4 / 3)] * 2)
    assert gradient(loss.values, a).tolist() == pytest.approx([-0.25] * 2)
    assert gradient(loss.values, b).tolist() == pytest.approx([0.25] * 2)
    assert loss.metrics["matched_margin"].tolist() == pytest.approx([math.log(3)] * 2)
    # the pairs' own margins are others: 4 + log 3 and -4 + log 3
    assert loss.metrics["implicit_margin"].tolist() == pytest.approx([4 + math.log(3), -4 + math.log(3)])


def test_the_policy_at_the_reference_gives_ln_2():
    chosen, rejected, _, _ = random_logps(seed=2)
    matched = matched_reference_margin(chosen.detach(), rejected.detach(), chosen.detach(), rejected.detach())
    torch.testing.assert_close(aot(chosen, rejected, **matched).values, torch.full_like(chosen, math.log(2)))
    zero = torch.zeros(3, requires_grad=True)
    loss = aot_unpaired(zero, zero, **matched_logratios(zero.detach(), zero.detach()))
    torch.testing.assert_close(loss.values, torch.full_like(zero, math.log(2)))


def test_equal_log_ratios_are_matched_too():
    a = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    loss = aot_unpaired(a, b, **matched_logratios(a.detach(), b.detach()), beta=1.0)
    dense = logistic(a.sort(stable=True).values - b.sort(stable=True).values)
    torch.testing.assert_close(loss.values.sum(), dense.sum())
    for given in (a, b):
        torch.testing.assert_close(gradient(loss.values, given), gradient(dense, given))


def test_prepared_numbers_carry_no_gradient():
    a, b, c, _ = random_logps(seed=3)
    c.requires_grad_()
    assert not gradient(aot(a, b, c).values, c).any()
    loss = aot_unpaired(a, b, c, c)
    assert not gradient(loss.values, c).any() and gradient(loss.values, b).all()


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_step_of_no_pair_or_one(pairs):
    chosen, rejected, reference_chosen, reference_rejected = random_logps(pairs=pairs)
    matched = matched_reference_margin(chosen.detach(), rejected.detach(), reference_chosen, reference_rejected)
    paired = aot(chosen, rejected, **matched, beta=0.3)
    margin = chosen - rejected - reference_chosen + reference_rejected
    torch.testing.assert_close(paired.values, logistic(0.3 * margin))
    unpaired = aot_unpaired(chosen, rejected, **matched_logratios(chosen.detach(), rejected.detach()), beta=0.3)
    torch.testing.assert_close(unpaired.values, logistic(0.3 * (chosen - rejected)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_log_ratios_are_finite(dtype):
    a = torch.tensor([1e4, -1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    b = torch.tensor([-1e4, 1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros(4, dtype=dtype)
    matched = matched_reference_margin(a.detach(), b.detach(), zero, zero)
    for loss in (
        aot_unpaired(a, b, **matched_logratios(a.detach(), b.detach()), beta=1.0, label_smoothing=0.1),
        aot_unpaired(a, b, b.detach(), a.detach(), beta=1.0),
        aot(a, b, **matched, beta=1.0),
    ):
        assert loss.values.isfinite().all()
        assert gradient(loss.values, a).isfinite().all() and gradient(loss.values, b).isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_it_is_trl_s_where_trl_sees_the_whole_step(label_smoothing):
    """TRL sorts each micro-batch by itself; with the step in one micro-batch the two must agree."""
    logps = random_logps(seed=4)
    chosen, rejected, reference_chosen, reference_rejected = logps
    options = {"beta": 0.3, "label_smoothing": label_smoothing}
    matched = matched_reference_margin(chosen.detach(), rejected.detach(), reference_chosen, reference_rejected)
    ours = aot(chosen, rejected, **matched, **options).values.mean()
    torch.testing.assert_close(ours, dpo_trainer_loss("aot", *logps, **options), rtol=1e-5, atol=1e-5)
    a, b = chosen - reference_chosen, rejected - reference_rejected
    ours = aot_unpaired(a, b, **matched_logratios(a.detach(), b.detach()), **options).values.mean()
    torch.testing.assert_close(ours, dpo_trainer_loss("aot_unpaired", *logps, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: aot(x, x, x, beta=-0.1), "beta is -0.1"),
        (lambda x: aot(x, x, x, label_smoothing=0.6), "label_smoothing is 0.6"),
        (lambda x: aot(x, x, x[:1]), "matched_reference_margin has"),
        (lambda x: aot_unpaired(x, x, x, x, label_smoothing=-0.1), "label_smoothing is -0.1"),
        (lambda x: aot_unpaired(x, x, x, x[:1]), "matched_chosen_logratio has"),
    ],
)
def test_contracts(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([0.5, 0.25]))
