"""probability_threshold: which tokens survive, what divides them, and that the choice carries no gradient."""

import math

import pytest
import torch

from posttrain.objectives.supervised import probability_quantile, probability_threshold
from tests.objectives.truth import DTYPES, gradient, log_of

P = [0.125, 0.5, 0.25, 0.75]


def reduced(loss):
    """The trainer's reduction: weighted values over the sum of weights."""
    return (loss.values * loss.weight).sum() / loss.weight.sum()


@pytest.mark.parametrize(
    ("keep", "inner", "kept", "loss"),
    [
        # 0.5 itself survives on either side; means over survivors: (ln 2 + ln 4/3) / 2, (1/2 + 1/4) / 2, ...
        ("above", "nll", [0, 1, 0, 1], 0.4904146265058631),
        ("above", "probability", [0, 1, 0, 1], 0.375),
        ("below", "nll", [1, 1, 1, 0], 1.3862943611198906),
        ("below", "probability", [1, 1, 1, 0], 0.7083333333333334),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_survivors_and_their_mean_by_hand(keep, inner, kept, loss, dtype):
    logp = torch.tensor(P, dtype=dtype).log()
    logp[1] = -math.log(2)
    bound = logp[1].exp().item()
    logp.requires_grad_()
    found = probability_threshold(logp, threshold=bound, keep=keep, inner=inner)
    assert found.weight.tolist() == kept and not found.weight.requires_grad
    assert found.metrics["kept"].tolist() == kept
    assert reduced(found).item() == pytest.approx(loss, rel=1e-6)
    slope = [-1.0] * 4 if inner == "nll" else [-p for p in P]
    expected = [k * g / sum(kept) for k, g in zip(kept, slope, strict=True)]
    assert gradient(reduced(found), logp).tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    # values alone are already free of dropped tokens
    dropped = torch.tensor(kept) == 0
    assert (found.values[dropped] == 0).all() and (gradient(found.values, logp)[dropped] == 0).all()


def test_the_quantile_is_that_of_p_over_all_tokens_given():
    prepared = probability_quantile(log_of(P), quantile=0.5)
    assert list(prepared) == ["probability_quantile"]
    # sorted 0.125 0.25 0.5 0.75: halfway between the middle two
    assert prepared["probability_quantile"].item() == pytest.approx(0.375)
    assert prepared["probability_quantile"].shape == () and not prepared["probability_quantile"].requires_grad
    assert probability_quantile(log_of([]), quantile=0.3)["probability_quantile"].item() == 0


@pytest.mark.parametrize("inner", ["nll", "probability"])
@pytest.mark.parametrize("keep", ["above", "below"])
def test_micro_batches_with_the_step_s_quantile_add_up_to_the_whole(keep, inner):
    generator = torch.Generator().manual_seed(5)
    logp = -torch.rand(60, generator=generator, dtype=torch.float64) * 4
    options = {"quantile": 0.3, "keep": keep, "inner": inner}
    prepared = probability_quantile(logp, quantile=0.3)
    whole = probability_threshold(logp, **prepared, **options)
    parts = [probability_threshold(part, **prepared, **options) for part in logp.split([7, 20, 1, 32])]
    total = sum((part.values * part.weight).sum() for part in parts) / sum(part.weight.sum() for part in parts)
    assert total.item() == pytest.approx(reduced(whole).item(), rel=1e-13)
    assert whole.weight.mean().item() == pytest.approx(0.7 if keep == "above" else 0.3, abs=0.02)
    assert whole.metrics["probability_quantile"].item() == prepared["probability_quantile"].item()


def test_above_and_below_together_are_everything():
    logp = -torch.rand(40, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    above, below = (probability_threshold(logp, threshold=0.6, keep=keep) for keep in ("above", "below"))
    torch.testing.assert_close(above.values + below.values, -logp)
    torch.testing.assert_close(above.weight + below.weight, torch.ones_like(logp))


def test_no_survivor_is_no_loss():
    found = probability_threshold(log_of([0.1, 0.2]), threshold=0.9)
    assert found.weight.sum() == 0 and found.values.sum() == 0


def test_the_quantile_is_prepared_only_where_it_is_asked_for():
    declaration = probability_threshold.declaration
    assert declaration.prepare is probability_quantile and declaration.model_weight
    assert declaration.prepare_if({"quantile": 0.5}) and not declaration.prepare_if({"quantile": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold is None and quantile is None; set exactly one"),
        ({"threshold": 0.2, "quantile": 0.5}, "set exactly one"),
        ({"threshold": 1.2}, "threshold is 1.2"),
        ({"quantile": -0.1}, "quantile is -0.1"),
        ({"quantile": 0.5}, "probability_quantile is missing"),
        ({"threshold": 0.2, "keep": "abov"}, "did you mean 'above'"),
        ({"threshold": 0.2, "inner": "nl"}, "did you mean 'nll'"),
    ],
)
def test_contracts(options, message):
    with pytest.raises(ValueError, match=message):
        probability_threshold(torch.tensor([-1.0]), **options)
    with pytest.raises(ValueError, match="quantile is 2"):
        probability_quantile(torch.tensor([-1.0]), quantile=2)
