"""The other backend for sampling, as far as that can be told without it."""

import sys
from types import SimpleNamespace

import pytest

from posttrain.evaluation import evaluate, vllm
from posttrain.evaluation.generation import Sampling
from tests import tiny

ROWS = [{"prompt": "ab=", "answer": "ba"}]


def test_where_it_is_not_installed_a_sentence_says_so(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"evaluation.backend is vllm, which is not installed"):
        evaluate(model, tokenizer, {}, backend="vllm", checkpoint="folder")
    with pytest.raises(ValueError, match=r"backend: 'vlm'; did you mean 'vllm'\?"):
        evaluate(model, tokenizer, {}, backend="vlm")


@pytest.fixture
def stub(monkeypatch):
    """Enough of the package to see what it is asked."""
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked["engine"] = options

        def generate(self, prompts, settings):
            asked["prompts"], asked["settings"] = prompts, settings
            ends = [SimpleNamespace(text="ba", finish_reason="stop"), SimpleNamespace(text="", finish_reason="length")]
            return [SimpleNamespace(outputs=ends[: one.n]) for one in settings]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return asked


def test_it_samples_from_the_checkpoint(model, tokenizer, stub):
    report = evaluate(
        model, tokenizer, {"x": ROWS}, metrics=["generation"], samples=2, k=[1], backend="vllm", checkpoint="folder"
    )
    assert report.sources["x"].measures["pass@1"].estimate.value == 0.5
    assert report.sources["x"].counts["unfinished_completions"] == 1
    assert stub["engine"]["model"] == "folder" and stub["settings"][0].stop_token_ids == [tokenizer.eos_token_id]
    assert stub["prompts"] == [{"prompt_token_ids": tokenizer("ab=")["input_ids"]}]


def test_every_prompt_has_its_own_seed(stub):
    vllm.complete("folder", tiny.tokenizer(), [[3], [4]], Sampling(samples=1, seed=7))
    assert [one.seed for one in stub["settings"]] == [7, 8]


def test_a_model_in_training_is_not_sampled_by_it(model, tokenizer, stub):
    with pytest.raises(ValueError, match=r"set it for `posttrain evaluate`"):
        evaluate(model, tokenizer, {}, backend="vllm")
