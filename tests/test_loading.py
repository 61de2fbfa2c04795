"""Models and tokenizers by name, and what a tokenizer lacks."""

import logging
import os
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars

from posttrain import assets
from posttrain.config import DataSource, EvaluationSource, ModelConfig, TokenizerConfig
from posttrain.loading import TINY_BASE, ensure_padding, load_evaluation_sources, load_model, load_rows, load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    disable_progress_bars()
    path = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def test_a_model_arrives_in_its_dtype_with_its_options(base: str) -> None:
    model = load_model(ModelConfig(name_or_path=base, dtype="bfloat16", attn_implementation="eager"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    model = load_model(ModelConfig(name_or_path=base, options={"attention_dropout": 0.25}))
    assert model.dtype == torch.float32 and model.config.attention_dropout == 0.25


def test_the_tokenizer_is_the_models_unless_another_is_named(base: str, tmp_path: Path) -> None:
    model = ModelConfig(name_or_path=base)
    assert load_tokenizer(TokenizerConfig(), model).pad_token == "<pad>"
    assert load_tokenizer(TokenizerConfig(options={"padding_side": "left"}), model).padding_side == "left"
    other = tiny.tokenizer()
    other.add_special_tokens({"pad_token": "<other>"})
    other.save_pretrained(tmp_path)
    assert load_tokenizer(TokenizerConfig(name_or_path=str(tmp_path)), model).pad_token == "<other>"


@pytest.mark.parametrize(("missing", "used"), [([], "<pad>"), (["pad"], "<eos>"), (["pad", "eos"], "<unk>")])
def test_a_tokenizer_without_padding_token_gets_one(
    missing: list[str], used: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny.tokenizer()
    for name in missing:
        setattr(tokenizer, f"{name}_token", None)
    with caplog.at_level(logging.INFO, logger="posttrain"):
        ensure_padding(tokenizer)
    assert tokenizer.pad_token == used and tokenizer.pad_token_id is not None
    assert len(caplog.messages) == bool(missing) and all(used in message for message in caplog.messages)


def test_a_tokenizer_without_any_special_token_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    for name in ("pad", "eos", "unk"):
        setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        ensure_padding(tokenizer)


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="would ask the hub; set HF_HUB_OFFLINE=1")
def test_a_hub_model_that_cannot_be_reached_is_named() -> None:
    for load in (load_model, lambda config: load_tokenizer(TokenizerConfig(), config)):
        with pytest.raises(ValueError, match=r"model\.name_or_path is 'no-such/model', which cannot be loaded: \S+"):
            load(ModelConfig(name_or_path="no-such/model"))


def test_rows_of_messages_give_the_tokenizer_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n')
    tokenizer = tiny.tokenizer()
    load_rows(DataSource(path=str(path)), tokenizer, key="data.train")
    assert tokenizer.chat_template is not None


def test_evaluation_sources_are_named_after_label_task_or_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.test.json"):
        (tmp_path / name).write_text('{"prompt": "1+1=", "answer": "2"}\n')
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.test.json")
    chosen = [EvaluationSource(path=a), EvaluationSource(path=a, verifier="exact"), EvaluationSource(path=b),
              EvaluationSource(path=b, label="mine")]  # fmt: skip
    found = load_evaluation_sources(chosen, tiny.tokenizer())
    assert list(found) == ["a", "a-2", "b", "mine"]
    assert found["a-2"].verifier == "exact" and found["a"].rows[0]["answer"] == "2"


@pytest.mark.skipif(not (assets.tiny_base_path() / "config.json").exists(), reason="the embedded base is not built")
def test_the_embedded_base_is_found_by_name() -> None:
    model = ModelConfig(name_or_path=TINY_BASE)
    loaded, tokenizer = load_model(model), load_tokenizer(TokenizerConfig(), model)
    assert loaded.config.vocab_size >= len(tokenizer)
    assert sum(path.stat().st_size for path in assets.tiny_base_path().iterdir()) <= 8_000_000
