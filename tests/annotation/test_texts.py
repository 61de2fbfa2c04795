"""The tokens that annotations read against those that the preference trainer prepares."""

import pytest
from datasets import Dataset
from trl import DPOConfig

from posttrain.annotation.texts import max_length, prompt_ids, split_ids, written
from posttrain.config import from_tree
from posttrain.data import formats
from posttrain.trainers import PreferenceTrainer
from tests import tiny

TEXT = [
    {"prompt": "ab=", "chosen": "12", "rejected": "345"},
    {"prompt": "abc=", "chosen": "1<eos>", "rejected": "2"},
]
MESSAGES = [
    {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name].removesuffix("<eos>")}]
        for name in row
    }
    for row in TEXT
]


def chat_tokenizer():
    tokenizer = tiny.tokenizer()
    formats.ensure_chat_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize(("rows", "tokenizer"), [(TEXT, tiny.tokenizer()), (MESSAGES, chat_tokenizer())])
def test_pairs_are_tokenised_as_the_preference_trainer_does(tmp_path, rows, tokenizer):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = PreferenceTrainer(
        tiny.model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        objective="simpo",  # which needs no reference model
    )
    for row, expected in zip(rows, trainer.train_dataset, strict=True):
        found = split_ids(tokenizer, row, ("chosen", "rejected"))
        assert found == {name: expected[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        assert found["prompt_ids"] == prompt_ids(tokenizer, row)


def test_tools_and_options_reach_the_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ tools | length if tools else 0 }}{{ kind or 'none' }}{{ messages[-1]['content'] }}"
    row = {"prompt": MESSAGES[0]["prompt"], "completion": MESSAGES[0]["chosen"]}
    assert written(tokenizer, row, "completion") == "0none12"
    row |= {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"kind": "some"}}
    assert written(tokenizer, row, "completion") == "1some12"


def test_the_length_is_the_trainers():
    assert max_length(from_tree({"method": "preference"})) == DPOConfig.__dataclass_fields__["max_length"].default
    assert max_length(from_tree({"method": "preference", "trainer": {"max_length": None}})) is None
    assert max_length(from_tree({"method": "binary_feedback", "trainer": {"max_length": 7}})) == 7
