"""Hand-written gradients against finite differences in float64."""

import pytest
import torch

from posttrain.kernels import map_logits, vocab_loss
from tests.kernels.problems import DIFFERENTIABLE, mixed_loss, problem, tiles

HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5, "temperature": 0.7},
    "everything": {"scale": 1.3, "softcap": 2.5, "bias": True, "rank": 2, "temperature": 1.4},
    "adapter": {"scale": 0.6, "bias": True, "rank": 1},
}
# Tokens and vocabulary of the problem, tokens and vocabulary of a tile: several of each, ragged, and single entries.
SHAPES = {"ragged": (3, 5, 2, 3), "single": (2, 4, 1, 1), "whole": (3, 5, 8, 8)}


def check(function, case):
    """gradcheck with respect to hidden states and all tensors of the head."""
    assert torch.autograd.gradcheck(lambda *leaves: function(case.with_leaves(leaves)), case.leaves)


@pytest.mark.parametrize("head", ["plain", "softcap", "everything"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_statistic(name, head):
    case = problem(2, 5, 2, **HEADS[head])
    with tiles(1, 2):
        check(lambda case: case.statistics(name)[name], case)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS)
def test_a_mixture_of_all(head, shape):
    tokens, vocab, rows, columns = SHAPES[shape]
    case = problem(tokens, vocab, 2, seed=3, **HEADS[head])
    with tiles(rows, columns):
        check(lambda case: mixed_loss(case.statistics(*DIFFERENTIABLE)), case)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_jsd_over_its_range(beta):
    case = problem(2, 5, 2, size=3.0)
    with tiles(1, 2):
        check(lambda case: case.statistics("jsd", "forward_kl", "reverse_kl", jsd_beta=beta)["jsd"], case)


@pytest.mark.parametrize("head", HEADS)
def test_vocab_loss(head):
    case = problem(3, 7, 2, seed=4, **HEADS[head])
    weight = torch.tensor([0.3, 0.0, 2.0], dtype=torch.float64)

    def loss(case):
        def phi(s):
            return (
                s.logp.exp() * s.entropy + s.ids_logp.sum(1).sin() + s.jsd * s.max_nontarget_logit + s.mean_square_logit
            )

        wanted = ("logp", "entropy", "ids_logp", "jsd", "max_nontarget_logit", "mean_square_logit")
        return vocab_loss(case.hidden, case.head, case.targets, wanted, phi, weight, **case.options)[0]

    with tiles(2, 3):
        check(loss, case)


@pytest.mark.parametrize("head", HEADS)
def test_map_logits(head):
    case = problem(3, 5, 2, seed=5, **HEADS[head])
    factor = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def mapped(factor, *leaves):
        held = case.with_leaves(leaves)
        temperature = case.options["temperature"]
        return map_logits(
            lambda z, f: (z.sin().sum(1) * f, z.square()), held.hidden, held.head, factor, temperature=temperature
        )

    with tiles(2, 3):
        assert torch.autograd.gradcheck(mapped, (factor, *case.leaves))
