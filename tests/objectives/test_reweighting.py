"""Weights around other objectives, and what holds for each of them."""

import inspect
import math
import re

import pytest
import torch

from posttrain import objectives
from posttrain.objectives import Loss
from posttrain.objectives.reweighting import loreun, loreun_static
from posttrain.statistics import parse, signature
from tests.objectives.truth import gradient


def loss_of(values, weight=None):
    return Loss(values, {"nll": values.detach()}, weight)


@pytest.mark.parametrize("name", objectives.reweightings())
def test_it_is_declared_and_documented(name):
    function = objectives.get_reweighting(name)
    assert function.reweighting.formula and re.search(r"arXiv:\d{4}\.\d{5}", function.reweighting.paper)
    text = inspect.getdoc(function)
    first, *others = signature(function).required
    assert first == "loss" and all(parse(other) for other in others)
    prepared = function.reweighting.prepare(torch.tensor([-3.0, -1.0, -2.0]))
    assert {name: value.item() for name, value in prepared.items()} == {signature(function).optional[0]: -1.0}
    assert all(value.item() == 0 for value in function.reweighting.prepare(torch.zeros(0)).values())
    for part in (*inspect.signature(function).parameters, "Args", "Returns", "Raises"):
        assert re.search(rf"^\s*{part}:", text, re.MULTILINE), part


def test_loreun_s_weights_are_a_softmax_of_the_likelihood_over_the_step():
    values = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    likelihood = torch.tensor([-0.2, -1.5, -4.0], dtype=torch.float64, requires_grad=True)
    loss = loreun(loss_of(values), likelihood, tau=0.7)
    mean = (loss.values * loss.weight).sum() / loss.weight.sum()
    expected = torch.softmax(likelihood.detach() / 0.7, 0)
    torch.testing.assert_close(gradient(mean, values), expected)
    assert not loss.weight.requires_grad and (gradient(mean, likelihood) == 0).all()
    # what the model knows best weighs most
    assert loss.weight.argmax() == 0
    assert loss.metrics.keys() == {"nll", "reweighting"}


def test_a_weight_that_was_there_is_multiplied():
    values = torch.ones(3)
    mine = loreun(loss_of(values), torch.tensor([-1.0, -2.0, -3.0]))
    both = loreun(loss_of(values, torch.tensor([1.0, 0.0, 2.0])), torch.tensor([-1.0, -2.0, -3.0]))
    torch.testing.assert_close(both.weight, mine.weight * torch.tensor([1.0, 0.0, 2.0]))


def test_the_static_weights_are_those_of_the_initial_likelihood():
    values, initial = torch.rand(3), torch.tensor([-1.0, -2.0, -3.0])
    torch.testing.assert_close(loreun_static(loss_of(values), initial).weight, loreun(loss_of(values), initial).weight)
    assert signature(loreun_static).required == ("loss", "reference_mean_logp")


def test_weights_do_not_underflow_together():
    likelihood = torch.tensor([-1e4, -1.00001e4])
    loss = loreun(loss_of(torch.ones(2)), likelihood, likelihood.max(), tau=0.1)
    assert loss.weight[0] == 1 and loss.weight[1].item() == pytest.approx(math.exp(-1), rel=0.01)
    unscaled = loreun(loss_of(torch.ones(2)), torch.tensor([-0.5, -0.7]), tau=0.1).weight
    scaled = loreun(loss_of(torch.ones(2)), torch.tensor([-0.5, -0.7]), torch.tensor(-0.5), tau=0.1).weight
    torch.testing.assert_close(scaled / scaled.sum(), unscaled / unscaled.sum())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"tau is 0\.0"):
        loreun(loss_of(torch.ones(2)), torch.zeros(2), tau=0.0)
    with pytest.raises(ValueError, match="mean_logp"):
        loreun(loss_of(torch.ones(2)), torch.zeros(1))
    with pytest.raises(ValueError, match="did you mean 'loreun'"):
        objectives.get_reweighting("loreum")
    with pytest.raises(ValueError, match="reweight: loreun"):
        objectives.get("loreun")
