"""The embedded base: small, offline, tokenised as it was trained, and strong where it should be."""

import csv
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("reasoning_gym")

from posttrain.assets import tiny_base_path
from posttrain.data import procedural
from posttrain.evaluation import generate

RESULTS = Path(__file__).parents[1] / "launch/results"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base_path())


def test_the_folder_stays_under_8_megabytes() -> None:
    assert sum(path.stat().st_size for path in tiny_base_path().rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.parametrize("task", procedural.names())
def test_text_survives_the_tokenizer_and_a_prompt_is_a_prefix(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    for row in procedural.make(task, size=200, seed=7):
        text = row["prompt"] + row["completion"]
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(text)["input_ids"]
        assert whole[: len(prompt)] == prompt
        # Pre-training tokenised prompt and completion apart.
        assert whole[len(prompt) :] == tokenizer(row["completion"])["input_ids"]
        assert tokenizer.decode(whole) == text
        assert not set(whole) & set(tokenizer.all_special_ids)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("", " a  b ", "x = 3.14,\n\n\ty", "Grüße, 世界 🙂", "don't , stop !"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_distinct_and_agree_with_the_model(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(ids)) == 3
    assert ids == [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id]
    assert model.config.vocab_size == len(tokenizer)


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> float:
    rows = procedural.make(task, size=40, seed=1, split="test")
    completions = generate(model, tokenizer, list(rows["prompt"]), temperature=0.0, max_new_tokens=8)
    return sum(procedural.verify(task, text, row) for (text,), row in zip(completions, rows, strict=True)) / len(rows)


def test_it_adds_and_cannot_multiply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    strong, weak = accuracy(model, tokenizer, "addition"), accuracy(model, tokenizer, "multiplication")
    assert strong > 0.8
    assert weak < 0.15


def test_the_record_shows_three_points_of_capability() -> None:
    record = json.loads((RESULTS / "tiny_base_capability.json").read_text())
    found = {row["task"]: row for row in record["capability"]}
    assert all(row["problems"] == 200 for row in found.values())
    assert found["addition"]["pass@1"] > 0.85
    assert 0.4 < found["subtraction"]["pass@1"] < 0.8
    assert found["multiplication"]["pass@1"] < 0.05


def test_the_curve_is_the_recipe_s() -> None:
    record = json.loads((RESULTS / "tiny_base_capability.json").read_text())
    with (RESULTS / "tiny_base_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == record["recipe"]["steps"]
    assert float(rows[-1]["loss"]) < 1.0 < float(rows[0]["loss"])
