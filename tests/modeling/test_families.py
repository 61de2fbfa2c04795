"""Every family against its own logits, in float64: values, gradients of every parameter, and the self-check."""

import pytest
import torch

from posttrain.modeling import StatisticsGroup, VocabRequest, attach, check_head
from tests.modeling import families

CASES = [(family, tied) for family in families.FAMILIES for tied in (False, True)]
# transformers gives GPT-J's and Phi's head a bias of its own, which tying leaves alone.
BIASED = ("phi", "gptj")


def logp(model, inputs, **options):
    index, targets = families.targets(inputs)
    request = VocabRequest(index, targets, (StatisticsGroup(("logp",)),), **options)
    return model(**inputs, vocab_request=request).statistics[0]["logp"]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_values_and_gradients_are_those_of_the_models_own_logits(family, tied):
    model = families.model(family, tied=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    inputs = families.batch()
    expected = families.own_logp(model, inputs)
    expected_gradients = families.gradients(model, expected)
    attach(model)
    found = logp(model, inputs)
    found_gradients = families.gradients(model, found)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.exp().max() > 2 * expected.exp().min()
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    if family in BIASED:
        assert found_gradients["lm_head.bias"].abs().max() > 1e-3


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_check_passes(family, tied):
    model = families.model(family, tied=tied)
    attach(model)
    assert check_head(model, **families.batch()) < 1e-10
