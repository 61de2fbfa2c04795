import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from posttrain.evaluation.rows import prompt_ids, prompt_of, reference_of, scored_ids
from tests import tiny

CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


def decode_scored(tokenizer, row, **options):
    ids, scored = scored_ids(tokenizer, row, **options)
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    return text, "".join(
        token for token, flag in zip(tokenizer.convert_ids_to_tokens(ids), scored, strict=True) if flag
    )


def test_prompt_and_reference_of_every_kind_of_row():
    assert prompt_of({"prompt": "a", "text": "b"}) == "a"
    assert prompt_of({"messages": CHAT}) == CHAT[:3]
    assert prompt_of({"messages": CHAT[:1]}) == CHAT[:1]
    assert prompt_of({"text": "b"}) is None
    assert reference_of({"answer": 4, "completion": "so 4"}) == "4"
    assert reference_of({"answer": None, "completion": "so 4"}) == "so 4"
    assert reference_of({"prompt": CHAT[:1], "completion": CHAT[1:2]}) == "2"
    assert reference_of({"messages": CHAT}) == "4"
    assert reference_of({"messages": CHAT[:1]}) is None


def test_text_gets_eos_once(tokenizer):
    assert decode_scored(tokenizer, {"prompt": "ab", "completion": "1"}) == ("ab1<eos>", "1<eos>")
    assert decode_scored(tokenizer, {"prompt": "ab", "completion": "1<eos>"}) == ("ab1<eos>", "1<eos>")
    assert decode_scored(tokenizer, {"text": "ab"}) == ("ab<eos>", "ab<eos>")
    whole = decode_scored(tokenizer, {"prompt": "ab", "completion": "1"}, completion_only=False)
    assert whole == ("ab1<eos>", "ab1<eos>")
    tokenizer.eos_token = None
    assert decode_scored(tokenizer, {"prompt": "ab", "completion": "1"}) == ("ab1", "1")


def test_completion_begins_where_the_token_ids_part(tokenizer):
    # "aa" becomes one token here, so the prompt's last token is not in the whole: it is scored with the completion.
    merged = len(tokenizer)
    tokenizer.add_tokens("aa")
    ids, scored = scored_ids(tokenizer, {"prompt": "ba", "completion": "a1"})
    assert ids == [*tokenizer.convert_tokens_to_ids(["b"]), merged, *tokenizer.convert_tokens_to_ids(["1", "<eos>"])]
    assert scored == [False, True, True, True]


def test_chat_rows_go_through_the_template(chat_tokenizer):
    conversational = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    text = "u:1+1<eos>a:2<eos>u:2+2<eos>a:4<eos>"
    assert decode_scored(chat_tokenizer, conversational) == (text, "4<eos>")
    assert decode_scored(chat_tokenizer, {"messages": CHAT}) == (text, text)
    assert decode_scored(chat_tokenizer, {"messages": CHAT}, assistant_only=True) == (text, "2<eos>4<eos>")
    opening = prompt_ids(chat_tokenizer, CHAT[:3])
    assert "".join(chat_tokenizer.convert_ids_to_tokens(opening)) == text.removesuffix("4<eos>")


# TRL sets the deprecated name itself.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_scored_tokens_are_those_of_trl(chat_tokenizer, tmp_path):
    config = SFTConfig(str(tmp_path), max_length=9, report_to=[], use_cpu=True, bf16=False)
    for rows in (
        [{"prompt": "ab=", "completion": "12"}, {"prompt": "abc=", "completion": "123456789"}],
        [{"prompt": CHAT[:1], "completion": CHAT[1:2]}],
        [{"messages": CHAT}],
        [{"text": "abc"}],
    ):
        trainer = SFTTrainer(
            tiny.model(), config, train_dataset=Dataset.from_list(rows), processing_class=chat_tokenizer
        )
        for row, prepared in zip(rows, trainer.train_dataset, strict=True):
            ids, scored = scored_ids(chat_tokenizer, row)
            labels = [token if flag else -100 for token, flag in zip(ids, scored, strict=True)]
            assert (ids[:9], labels[:9]) == (prepared["input_ids"], prepared["labels"])


def test_prompts_stay_open(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "ab")) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "")) == ["<eos>"]


def test_what_cannot_be_tokenised_is_named(tokenizer, chat_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids(tokenizer, CHAT[:1])
    with pytest.raises(ValueError, match="found plain text"):
        scored_ids(tokenizer, {"text": "a"}, assistant_only=True)
    chat_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="generation blocks"):
        scored_ids(chat_tokenizer, {"messages": CHAT}, assistant_only=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither bos nor eos"):
        prompt_ids(tokenizer, "")
