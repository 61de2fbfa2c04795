"""Reward margins: what is trained on which pairs, and what the rewards are."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from posttrain.annotation import annotate_reward_margins, reward_margins
from posttrain.annotation.reward_margins import encoded_pairs, shuffled_places
from posttrain.annotation.reward_model import accuracy
from posttrain.config import from_tree
from posttrain.loading import load_rows, load_tokenizer
from tests import tiny
from tests.annotation.runs import configuration, read_rows, save_model, write_rows

TRAINING = {
    "max_steps": 20,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 8,
    "activation_checkpointing": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def pairs(count=20):
    """Pairs whose chosen completion ends in 1 and whose rejected one in 2, whatever their lengths; the last swapped."""
    draw = random.Random(0)
    rows = [
        {
            "id": index,
            "prompt": "".join(draw.choices("abcdefgh", k=4)) + "=",
            "chosen": "+" * draw.randint(0, 3) + "1",
            "rejected": "+" * draw.randint(0, 3) + "2",
        }
        for index in range(count)
    ]
    rows[-1]["chosen"], rows[-1]["rejected"] = rows[-1]["rejected"], rows[-1]["chosen"]
    return rows


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    model = save_model(folder / "model", initializer_range=0.1)
    reward = {"trainer": {**TRAINING, "output_dir": str(folder / "reward")}, "holdout": 0.2}
    config = configuration(folder, "preference", model, pairs(), reward=reward)
    written = annotate_reward_margins(config)
    return folder, config, written


def test_the_sign_is_learned_and_the_mislabelled_pair_found(annotated):
    _, _, written = annotated
    rows, about = read_rows(written)
    assert [row["id"] for row in rows] == list(range(20))
    for row in rows:
        assert row["reward_margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)
    assert all(row["reward_margin"] > 0 for row in rows[:-1]) and rows[-1]["reward_margin"] < 0
    assert about["trained_here"] and about["accuracy"] == pytest.approx(19 / 20)
    assert about["held_out_pairs"] == 4 and about["held_out_accuracy"] in (1.0, 0.75)
    assert about["reward"]["trainer"]["max_steps"] == 20 and about["versions"]["trl"]


def test_a_kept_reward_model_scores_without_being_trained(annotated, tmp_path, monkeypatch):
    folder, config, written = annotated
    monkeypatch.setattr(reward_margins, "train_reward_model", None)
    again = configuration(
        tmp_path,
        "preference",
        config.model.name_or_path,
        pairs(),
        reward={"model": {"name_or_path": str(folder / "reward")}},
    )
    rows, about = read_rows(annotate_reward_margins(again))
    assert not about["trained_here"] and about["held_out_pairs"] == 0
    first = read_rows(written)[0]
    assert [row["reward_margin"] for row in rows] == pytest.approx([row["reward_margin"] for row in first], abs=1e-5)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval(), tiny.tokenizer()
    for row in rows[:3]:
        alone = tokenizer(row["prompt"] + row["chosen"] + "<eos>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            reward = model.score(model.model(input_ids=alone).last_hidden_state[0, -1])
        assert row["chosen_reward"] == pytest.approx(reward.item(), abs=1e-5)


def test_the_annotated_rows_train_madpo(annotated, tmp_path):
    from trl import DPOConfig

    from posttrain.trainers import PreferenceTrainer

    _, config, written = annotated
    tree = {
        "method": "preference",
        "data": {"train": {"path": str(written)}},
        "model": {"name_or_path": config.model.name_or_path},
    }
    loaded = from_tree(tree)
    tokenizer = load_tokenizer(loaded.tokenizer, loaded.model)
    rows = load_rows(loaded.data.train, tokenizer, key="data.train", method="preference")
    trainer = PreferenceTrainer(
        tiny.model(),
        args=DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=1,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        objective="madpo",
    )
    assert np.isfinite(trainer.train().training_loss)


def test_with_folds_no_pair_is_scored_by_a_model_that_saw_its_prompt(tmp_path, monkeypatch):
    rows = pairs(12)
    for index in range(4):
        rows[index + 4]["prompt"] = rows[index]["prompt"]
    config = configuration(tmp_path, "preference", save_model(tmp_path / "model"), rows, reward={"folds": 3})
    seen = []

    def train(config, material, tokenizer, *, name):
        seen.append({tuple(ids[:5]) for ids in material["chosen_ids"]})
        return seen[-1]

    def score(model, material, *, batch_size):
        prompts = [tuple(ids[:5]) for ids in material["chosen_ids"]]
        assert not model & set(prompts)
        numbers = np.array([ids[0] for ids in material["chosen_ids"]], dtype=float)
        return numbers, numbers - 1

    monkeypatch.setattr(reward_margins, "train_reward_model", train)
    monkeypatch.setattr(reward_margins, "rewards", score)
    found, about = read_rows(annotate_reward_margins(config))
    assert len(seen) == 3 and about["held_out_pairs"] == 12
    tokenizer = tiny.tokenizer()
    assert [row["chosen_reward"] for row in found] == [tokenizer(row["prompt"])["input_ids"][0] for row in rows]


def test_held_out_pairs_are_not_trained_on_and_may_be_others_than_the_scored(tmp_path, monkeypatch):
    other = write_rows(tmp_path / "other.jsonl", pairs(10)[5:])
    reward = {"data": {"path": other}, "holdout": 0.4}
    config = configuration(tmp_path, "preference", save_model(tmp_path / "model"), pairs(5), reward=reward)
    scored = []
    monkeypatch.setattr(reward_margins, "train_reward_model", lambda config, material, tokenizer, name: material)

    def score(model, material, *, batch_size):
        scored.append(len(material))
        assert len(model) == 3 and not {*map(tuple, model["chosen_ids"])} & {*map(tuple, material["chosen_ids"])}
        return np.ones(len(material)), np.zeros(len(material))

    monkeypatch.setattr(reward_margins, "rewards", score)
    rows, about = read_rows(annotate_reward_margins(config))
    assert scored == [2, 5] and about["held_out_pairs"] == 2 and len(rows) == 5


def test_adapters_are_trained_and_merged_into_what_is_kept(tmp_path):
    reward = {"trainer": {**TRAINING, "max_steps": 2, "output_dir": str(tmp_path / "reward")}, "peft": {"r": 2}}
    model = save_model(tmp_path / "model")
    rows, _ = read_rows(annotate_reward_margins(configuration(tmp_path, "preference", model, pairs(4), reward=reward)))
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    base = tiny.model().state_dict()
    weights = kept.state_dict()
    assert not torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    ids = tiny.tokenizer()(rows[0]["prompt"] + rows[0]["rejected"] + "<eos>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert rows[0]["rejected_reward"] == pytest.approx(kept(ids).logits.item(), abs=1e-5)


def test_a_prompts_pairs_have_one_place_in_a_random_order():
    prompts = ["a", "b", "a", "c", "d", "d", "d", "e"]
    places = shuffled_places(prompts, seed=1)
    assert places[0] == places[2] and places[4] == places[5] == places[6]
    sizes = {"a": 2, "b": 1, "c": 1, "d": 3, "e": 1}
    order = sorted(sizes, key=lambda one: places[prompts.index(one)])
    before = np.cumsum([0, *(sizes[one] for one in order)])[:-1]
    assert [places[prompts.index(one)] for one in order] == pytest.approx(before / 8)
    assert any((shuffled_places(prompts, seed=seed) != places).any() for seed in range(2, 5))


def test_pairs_are_cut_as_the_policys_and_those_cut_to_nothing_are_left_out(tmp_path):
    rows = [*pairs(3), {"id": 3, "prompt": "a" * 30, "chosen": "1", "rejected": "2"}]
    config = configuration(tmp_path, "preference", save_model(tmp_path / "model"), rows)
    config.trainer["max_length"] = 7
    tokenizer = tiny.tokenizer()
    found, kept = encoded_pairs(config, Dataset.from_list(rows), tokenizer, name="train")
    # the first pair's completions are equal once cut
    assert kept["id"] == [1, 2]
    for row, ids in zip(rows[1:], found["chosen_ids"], strict=False):
        assert ids == tokenizer(row["prompt"] + row["chosen"] + "<eos>")["input_ids"][:7]


def test_accuracy_counts_a_tie_half():
    assert accuracy(np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0])) == 0.5


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"trainer": {"max_length": 5}},
            r"annotation\.reward\.trainer\.max_length is 5; .* so set trainer\.max_length",
        ),
        ({"trainer": {"learning_rat": 5}}, r"annotation\.reward\.trainer\.learning_rat.*learning_rate"),
        ({"folds": 0}, r"annotation\.reward\.folds is 0"),
        ({"holdout": 1.0}, r"annotation\.reward\.holdout is 1\.0"),
        ({"folds": 2, "data": {"path": "x.jsonl"}}, "set folds to 1"),
        ({"folds": 9}, r"fill \d of them; lower it"),
        ({"peft": {"rr": 8}}, r"annotation\.reward\.peft\.rr"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, reward, message):
    rows = pairs(8)
    rows[1]["prompt"] = rows[0]["prompt"]
    with pytest.raises(ValueError, match=message):
        annotate_reward_margins(
            configuration(tmp_path, "preference", save_model(tmp_path / "model"), rows, reward=reward)
        )


def test_a_column_that_is_there_already_is_refused(tmp_path):
    rows = [{**row, "reward_margin": 1.0} for row in pairs(4)]
    with pytest.raises(ValueError, match="has the column 'reward_margin' already"):
        annotate_reward_margins(configuration(tmp_path, "preference", save_model(tmp_path / "model"), rows))
