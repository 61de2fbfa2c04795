"""Hidden states at a named block, beside or instead of statistics of the vocabulary."""

import pytest
import torch

from posttrain.modeling import StatisticsGroup, VocabRequest, attach
from tests.modeling import families


def asked(model, inputs, *groups):
    index, targets = families.targets(inputs)
    return attach(model)(**inputs, vocab_request=VocabRequest(index, targets, groups)).statistics


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_block_s_output_at_the_targets(family):
    """Against transformers' own hidden states, of which the first is the embedding."""
    model, inputs = families.model(family), families.batch()
    index, _ = families.targets(inputs)
    between = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[1]
    alone, beside = asked(
        model, inputs, StatisticsGroup(("hidden",), layer=0), StatisticsGroup(("logp", "hidden"), layer=-2)
    )
    assert alone.keys() == {"hidden"} and beside.keys() == {"logp", "hidden"}
    expected = between.flatten(0, 1)[index]
    torch.testing.assert_close(alone["hidden"], expected, rtol=0, atol=0)
    torch.testing.assert_close(beside["hidden"], expected, rtol=0, atol=0)
    torch.testing.assert_close(beside["logp"], families.own_logp(model, inputs))


def test_without_a_layer_it_is_what_the_head_reads():
    model, inputs = families.model("llama"), families.batch()
    index, _ = families.targets(inputs)
    (found,) = asked(model, inputs, StatisticsGroup(("hidden",)))
    expected = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[index]
    torch.testing.assert_close(found["hidden"], expected, rtol=0, atol=0)
    attached = [module for module in model.modules() if module._forward_hooks]
    assert attached == []


def gradients(model, inputs):
    model.zero_grad()
    (found,) = asked(model.train(), inputs, StatisticsGroup(("hidden",), layer=0))
    found["hidden"].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_reaches_the_block_and_what_is_below_also_under_checkpointing(reentrant):
    model, inputs = families.model("llama"), families.batch()
    plain = gradients(model, inputs)
    assert {name.split(".")[2] for name in plain if ".layers." in name} == {"0"}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, inputs)
    assert again.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_block_that_there_is_not(layer):
    with pytest.raises(ValueError, match=f"statistics.layer is {layer} and the model has 2 blocks"):
        asked(families.model("llama"), families.batch(), StatisticsGroup(("hidden",), layer=layer))
