import math
from importlib import import_module

import numpy as np
import pytest
import torch

from posttrain.evaluation.likelihood import (
    fastest_token_statistics,
    likelihood,
    streamed_token_statistics,
    token_statistics,
)
from posttrain.modeling import is_attached
from tests import tiny

ROWS = [
    {"prompt": "abc=", "completion": "12"},
    {"prompt": "a=", "completion": "1234567"},
    {"prompt": "ab=", "completion": ""},
    {"prompt": "abcabcabc=", "completion": "9<eos>"},
]
# Written out by hand: prompt length in tokens (one a character), completion tokens with eos.
COMPLETION_TOKENS = [("12", 4), ("1234567", 2), ("", 3), ("9", 10)]


def dense_truth(model, tokenizer):
    """Sums per row, computed one sequence at a time without padding or masks, in float64."""
    results = []
    for (completion, start), row in zip(COMPLETION_TOKENS, ROWS, strict=True):
        text = row["prompt"] + completion
        ids = [tokenizer.convert_tokens_to_ids(character) for character in text] + [tokenizer.eos_token_id]
        with torch.no_grad():
            probabilities = torch.softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        nll = entropy = probability = hits = 0.0
        for place in range(start, len(ids)):
            p = probabilities[place - 1]
            nll -= math.log(p[ids[place]])
            probability += float(p[ids[place]])
            entropy -= float((p * p.log()).sum())
            hits += int(p.argmax()) == ids[place]
        results.append((len(ids) - start, nll, probability, hits, entropy))
    return np.array(results).T


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_agree_with_one_sequence_at_a_time(exact_model, tokenizer, batch_size):
    found = likelihood(exact_model, tokenizer, ROWS, batch_size=batch_size)
    tokens, nll, probability, hits, entropy = dense_truth(exact_model, tokenizer)
    assert found.index.tolist() == [0, 1, 2, 3] and not found.truncated and not found.skipped
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-10)
    np.testing.assert_allclose(found.target_probability, probability, rtol=1e-10)
    np.testing.assert_array_equal(found.correct, hits)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-10)

    values = {name: statistic.value for name, statistic in found.statistics().items()}
    assert values["nll"] == pytest.approx(nll.sum() / tokens.sum())
    assert values["perplexity"] == pytest.approx(math.exp(nll.sum() / tokens.sum()))
    assert values["mean_target_probability"] == pytest.approx(probability.sum() / tokens.sum())
    assert values["token_accuracy"] == pytest.approx(hits.sum() / tokens.sum())
    assert values["entropy"] == pytest.approx(entropy.sum() / tokens.sum())


def only_whole_logits(monkeypatch):
    # import_module, because the package's own attribute of this name is the function
    module = import_module("posttrain.evaluation.likelihood")

    def refuse(model):
        raise ValueError("refused")

    monkeypatch.setattr(module, "attach", refuse)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_streamed_statistics_are_those_of_the_logits(tokenizer, monkeypatch, dtype):
    model = tiny.model(dtype=dtype).eval()
    streamed = likelihood(model, tokenizer, ROWS, batch_size=3)
    only_whole_logits(monkeypatch)
    dense = likelihood(model, tokenizer, ROWS, batch_size=3)
    # bfloat16 logits are rounded by the model itself, the kernel's are not
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name in ("nll", "target_probability", "entropy"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(dense, name), rtol=tolerance, err_msg=name)
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(streamed.correct, dense.correct)
        np.testing.assert_allclose(streamed.bins, dense.bins, rtol=tolerance)


def test_the_models_logits_are_formed_for_the_probe_alone(exact_model, tokenizer, monkeypatch):
    sizes = []
    forward = exact_model.forward

    def watched(*args, **kwargs):
        answer = forward(*args, **kwargs)
        sizes.append(answer.logits.shape[:2].numel())
        return answer

    monkeypatch.setattr(exact_model, "forward", watched)
    likelihood(exact_model, tokenizer, ROWS, batch_size=4)
    assert sizes == [4]  # the shortest row
    assert not is_attached(exact_model)


def test_a_model_whose_logits_are_not_hidden_times_head_is_measured_by_its_logits(tokenizer, monkeypatch):
    model = tiny.model(dtype=torch.float64).eval()
    forward = model.forward

    def sharpened(*args, **kwargs):
        answer = forward(*args, **kwargs)
        answer.logits = answer.logits * 1.01
        return answer

    monkeypatch.setattr(model, "forward", sharpened)
    with fastest_token_statistics(model, [5, 6, 7]) as chosen:
        assert chosen is token_statistics
    found = likelihood(model, tokenizer, ROWS)
    only_whole_logits(monkeypatch)
    np.testing.assert_array_equal(found.nll, likelihood(model, tokenizer, ROWS).nll)


def test_an_attached_model_stays_attached(exact_model):
    from posttrain.modeling import attach, detach

    attach(exact_model)
    with fastest_token_statistics(exact_model, [5, 6, 7]) as chosen:
        assert chosen is streamed_token_statistics
    assert is_attached(exact_model)
    detach(exact_model)


def test_blocks_of_logit_rows_change_nothing(exact_model, tokenizer, monkeypatch):
    module = only_whole_logits(monkeypatch)
    whole = likelihood(exact_model, tokenizer, ROWS)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    np.testing.assert_array_equal(likelihood(exact_model, tokenizer, ROWS).nll, whole.nll)


def test_a_uniform_model_has_known_numbers(tokenizer):
    model = tiny.model()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = likelihood(model, tokenizer, ROWS[:2], bins=10)
    vocab = len(tokenizer)
    values = {name: statistic.value for name, statistic in found.statistics().items()}
    assert values["nll"] == pytest.approx(math.log(vocab)) == values["entropy"]
    assert values["perplexity"] == pytest.approx(vocab)
    assert values["mean_target_probability"] == pytest.approx(1 / vocab)
    # Every prediction is token 0 with confidence 1 / vocab, and never right.
    assert values["expected_calibration_error"] == pytest.approx(1 / vocab)
    assert found.reliability()[0]["count"] == 11


def test_likelihood_is_what_the_model_itself_calls_loss(model, tokenizer):
    ids = tokenizer("abc=12<eos>", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    found = likelihood(model, tokenizer, [{"prompt": "abc=", "completion": "12"}])
    assert found.statistics()["nll"].value == pytest.approx(float(loss), rel=1e-6)


def test_cut_and_empty_completions_are_counted(exact_model, tokenizer):
    rows = [
        {"prompt": "abcdef", "completion": "1"},  # cut to its prompt: nothing left to score
        {"prompt": "ab", "completion": "123456"},  # loses its end
        {"prompt": "ab", "completion": "1"},
    ]
    found = likelihood(exact_model, tokenizer, rows, max_length=6)
    assert (found.truncated, found.skipped, found.index.tolist()) == (2, [0], [1, 2])
    assert found.tokens.tolist() == [4, 2]
    short = likelihood(exact_model, tokenizer, rows[2:], max_length=6)
    np.testing.assert_allclose(found.nll[1], short.nll[0], rtol=1e-12)


def test_the_models_positions_are_the_limit(tokenizer):
    model = tiny.model(max_position_embeddings=8)
    found = likelihood(model, tokenizer, [{"text": "0123456789"}], max_length=100)
    assert (found.truncated, found.tokens.tolist()) == (1, [7])


def test_nothing_to_score_leaves_no_statistics(model, tokenizer):
    found = likelihood(model, tokenizer, [{"prompt": "abc", "completion": "1"}], max_length=2)
    assert found.skipped == [0] and found.statistics() == {}
    assert all(bin["count"] == 0 for bin in found.reliability())


def test_model_comes_back_as_it_was(tokenizer):
    model = tiny.model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, second = (likelihood(model, tokenizer, ROWS).nll for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_padding_token_is_needed(exact_model, tokenizer):
    expected = likelihood(exact_model, tokenizer, ROWS).nll
    tokenizer.pad_token = None
    np.testing.assert_array_equal(likelihood(exact_model, tokenizer, ROWS).nll, expected)
    assert tokenizer.pad_token is None


def test_a_broken_model_is_named(tokenizer):
    model = tiny.model()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="row 1 the log-probability nan"):
        likelihood(model, tokenizer, ROWS[:2], batch_size=1)


def test_bad_rows_and_settings_are_named(model, tokenizer):
    with pytest.raises(ValueError, match=r"row 0 has the columns \['answer', 'prompt'\]"):
        likelihood(model, tokenizer, [{"prompt": "a", "answer": "1", "completion": None}])
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        likelihood(model, tokenizer, ROWS, max_length=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        likelihood(model, tokenizer, ROWS, batch_size=0)
