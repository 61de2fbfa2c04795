"""Displacement, calibration of margins and entanglement of gradients, against hand-made cases and dense torch."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from posttrain import PreferenceTrainer
from posttrain.objectives import Loss
from posttrain.trainers.pair_diagnostics import entanglement
from tests import tiny


def rows(count=6):
    return [
        {
            "prompt": "hgfedcba"[i] + "abc"[: i % 3] + "=",
            "chosen": "0123456789"[: 1 + (3 * i) % 7],
            "rejected": "9876543210"[: 1 + (5 * i) % 6],
            "score_margin": (-1.0) ** i * (0.5 + i),
        }
        for i in range(count)
    ]


def trainer(folder, objective="dpo", data=None, model=None, **options):
    settings = {
        "per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "max_steps": 3, "learning_rate": 0.02,
        "eval_strategy": "steps", "eval_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **options.pop("args", {}),
    }  # fmt: skip
    data = Dataset.from_list(data or rows())
    return PreferenceTrainer(
        model or tiny.model(torch.float64),
        None,
        DPOConfig(str(folder), **settings),
        objective=objective,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
        **options,
    )


def evaluations(built):
    return [entry for entry in built.state.log_history if "eval_loss" in entry]


def test_entanglement_of_known_gradients():
    chosen, rejected = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([1.0, 1.0]), torch.tensor([0.0])]
    found = entanglement(chosen, rejected)
    assert found.cosine == pytest.approx(3 / (5 * math.sqrt(2)))
    assert found.over_chosen == pytest.approx(3 / 25) and found.over_rejected == pytest.approx(3 / 2)


def test_entanglement_is_that_of_the_dense_model(tmp_path):
    built = trainer(tmp_path, diagnostics={"entanglement_batches": 1})
    metrics = built.evaluate()
    model = tiny.model(torch.float64).eval()
    gradients = []
    for role in ("chosen", "rejected"):
        total = torch.zeros((), dtype=torch.float64)
        for row in list(built.eval_dataset)[:2]:
            ids = torch.tensor([row["prompt_ids"] + row[f"{role}_ids"]])
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total = total + logp[len(row["prompt_ids"]) - 1 :].sum() / 2
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert metrics["eval_gradient_cosine"] == pytest.approx(cosine, rel=1e-9)
    ratio = (gradients[0] @ gradients[1] / (gradients[1] @ gradients[1])).item()
    assert metrics["eval_entanglement_over_rejected"] == pytest.approx(ratio, rel=1e-9)
    assert all(parameter.grad is None for parameter in built.model.parameters())


def sink(chosen_sequence_logp, rejected_sequence_logp):
    """Pulls both completions down: the margin alone would not tell."""
    return Loss(chosen_sequence_logp + rejected_sequence_logp)


def test_changes_are_told_from_the_start_and_a_falling_chosen_is_warned_of(tmp_path, caplog):
    built = trainer(tmp_path, sink, diagnostics={"patience": 1, "entanglement_batches": 0})
    with caplog.at_level(logging.WARNING):
        built.train()
    found = evaluations(built)
    assert [entry["step"] for entry in found] == [0, 1, 2, 3]
    assert found[0]["eval_chosen_logp_change"] == found[0]["eval_rejected_logp_change"] == 0
    last = found[-1]
    assert last["eval_chosen_logp_change"] == pytest.approx(last["eval_chosen_logp"] - found[0]["eval_chosen_logp"])
    assert last["eval_chosen_logp_change"] < -1
    said = [record.getMessage() for record in caplog.records if "fallen" in record.getMessage()]
    assert len(said) == 2 and "at 2 evaluations in a row" in said[0]
    assert not any("eval_gradient_cosine" in entry for entry in found)


def test_no_warning_where_chosen_rises(tmp_path, caplog):
    built = trainer(tmp_path, {"name": "nll", "role": "chosen"}, diagnostics={"patience": 0, "entanglement_batches": 0})
    with caplog.at_level(logging.WARNING):
        built.train()
    assert evaluations(built)[-1]["eval_chosen_logp_change"] > 0
    assert not [record for record in caplog.records if "fallen" in record.getMessage()]


def fixed(chosen_sequence_logp, score_margin):
    """A margin that is known: twice the sign of a score, but wrong where the score is below -4."""
    margin = 2 * torch.sign(score_margin) * torch.where(score_margin < -4, -1.0, 1.0)
    return Loss(-chosen_sequence_logp, {"implicit_margin": margin})


def test_calibration_against_scores(tmp_path):
    """Six pairs with scores .5, -1.5, 2.5, -3.5, 4.5, -5.5: five judged rightly with confidence sigmoid(2)."""
    metrics = trainer(tmp_path, fixed, diagnostics={"entanglement_batches": 0}).evaluate()
    high = 1 / (1 + math.exp(-2))
    # the bin of 1 - sigmoid(2) holds two pairs that are not preferred, the other four pairs of which three are
    expected = (abs(2 * (1 - high) - 0) + abs(4 * high - 3)) / 6
    assert metrics["eval_margin_calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_margin_brier_score"] == pytest.approx((5 * (1 - high) ** 2 + high**2) / 6, abs=1e-6)
    assert metrics["eval_margin_agrees_with_scores"] == pytest.approx(5 / 6)


def test_pairs_without_a_score_are_left_out_of_the_calibration(tmp_path):
    data = [{**row, "score_margin": None if i in (2, 5) else row["score_margin"]} for i, row in enumerate(rows())]
    metrics = trainer(tmp_path, own_margin, data=data, diagnostics={"entanglement_batches": 0}).evaluate()
    assert metrics["eval_margin_brier_score"] == pytest.approx((1 / (1 + math.exp(2))) ** 2 / 2 + FAR**2 / 2, abs=1e-6)


FAR = 1 / (1 + math.exp(-2))


def own_margin(chosen_sequence_logp, rejected_sequence_logp):
    """A margin of 2 for every pair: of the four with scores .5, -1.5, -3.5 and 4.5 two are judged rightly."""
    return Loss(-chosen_sequence_logp, {"implicit_margin": torch.full_like(chosen_sequence_logp, 2).detach()})


def test_a_set_without_scores_can_be_evaluated_later(tmp_path):
    built = trainer(tmp_path, diagnostics={"entanglement_batches": 0})
    bare = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows()])
    metrics = built.evaluate(bare)
    assert "eval_margin_brier_score" not in metrics and "eval_dpo/reward_accuracy" in metrics


def test_two_scores_make_the_margin(tmp_path):
    data = [
        {**{k: row[k] for k in ("prompt", "chosen", "rejected")}, "chosen_score": 2.0, "rejected_score": 0.5 + i}
        for i, row in enumerate(rows())
    ]
    built = trainer(tmp_path, "mmpo", data=data, diagnostics={"entanglement_batches": 0})
    assert built.train_dataset["score_margin"] == [1.5 - i for i in range(6)]


def test_sets_are_told_apart(tmp_path):
    """Each set has its own gradients, and its own start."""
    first, second = (Dataset.from_list(rows()[part]) for part in (slice(0, 3), slice(3, 6)))
    one = trainer(tmp_path)
    metrics = one.evaluate({"a": first, "b": second})
    alone = {}
    for name, data in {"a": first, "b": second}.items():
        alone[name] = trainer(tmp_path, data=list(data)).evaluate()["eval_gradient_cosine"]
    assert metrics["eval_a_gradient_cosine"] == pytest.approx(alone["a"], rel=1e-9)
    assert metrics["eval_b_gradient_cosine"] == pytest.approx(alone["b"], rel=1e-9)
    assert alone["a"] != pytest.approx(alone["b"], rel=1e-3)
    other, again = one.evaluate(second), one.evaluate(first)
    assert other["eval_chosen_logp_change"] == again["eval_chosen_logp_change"] == 0


def test_calibration_is_told_of_one_term(tmp_path):
    none = {"entanglement_batches": 0}
    alone = trainer(tmp_path, fixed, diagnostics=none).evaluate()
    both = trainer(tmp_path, [fixed, {"name": "simpo", "weight": 0.1}], diagnostics=none).evaluate()
    assert both["eval_margin_brier_score"] == pytest.approx(alone["eval_margin_brier_score"])


def test_compute_metrics_is_called(tmp_path):
    seen = []
    options = {"compute_metrics": lambda prediction: seen.append(prediction.predictions.shape) or {"seen": 1.0}}
    metrics = trainer(tmp_path, diagnostics={"entanglement_batches": 0}, **options).evaluate()
    assert metrics["eval_seen"] == 1.0 and seen[0][-1] == len(tiny.VOCABULARY)


@pytest.mark.parametrize(("key", "value"), [("patience", -1), ("entanglement_batches", 1.5)])
def test_refused_settings(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"diagnostics\.{key}"):
        trainer(tmp_path, diagnostics={key: value})


def test_the_start_survives_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    built = trainer(tmp_path, sink, diagnostics={"entanglement_batches": 0}, args=saving)
    built.train()
    start = evaluations(built)[0]["eval_chosen_logp"]
    resumed = trainer(tmp_path, sink, diagnostics={"entanglement_batches": 0}, args={**saving, "max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    last = evaluations(resumed)[-1]
    assert last["step"] == 3
    assert last["eval_chosen_logp_change"] == pytest.approx(last["eval_chosen_logp"] - start)
