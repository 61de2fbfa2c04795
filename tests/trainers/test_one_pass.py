"""Gradients formed in the forward equal those of the two-pass path, and are formed wherever that is promised."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from posttrain import SupervisedTrainer
from posttrain.objectives import Loss, declare
from posttrain.trainers import NonFiniteLossError, one_pass
from tests import tiny
from tests.trainers.step import Gradients, config
from tests.trainers.test_gradients import TOLERANCE, relative_difference

HEAD = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
BODY = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@declare(unit="tokens", formula="-w logp over the sum of w", paper="none", token_local=True)
def weighted(logp, score):
    """A weight out of the data, declared to be known before the forward."""
    return Loss(-logp, {"nll": -logp.detach()}, weight=score)


OBJECTIVES = {
    "power": {"name": "probability_power", "alpha": 0.5},
    "sum": [
        {"name": "nll", "weight": 0.5},
        {"name": "entropy", "weight": -0.1},
        {"name": "label_smoothing", "epsilon": 0.2},
    ],
    "temperature": {"name": "focal", "statistics": {"temperature": 2.0}},
    "column": [weighted, {"name": "z_loss", "weight": 0.1}],
    "teacher": [{"name": "jsd"}, {"name": "nll", "weight": 0.3}],
    "stored": {"name": "logits_finetuning", "alpha": 0.4},
}


def rows(kind):
    """Rows with the columns that the objective binds; top-2 entries beside every token for the stored teacher."""
    plain = tiny.rows()
    if kind != "stored":
        return plain
    return [
        {
            "input_ids": [3 + i, 5, 7 + i, 4, 6 + i],
            "labels": [-100, 5, 7 + i, 4, 6 + i],
            "teacher_ids": [[4 + i, 9]] * 5,
            "teacher_ids_logp": [[-0.5 - i / 8, -2.0]] * 5,
        }
        for i in range(8)
    ]


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel ran."""
    counted = {"vocab_loss": 0}
    original = one_pass.vocab_loss

    def vocab_loss(*args, **kwargs):
        counted["vocab_loss"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(one_pass, "vocab_loss", vocab_loss)
    return counted


def train(tmp_path, kind, setting, dtype=torch.float64, *, batch=4, accumulation=2, model=None, **own):
    """One step; the gradients and what was logged."""
    gradients = Gradients()
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}} if kind == "stored" else {}
    trainer = SupervisedTrainer(
        model or tiny.model(dtype),
        config(str(tmp_path), batch, accumulation, **prepared),
        objective=OBJECTIVES.get(kind, kind) if isinstance(kind, str) else kind,
        kernel={"one_pass": setting},
        teacher=tiny.model(dtype, seed=3) if kind == "teacher" else None,
        train_dataset=Dataset.from_list(rows(kind)),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
        **own,
    )
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return gradients.found, {key: value for key, value in logs.items() if key != "tokens_per_second"}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float64) for kind in OBJECTIVES), ("power", torch.float32), ("sum", torch.float32)],
)
def test_gradients_and_metrics_are_those_of_two_passes_however_the_step_is_split(tmp_path, calls, kind, dtype):
    expected, logs = train(tmp_path, kind, False, dtype, batch=8, accumulation=1)
    assert calls["vocab_loss"] == 0
    found, found_logs = train(tmp_path, kind, True, dtype, batch=2, accumulation=4)
    assert calls["vocab_loss"] == 4
    assert relative_difference(found, expected) < TOLERANCE[dtype]
    assert found_logs == pytest.approx(logs, rel=1e-5, abs=1e-9) and len(logs) > 8


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [({"tie_word_embeddings": True}, None), ({"tie_word_embeddings": False}, None), ({}, BODY), ({}, HEAD)],
    ids=["tied", "untied", "LoRA on the body", "LoRA on the head"],
)
def test_every_kind_of_head(tmp_path, calls, changes, adapter):
    def result(setting):
        torch.manual_seed(5)
        model = tiny.model(torch.float64, **{"tie_word_embeddings": False, **changes})
        return train(tmp_path, "sum", setting, model=model, peft_config=copy.deepcopy(adapter))[0]

    found, expected = result(True), result(False)
    assert calls["vocab_loss"] == 2
    assert any("lm_head" in name for name in expected) == (adapter is HEAD or changes == {"tie_word_embeddings": False})
    # PEFT keeps adapters in float32
    assert relative_difference(found, expected) < TOLERANCE[torch.float64 if adapter is None else torch.float32]


def test_column_weights_are_counted_without_a_forward(tmp_path, calls, monkeypatch):
    """Against the dense truth; an undeclared weight costs a pass of the model over the step."""
    monkeypatch.setattr(SupervisedTrainer, "_count_step", lambda *_: pytest.fail("the model ran for the counts"))
    found, logs = train(tmp_path, weighted, "auto")
    assert calls["vocab_loss"] == 2
    model, tokenizer = tiny.model(torch.float64), tiny.tokenizer()
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for row in tiny.rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
        logp = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        numerator = numerator - row["score"] * logp.sum()
        denominator += row["score"] * len(logp)
    (numerator / denominator).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(found, expected) < 1e-12
    assert logs["loss"] == pytest.approx((numerator / denominator).item(), rel=1e-6)


def test_an_all_masked_micro_batch_is_a_zero_loss(tmp_path, calls):
    trainer = SupervisedTrainer(
        tiny.model(),
        config(str(tmp_path), 4, 1),
        objective=OBJECTIVES["sum"],
        train_dataset=Dataset.from_list(tiny.rows()),
        processing_class=tiny.tokenizer(),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([{"input_ids": [3, 4, 5], "labels": [-100] * 3}]))
    loss.backward()
    assert loss.item() == 0 and calls["vocab_loss"] == 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


@declare(unit="tokens", formula="NaN at one score", paper="none", token_local=True)
def poisoned(logp, score):
    """Breaks on one row of the data."""
    return Loss(torch.where(score == 1.25, math.nan, -logp))


def test_a_non_finite_loss_still_names_rows_and_objective(tmp_path, calls):
    with pytest.raises(NonFiniteLossError, match=r"'poisoned' gave the loss nan after 0 steps on rows \[.*5"):
        train(tmp_path, ["nll", poisoned], "auto", batch=8, accumulation=1)
    assert calls["vocab_loss"] == 1


def mine(logp):
    return -logp


REFUSED = {
    "whole step": ({"name": "probability_threshold", "threshold": 0.2}, {}, "statistics of the whole step first"),
    "sequences": ({"name": "direct_coverage", "n": 2}, {}, "looks at whole sequences"),
    "undeclared": (mine, {}, "'mine' is not declared token_local"),
    "options": (["nll", {"name": "z_loss", "statistics": {"temperature": 2.0}}], {}, "differ in their `statistics:`"),
    "tolerance": ("nll", {"gradient_tolerance": 0.1}, "kernel.gradient_tolerance leaves out tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_in_one_pass_is_refused_or_done_in_two(tmp_path, calls, case):
    objective, kernel, reason = REFUSED[case]
    with pytest.raises(ValueError, match=f"kernel.one_pass is true, and .*{reason}"):
        build(tmp_path, objective, {"one_pass": True, **kernel})
    build(tmp_path, objective, {"one_pass": "auto", **kernel}).train()
    assert calls["vocab_loss"] == 0


def test_evaluation_takes_the_statistics(tmp_path, calls):
    trainer = build(tmp_path, "nll", None, eval_dataset=Dataset.from_list(tiny.rows(3)))
    assert trainer.evaluate()["eval_loss"] > 0
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        without = trainer.compute_loss(trainer.model, batch)
    assert calls["vocab_loss"] == 0
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(without.item(), rel=1e-6)
    assert calls["vocab_loss"] == 1


def build(tmp_path, objective, kernel, **own):
    return SupervisedTrainer(
        tiny.model(),
        config(str(tmp_path), 4, 1),
        objective=objective,
        kernel=kernel,
        train_dataset=Dataset.from_list(tiny.rows()),
        processing_class=tiny.tokenizer(),
        **own,
    )
