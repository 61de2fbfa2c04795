"""Unlearning by hidden states."""

import pytest
import torch

from posttrain.objectives.unlearning_representation import (
    random_direction,
    representation_misdirection,
    representation_retention,
)
from tests.objectives.truth import gradient


def states(tokens: int = 5, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64).requires_grad_()


def test_misdirection_pulls_to_one_point_of_the_given_length():
    hidden = states()
    loss = representation_misdirection(hidden, scale=6.5, seed=3)
    u = random_direction(8, 3)
    assert u.norm().item() == pytest.approx(1.0, rel=1e-12) and (u > 0).all()
    torch.testing.assert_close(loss.values, (hidden.detach() - 6.5 * u).square().sum(1) / 8)
    torch.testing.assert_close(gradient(loss.values, hidden), 2 * (hidden.detach() - 6.5 * u) / 8)
    there = (6.5 * u).expand(2, 8)
    assert representation_misdirection(there, scale=6.5, seed=3).values.tolist() == [0.0, 0.0]


def test_the_direction_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = random_direction(16, 7)
    torch.rand(3)
    assert torch.equal(random_direction(16, 7), first) and not torch.equal(random_direction(16, 8), first)


def test_retention_keeps_the_reference_s_states():
    hidden, reference = states(), states(seed=1).detach()
    values = representation_retention(hidden, reference).values
    torch.testing.assert_close(values, (hidden.detach() - reference).square().mean(1))
    torch.testing.assert_close(gradient(values, hidden), 2 * (hidden.detach() - reference) / 8)
    assert representation_retention(hidden, hidden.detach()).values.tolist() == [0.0] * 5


def test_no_sequence_weighs_another():
    """open-unlearning divides each sequence's sum by every sequence's length: [b] / [b, 1] is b x b."""
    long, short = states(6), states(2, seed=2)
    both = torch.cat([representation_misdirection(one).values for one in (long, short)]).mean()
    together = representation_misdirection(torch.cat([long, short])).values.mean()
    torch.testing.assert_close(together, both)
    expected = 2 * (short.detach() - 2 * random_direction(8, 0)) / 8 / 8
    torch.testing.assert_close(gradient(together, short), expected)


def test_half_precision_is_squared_in_single():
    hidden = states().detach().to(torch.bfloat16) * 300
    loss = representation_misdirection(hidden)
    assert loss.values.dtype == torch.float32
    expected = representation_misdirection(hidden.double()).values
    torch.testing.assert_close(loss.values.double(), expected, rtol=1e-5, atol=0)
    assert representation_retention(hidden, hidden + 1).values.dtype == torch.float32


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"scale is 0\.0"):
        representation_misdirection(states(), scale=0.0)
    with pytest.raises(ValueError, match="seed is -1"):
        representation_misdirection(states(), seed=-1)
    with pytest.raises(ValueError, match="reference_hidden"):
        representation_retention(states(), states(1))
