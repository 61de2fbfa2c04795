"""Per-token statistics against one sequence at a time, without padding, in float64."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.evaluation.unlearning import AnswerScorer
from posttrain.evaluation.unlearning.tokens import model_fingerprint
from tests import tiny

ROWS = [
    {"prompt": "abc=", "completion": "12"},
    {"prompt": "a=", "completion": "1234567"},
    {"prompt": "abcabcabc=", "completion": "9"},
]


@pytest.fixture(scope="module")
def model():
    return tiny.model(dtype=torch.float64).eval()


def truth(model, tokenizer, row) -> dict[str, list[float]]:
    """Of the completion's tokens and eos, each predicted from the position before it."""
    prompt = len(row["prompt"])
    ids = [tokenizer.convert_tokens_to_ids(one) for one in row["prompt"] + row["completion"]] + [1]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    found: dict[str, list[float]] = {"logp": [], "is_top1": [], "entropy": [], "surprisal_variance": []}
    for place in range(prompt, len(ids)):
        row_logp = logp[place - 1]
        p = row_logp.exp()
        mean = float((p * row_logp).sum())
        found["logp"].append(float(row_logp[ids[place]]))
        found["is_top1"].append(int(row_logp.argmax()) == ids[place])
        found["entropy"].append(-mean)
        found["surprisal_variance"].append(float((p * row_logp**2).sum()) - mean**2)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
def test_statistics_are_those_of_single_sequences(model, batch_size, padding) -> None:
    """A padding token that is the end-of-sequence token must not hide a real one, nor anything else."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = padding
    found = AnswerScorer(model, tokenizer, batch_size=batch_size).rows(ROWS, "rows")
    assert found.lengths.tolist() == [3, 8, 2] and found.text_lengths.tolist() == [2, 7, 1]
    expected = [truth(model, tokenizer, row) for row in ROWS]
    for name in ("logp", "is_top1", "entropy", "surprisal_variance"):
        flat = np.concatenate([one[name] for one in expected])
        np.testing.assert_allclose(getattr(found, name), flat, rtol=1e-9, atol=1e-9, err_msg=name)


def test_an_answer_that_holds_its_end_already_is_not_closed_twice(model) -> None:
    scorer = AnswerScorer(model, tiny.tokenizer())
    closed = scorer.rows([{"prompt": "a=", "completion": "12<eos>"}], "rows")
    np.testing.assert_array_equal(closed.logp, scorer.rows([{"prompt": "a=", "completion": "12"}], "rows").logp)
    assert closed.text_lengths.tolist() == [2]


def test_a_chat_templates_closing_tokens_are_no_text(model, chat_tokenizer) -> None:
    row = {
        "prompt": [{"role": "user", "content": "ab"}],
        "completion": [{"role": "assistant", "content": "123"}],
    }
    found = AnswerScorer(model, chat_tokenizer).rows([row], "rows")
    assert (found.lengths.tolist(), found.text_lengths.tolist()) == ([4], [3])


def test_an_unknown_token_at_the_end_is_text(model) -> None:
    scorer = AnswerScorer(model, tiny.tokenizer())
    assert scorer.rows([{"prompt": "a=", "completion": "1!"}], "rows").text_lengths.tolist() == [2]
    # without an end-of-sequence token nothing closes the answer
    ids = ([3, 4, 5], [False, True, True])
    assert scorer.sequences([ids], "ids").text_lengths.tolist() == [2]


def test_what_does_not_fit_is_counted_or_refused(model) -> None:
    scorer = AnswerScorer(model, tiny.tokenizer())
    found = scorer.rows([{"prompt": "a" * 120 + "=", "completion": "1" * 20}, ROWS[0]], "rows")
    assert found.truncated.tolist() == [True, False] and found.lengths.tolist() == [7, 3]
    assert found.take(np.array([1])).truncated.tolist() == [False]
    with pytest.raises(ValueError, match="answer 1 has no token to score"):
        scorer.rows([ROWS[0], {"prompt": "a" * 130 + "=", "completion": "1"}], "rows")


def test_a_model_that_gives_nan_is_refused() -> None:
    broken = tiny.model()
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="log-probability nan"):
        AnswerScorer(broken, tiny.tokenizer()).rows(ROWS, "rows")


def test_the_cache_answers_for_the_same_weights_and_rows_alone(model, tmp_path, monkeypatch) -> None:
    scorer = AnswerScorer(model, tiny.tokenizer(), cache=tmp_path)
    first = scorer.rows(ROWS, "rows")
    assert len(list(tmp_path.iterdir())) == 1

    calls = []
    score = AnswerScorer._score
    monkeypatch.setattr(AnswerScorer, "_score", lambda *given: calls.append(given) or score(*given))
    again = AnswerScorer(model, tiny.tokenizer(), cache=tmp_path).rows(ROWS, "rows")
    np.testing.assert_array_equal(again.logp, first.logp)
    assert not calls and again.text_lengths.tolist() == first.text_lengths.tolist()

    AnswerScorer(model, tiny.tokenizer(), cache=tmp_path).rows(ROWS[:2], "rows")
    other = tiny.model(dtype=torch.float64)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-9
    AnswerScorer(other, tiny.tokenizer(), cache=tmp_path).rows(ROWS, "rows")
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 3


def test_a_fingerprint_knows_how_an_adapter_scales_and_whether_it_is_on() -> None:
    def adapted(alpha: int):
        model = get_peft_model(tiny.model(), LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.fill_(0.1)
        return model

    model = adapted(2)
    assert model_fingerprint(model) == model_fingerprint(adapted(2)) != model_fingerprint(adapted(4))
    on = model_fingerprint(model)
    with model.disable_adapter():
        assert model_fingerprint(model) != on
    assert model_fingerprint(model) == on


def test_a_fingerprint_is_of_weights_and_configuration() -> None:
    assert model_fingerprint(tiny.model()) == model_fingerprint(tiny.model())
    assert model_fingerprint(tiny.model()) != model_fingerprint(tiny.model(seed=1))
    assert model_fingerprint(tiny.model()) != model_fingerprint(tiny.model(rms_norm_eps=1e-3))
