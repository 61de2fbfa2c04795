"""Step rewards against dense logits, and where steps begin and end."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from posttrain.annotation import annotate_step_rewards
from posttrain.annotation.step_rewards import split_into_steps
from posttrain.data import formats
from tests import tiny
from tests.annotation.runs import configuration, read_rows, save_model

ROWS = [
    {"id": 0, "prompt": "ab=", "completion": "12.34.5", "label": True},
    {"id": 1, "prompt": "c=", "completion": "1", "label": False},
    {"id": 2, "prompt": "def=", "completion": "9..876.", "label": False},
]
ENDS = [[3, 6, 7], [1], [3, 7]]


def logps(folder, text, start):
    """(tokens from start on,) of the text's tokens, in float64, from the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return found[start - 1 :].numpy()


def test_the_rewards_are_those_of_dense_logits_and_add_up_to_the_log_ratio(tmp_path):
    base, policy = save_model(tmp_path / "base", 0), save_model(tmp_path / "run", 1)
    settings = {"beta": 0.3, "separator": "."}
    written = annotate_step_rewards(
        configuration(tmp_path, "binary_feedback", base, ROWS, steps=settings, batch_size=2)
    )
    rows, about = read_rows(written)
    assert [row["id"] for row in rows] == [0, 1, 2] and [row["label"] for row in rows] == [True, False, False]
    for row, ends in zip(rows, ENDS, strict=True):
        start, text = len(row["prompt"]), row["prompt"] + row["completion"] + "<eos>"
        ratio = logps(policy, text, start) - logps(base, text, start)
        # one token a character, and the end of sequence with the last step
        parts = np.split(ratio, ends[:-1])
        assert row["step_ends"] == ends
        assert row["step_rewards"] == pytest.approx([0.3 * part.sum() for part in parts], abs=1e-5)
        assert row["cumulative_step_rewards"] == pytest.approx(np.cumsum(row["step_rewards"]), abs=1e-6)
        assert sum(row["step_rewards"]) == pytest.approx(0.3 * ratio.sum(), abs=1e-5)
    assert about["beta"] == 0.3 and about["policy"] == policy and about["separator"] == "."


def test_without_a_prompt_the_first_token_has_no_probability():
    found = split_into_steps(tiny.tokenizer(), {"prompt": "", "completion": "1.2"}, ".")
    assert found.start == 1 and found.ends == [2, 3] and found.step.tolist() == [0, 1, 1]


def test_a_token_that_spans_two_steps_belongs_to_the_later():
    vocabulary = {"a": 0, "\n": 1, "b": 2, "\nb": 3, "?": 4, "<eos>": 5}
    inner = Tokenizer(models.BPE(vocabulary, [("\n", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    found = split_into_steps(tokenizer, {"prompt": "?", "completion": "a\nba\na"}, "\n")
    assert found.input_ids == [4, 0, 3, 0, 1, 0, 5]
    assert found.ends == [2, 5, 6] and found.step.tolist() == [0, 1, 1, 1, 2, 2]


def test_a_chat_template_around_the_completion():
    tokenizer = tiny.tokenizer()
    formats.ensure_chat_template(tokenizer)
    row = {
        "prompt": [{"role": "user", "content": "1.2"}],
        "completion": [{"role": "assistant", "content": "1.2.3"}],
    }
    found = split_into_steps(tokenizer, row, ".")
    # behind the five characters come the end of sequence and a newline
    assert found.ends == [2, 4, 5] and found.step.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert tokenizer.decode(found.input_ids[found.start : found.start + 5]).replace(" ", "") == "1.2.3"
    tokenizer.chat_template = "{{ messages[-1]['content'] | upper }}"
    row["completion"][0]["content"] = "abc"
    with pytest.raises(ValueError, match="chat template changes the completion's text"):
        split_into_steps(tokenizer, row, ".")


def test_steps_given_as_a_list():
    row = {"prompt": "a=", "completion": "12 34 34"}
    tokenizer = tiny.tokenizer()
    assert split_into_steps(tokenizer, {**row, "steps": ["12", "34", "34"]}, ".").ends == [3, 6, 8]
    assert split_into_steps(tokenizer, {**row, "steps": ["12 ", "34 34"]}, ".").ends == [3, 8]
    for wrong in (["12", "34 35"], ["34", "34"], ["12", "34"], [], ["12", "", "34 34"]):
        with pytest.raises(ValueError, match=r"row None: .*`steps`"):
            split_into_steps(tokenizer, {**row, "steps": wrong}, ".")


def test_what_is_missing_is_named(tmp_path):
    base = save_model(tmp_path / "base")
    with pytest.raises(ValueError, match=r"annotation\.steps\.policy is missing, and trainer\.output_dir"):
        annotate_step_rewards(configuration(tmp_path, "binary_feedback", base, ROWS))
    save_model(tmp_path / "run", vocab_size=50)
    with pytest.raises(ValueError, match=r"annotation\.steps\.policy has a vocabulary of 50 and the model one of"):
        annotate_step_rewards(configuration(tmp_path, "binary_feedback", base, ROWS))
    with pytest.raises(ValueError, match=r"annotation\.steps\.separator is empty"):
        configuration(tmp_path, "binary_feedback", base, ROWS, steps={"separator": ""})
    pairs = [{"prompt": "a=", "chosen": "1", "rejected": "2"}]
    with pytest.raises(ValueError, match=r"data\.train has no column 'completion'"):
        annotate_step_rewards(configuration(tmp_path, "preference", base, pairs))
