"""Two models as one, against their logits written out."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.evaluation import likelihood
from posttrain.evaluation.generation import generate
from posttrain.evaluation.unlearning.quantization import Rounding, rounded_weights
from posttrain.modeling import attach
from posttrain.modeling.logit_difference import LogitDifferenceModel, first_layers, logit_difference
from tests import tiny

ROWS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows()]


def pair(alpha=0.8, filter=0.1, **changes):
    base = tiny.model(torch.float64, **changes).eval()
    assistant = tiny.model(torch.float64, seed=1, num_hidden_layers=1, **changes).eval()
    return base, assistant, LogitDifferenceModel.of(base, assistant, alpha=alpha, filter=filter)


def test_the_rule_by_hand():
    base = torch.tensor([5.0, 4.0, 3.0, 0.0, -9.0])
    assistant = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    # k = 1: the largest is 5; below 5 + log 0.2 = 3.39 the assistant counts as nothing
    found = logit_difference(base, assistant, alpha=0.5, filter=0.2)
    torch.testing.assert_close(found, torch.tensor([4.5, 3.0, 3.0, 0.0, -9.0]))
    # k = 3: the third largest, 3, is below 5 + log 0.7 = 4.64
    found = logit_difference(base, assistant, alpha=0.5, filter=0.7)
    torch.testing.assert_close(found, torch.tensor([4.5, 3.0, 1.5, 0.0, -9.0]))
    torch.testing.assert_close(logit_difference(base, assistant, alpha=0.5, filter=0), base - 0.5 * assistant)
    assert logit_difference(base.bfloat16(), assistant.bfloat16()).dtype == torch.float32


def test_the_rule_is_of_probabilities():
    """By the paper's words on log-probabilities, row by row and token by token."""
    generator = torch.Generator().manual_seed(0)
    base, assistant = (torch.randn(4, 50, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    expected = base.clone()
    for row, logp in enumerate(base.log_softmax(-1)):
        least = min(logp.sort(descending=True).values[4].item(), logp.max().item() + math.log(0.1))
        for token in range(50):
            if logp[token].item() >= least:
                expected[row, token] -= 0.8 * assistant[row, token]
    torch.testing.assert_close(logit_difference(base, assistant, alpha=0.8, filter=0.1), expected)


def test_forward_and_its_loss():
    base, assistant, model = pair()
    ids = torch.tensor([[5, 6, 7, 8]])
    found = model(ids, labels=ids)
    expected = logit_difference(base(ids).logits, assistant(ids).logits, alpha=0.8, filter=0.1)
    torch.testing.assert_close(found.logits, expected)
    nll = torch.nn.functional.cross_entropy(expected[0, :-1].float(), ids[0, 1:])
    assert found.loss.item() == pytest.approx(nll.item(), rel=1e-6)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected[:, -1:])


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generation_with_its_caches_is_generation_without():
    *_, model = pair()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    expected = greedy(model, ids, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options, use_cache=False), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(7) >= 3).long().expand(2, 7)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], expected)
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))
    assert not torch.equal(expected, greedy(model.base, ids, 12)), "the assistant makes a difference"
    with pytest.raises(ValueError, match="PairedCache"):
        model(ids, past_key_values=model.base(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    base, _, model = pair(alpha=0.5, filter=0.2, tie_word_embeddings=tied)
    base.generation_config.eos_token_id = [1, 7]
    model = LogitDifferenceModel.of(base, model.assistant, alpha=0.5, filter=0.2)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    for kind in (LogitDifferenceModel, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(again) is LogitDifferenceModel and (again.config.alpha, again.config.filter) == (0.5, 0.2)
        assert again.generation_config.eos_token_id == [1, 7]
        assert torch.equal(again(ids).logits, model(ids).logits)
        head, embedding = again.base.lm_head.weight, again.base.get_input_embeddings().weight
        assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert again.dtype == torch.float64 and AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float64


def test_evaluation_takes_it():
    *_, model = pair()
    with pytest.raises(ValueError, match="no output embeddings"):
        attach(model)
    scored = likelihood(model, tiny.tokenizer(), ROWS)
    ids = tiny.tokenizer()(ROWS[4]["prompt"] + ROWS[4]["completion"] + "<eos>")["input_ids"]
    start = len(ROWS[4]["prompt"])
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]
    assert scored.nll[4] == pytest.approx(-logp.sum().item(), rel=1e-9)
    texts = generate(model, tiny.tokenizer(), ["abc=", "12"], temperature=0.0, max_new_tokens=5)
    assert len(texts) == 2 and all(isinstance(one[0], str) for one in texts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded_weights(model, Rounding(4)):
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and not any("lm_head" in name for name in changed)


def test_the_first_layers_of_a_model():
    model = tiny.model(torch.float64).eval()
    state = torch.random.get_rng_state()
    short = first_layers(model, 1).eval()
    assert torch.equal(state, torch.random.get_rng_state())
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(short(ids).logits, model.lm_head(model.model.norm(hidden)))
    assert torch.equal(first_layers(model, 2).eval()(ids).logits, model(ids).logits)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers is {layers}, and the model has 2"):
            first_layers(model, layers)


def test_what_does_not_fit_is_refused():
    base = tiny.model()
    with pytest.raises(ValueError, match="a vocabulary of 50 and the base one of"):
        LogitDifferenceModel.of(base, tiny.model(vocab_size=50))
    for bad in ({"alpha": -1.0}, {"alpha": float("nan")}, {"filter": 1.0}, {"filter": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LogitDifferenceModel.of(base, base, **bad)
