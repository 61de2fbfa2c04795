"""Density weights against known densities, and embeddings against the model's own hidden states."""

import logging

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from posttrain.annotation import annotate_density_weights, density_weights
from posttrain.annotation.density_weights import embed
from posttrain.config.annotation import DensityConfig
from tests import tiny
from tests.annotation.runs import configuration, read_rows, save_model


def test_the_weights_are_the_ratio_of_two_normal_densities():
    rng = np.random.default_rng(0)
    desirable = np.arange(4400) < 4000
    embeddings = rng.normal(size=(4400, 1)) + np.where(desirable, 1.0, 0.0)[:, None]
    weights, found = density_weights(embeddings, desirable, np.arange(4400), DensityConfig())
    # N(1, 1) over N(0, 1), whatever the sizes of the classes
    expected = np.clip(np.exp(embeddings[:, 0] - 0.5), 0.5, 10)
    assert np.all(weights[desirable] == 1)
    error = np.abs(np.log(weights / expected))[~desirable]
    assert error.mean() < 0.1 and error.max() < 0.4
    # P(X > Y) of these normals is Phi(1 / sqrt(2))
    assert found["auc"] == pytest.approx(0.760, abs=0.03)
    assert found["balanced_accuracy"] == pytest.approx(0.691, abs=0.03)
    assert found["mean_undesirable_weight"] == pytest.approx(weights[~desirable].mean())


def test_a_prompt_is_never_scored_by_a_classifier_that_saw_it():
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(40), 5)
    desirable = np.repeat(rng.permutation(40) % 2 == 0, 5)
    embeddings = rng.normal(size=(40, 60))[prompt]
    _, found = density_weights(embeddings, desirable, prompt, DensityConfig(folds=4))
    # with a prompt's copies in several folds it would be 1
    assert 0.2 < found["auc"] < 0.8


def test_bounds_and_sample_are_kept_and_the_seed_repeats_itself():
    rng = np.random.default_rng(2)
    desirable = np.arange(200) % 2 == 0
    embeddings = rng.normal(size=(200, 2)) + 4 * desirable[:, None]
    settings = DensityConfig(minimum=0.25, maximum=3.0, sample=20, seed=5)
    weights, _ = density_weights(embeddings, desirable, np.arange(200), settings)
    assert weights[~desirable].min() == 0.25 and weights.max() <= 3.0
    again, _ = density_weights(embeddings, desirable, np.arange(200), settings)
    other, _ = density_weights(embeddings, desirable, np.arange(200), DensityConfig(minimum=0.0001, seed=5))
    assert (again == weights).all() and len(np.unique(other[~desirable])) > 20


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_embeddings_are_means_over_each_prompts_own_tokens(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = tiny.model().model if kind == "decoder" else BertModel(BertConfig(vocab_size=41, **sizes))
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    found = embed(model.eval(), prompts, batch_size=2, progress=False)
    for ids, values in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(values).float(), expected, atol=1e-5)


def feedback(count=40):
    """Desirable examples ask mostly with a, undesirable ones mostly with b."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        label = index % 2 == 0
        letter = "ab"[int(rng.random() < 0.2) if label else int(rng.random() < 0.8)]
        text = letter * 3 + "".join(rng.choice(list("cdefgh"), 3)) + "="
        rows.append({"id": index, "prompt": text, "completion": "12"[index % 2], "label": label})
    return rows


@pytest.mark.parametrize("other", [False, True])
def test_from_a_configuration_to_weights(tmp_path, other, caplog):
    density = {"folds": 3}
    if other:
        density["model"] = {"name_or_path": save_model(tmp_path / "other", seed=3)}
    rows = feedback()
    config = configuration(tmp_path, "binary_feedback", save_model(tmp_path / "model"), rows, density=density)
    with caplog.at_level(logging.WARNING, "posttrain"):
        found, about = read_rows(annotate_density_weights(config))
    assert [row["id"] for row in found] == list(range(40))
    assert all(row["density_weight"] == 1 for row in found if row["label"])
    by_letter = {
        letter: [row["density_weight"] for row in found if not row["label"] and row["prompt"][0] == letter]
        for letter in "ab"
    }
    assert np.mean(by_letter["a"]) > 2 * np.mean(by_letter["b"])
    assert about["auc"] > 0.7 and about["versions"]["scikit-learn"] and about["density"]["folds"] == 3
    assert about["embedding"].endswith("other" if other else "model")
    assert "cannot be told apart" not in caplog.text


def test_pairs_have_nothing_to_weigh_and_are_warned_about(tmp_path, caplog):
    rows = [{"prompt": row["prompt"], "chosen": "1", "rejected": "2"} for row in feedback(30)]
    config = configuration(tmp_path, "binary_feedback", save_model(tmp_path / "model"), rows, density={"folds": 3})
    with caplog.at_level(logging.WARNING, "posttrain"):
        found, about = read_rows(annotate_density_weights(config))
    assert len(found) == 60 and about["auc"] == pytest.approx(0.5, abs=0.01)
    assert [row["density_weight"] for row in found] == pytest.approx([1.0] * 60, abs=1e-3)
    assert "100 % of the undesirable examples have a prompt that a desirable example has too" in caplog.text
    assert "cannot be told apart" in caplog.text


@pytest.mark.parametrize(
    ("rows", "density", "message"),
    [
        ([{**row, "label": True} for row in feedback(4)], {}, "no undesirable example"),
        (feedback(6), {"folds": 4}, r"folds is 4, and one of the classes has only 3 different prompts"),
        (feedback(4), {"folds": 1}, r"annotation\.density\.folds is 1"),
        (feedback(4), {"minimum": 2, "maximum": 1}, r"annotation\.density\.minimum is 2"),
        ([{**row, "prompt": ""} for row in feedback(4)], {}, "prompt 0 .* is empty"),
    ],
)
def test_what_cannot_be_weighed_is_refused(tmp_path, rows, density, message):
    with pytest.raises(ValueError, match=message):
        annotate_density_weights(
            configuration(tmp_path, "binary_feedback", save_model(tmp_path / "model"), rows, density=density)
        )
