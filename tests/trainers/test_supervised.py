"""SupervisedTrainer end to end on a tiny model: what TRL keeps doing, and what is ours."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from posttrain import SupervisedTrainer
from posttrain.objectives import Loss
from posttrain.trainers import NonFiniteLossError
from tests import tiny
from tests.trainers.step import config


def build(tmp_path, objective="nll", *, batch=4, accumulation=1, model=None, train=None, **options):
    """A trainer; options that are the trainer's own go to it, the rest to SFTConfig."""
    own = {
        name: options.pop(name)
        for name in (
            "eval_dataset",
            "peft_config",
            "teacher",
            "compute_metrics",
            "callbacks",
            "data_collator",
            "kernel",
        )
        if name in options
    }
    return SupervisedTrainer(
        model or tiny.model(),
        config(str(tmp_path), batch, accumulation, **options),
        objective=objective,
        train_dataset=train if train is not None else Dataset.from_list(tiny.rows()),
        processing_class=tiny.tokenizer(),
        **own,
    )


def dense_logps(model, dataset):
    """Per-row log-probabilities of the trained tokens, from the model's own logits."""
    model = copy.deepcopy(model).eval()
    result = []
    for row in dataset:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0, :-1].double(), -1)
        kept = labels != -100
        result.append(logp[kept].gather(1, labels[kept][:, None])[:, 0])
    return result


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_each_step_logs_loss_metrics_and_speed(tmp_path):
    trainer = build(tmp_path, {"name": "direct_coverage", "n": 4}, learning_rate=1e-2, max_steps=3)
    expected = torch.cat(dense_logps(trainer.model, trainer.train_dataset))
    trainer.train()
    entry = trainer.state.log_history[0]
    for key in ("loss", "entropy", "mean_token_accuracy", "mean_target_probability", "tokens_per_second", "num_tokens"):
        assert math.isfinite(entry[key]), key
    assert any(key.startswith("direct_coverage/") for key in entry)
    assert 0 < entry["mean_target_probability"] < 1 and expected.numel() > 8
    assert logged(trainer, "num_tokens") == sorted(logged(trainer, "num_tokens"))


def test_first_step_metrics_are_the_model_s(tmp_path):
    trainer = build(tmp_path, batch=8)
    logps = torch.cat(dense_logps(trainer.model, trainer.train_dataset))
    trainer.train()
    assert logged(trainer, "mean_target_probability")[0] == pytest.approx(logps.exp().mean().item(), rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(-logps.mean().item(), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_eval_loss_is_over_the_whole_set(tmp_path, batch):
    rows = Dataset.from_list(tiny.rows(7))
    trainer = build(tmp_path, batch=batch, eval_dataset=rows)
    logps = torch.cat(dense_logps(trainer.model, trainer.eval_dataset))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(-logps.mean().item(), rel=1e-6)
    assert metrics["eval_mean_target_probability"] == pytest.approx(logps.exp().mean().item(), rel=1e-6)


@pytest.mark.parametrize("batch", [2, 8])
def test_eval_of_a_coupled_objective_takes_the_whole_set_s_quantile(tmp_path, batch):
    objective = {"name": "probability_threshold", "quantile": 0.5, "inner": "probability"}
    trainer = build(tmp_path, objective, batch=batch, eval_dataset=Dataset.from_list(tiny.rows(7)))
    p = torch.cat(dense_logps(trainer.model, trainer.eval_dataset)).exp()
    kept = p[p >= p.quantile(0.5)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx((1 - kept).mean().item(), rel=1e-5)


def test_a_dictionary_of_eval_sets_and_new_ones(tmp_path):
    sets = {"a": Dataset.from_list(tiny.rows(3)), "b": Dataset.from_list(tiny.rows(5))}
    trainer = build(tmp_path, eval_dataset=sets, packing=True, max_length=24)
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)
    again = trainer.evaluate(eval_dataset=sets)
    assert again["eval_a_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-6)


def test_compute_metrics_still_gets_logits(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": float(len(prediction.label_ids))}

    trainer = build(tmp_path, eval_dataset=Dataset.from_list(tiny.rows(5)), compute_metrics=metrics)
    assert trainer.evaluate()["eval_seen"] == 5.0
    assert shapes[0][0] == 5 and shapes[0][2] == len(tiny.VOCABULARY)


def test_resuming_goes_on_as_if_never_stopped(tmp_path):
    options = {"learning_rate": 1e-2, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "batch": 2}
    whole = build(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    stopped = build(tmp_path / "parts", max_steps=4, callbacks=[StopAt(2)], **options)
    stopped.train()
    resumed = build(tmp_path / "parts", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


class StopAt(TrainerCallback):
    """Ends training after a step, as a killed run would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_stream_trains_like_the_same_rows_in_memory(tmp_path):
    def weighted(logp, score):
        return Loss(-logp, weight=score + 1)

    rows = Dataset.from_list(tiny.rows())
    options = {"batch": 4, "accumulation": 2, "learning_rate": 1e-2}
    whole = build(tmp_path, weighted, train=rows, **options)
    streamed = build(tmp_path, weighted, train=rows.to_iterable_dataset(), eval_dataset=rows, **options)
    for trainer in (whole, streamed):
        trainer.train()
    for one, other in zip(whole.model.parameters(), streamed.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert streamed.evaluate()["eval_loss"] == pytest.approx(
        streamed.evaluate(eval_dataset=rows.to_iterable_dataset())["eval_loss"], rel=1e-6
    )


def test_conversations_train_the_assistant_alone(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    row = {
        "messages": [
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": "12"},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "7"},
        ]
    }
    trainer = SupervisedTrainer(
        tiny.model(),
        config(str(tmp_path), 2, 1, assistant_only_loss=True),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
    )
    side = trainer.data_collator([trainer.train_dataset[0]])["side"]
    assert tokenizer.decode(side.targets).replace(" ", "") == "12<eos>7<eos>"
    trainer.train()


def test_an_all_masked_batch_is_a_zero_loss_with_finite_gradients(tmp_path):
    trainer = build(tmp_path)
    batch = trainer.data_collator([{"input_ids": [3, 4, 5], "labels": [-100] * 3}])
    for objective in ("nll", {"name": "direct_coverage", "n": 4}, {"name": "probability_threshold", "quantile": 0.5}):
        trainer = build(tmp_path, objective)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def poisoned(logp, score):
    return Loss(torch.where(score == 1.25, math.nan, -logp))


def test_a_non_finite_loss_names_rows_and_objective(tmp_path):
    trainer = build(tmp_path, ["nll", poisoned], batch=8)
    with pytest.raises(NonFiniteLossError, match=r"'poisoned' gave the loss nan after 0 steps on rows \[0, 1, .*5"):
        trainer.train()


class Poison(TrainerCallback):
    """Breaks the model after a step, as an overflow would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(model.parameters()).data.fill_(math.nan)


@pytest.mark.parametrize("objective", ["nll", {"name": "probability_threshold", "threshold": 0.2}])
def test_a_broken_model_stops_and_the_last_checkpoint_stays(tmp_path, objective):
    """A threshold compares false with NaN and would train on at a loss of zero."""
    trainer = build(
        tmp_path, objective, batch=2, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[Poison(2)]
    )
    with pytest.raises(NonFiniteLossError, match="after 2 steps"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_an_undeclared_weight_that_comes_late_is_an_error(tmp_path):
    calls = []

    def moody(logp):
        calls.append(1)
        return Loss(-logp, weight=None if len(calls) == 1 else torch.ones_like(logp))

    with pytest.raises(ValueError, match="declare it with"):
        build(tmp_path, moody).train()


def test_nothing_is_reported_to_anyone(tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base

    monkeypatch.setattr(base, "send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    monkeypatch.delenv("CI", raising=False)
    build(tmp_path)


def test_push_to_hub_still_goes_through_the_trainer(tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def upload_folder(self, **arguments):
            pushed.append(arguments["repo_id"])

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(SupervisedTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    trainer = build(tmp_path, push_to_hub=True, hub_model_id="someone/tiny")
    trainer.hub_model_id = "someone/tiny"
    trainer.train()
    trainer.push_to_hub()
    assert pushed == ["someone/tiny"]


def test_the_mixture_of_experts_loss_is_added(tmp_path):
    settings = tiny.config().to_dict() | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    settings = {k: v for k, v in settings.items() if k not in ("architectures", "rope_parameters", "head_dim")}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**settings))
    trainer = build(tmp_path, batch=8, model=model, router_aux_loss_coef=0.5)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    own = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"],
        output_router_logits=True,
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, inputs)
    # the model keeps the coefficient it was built with, the trainer takes its own setting
    expected = own.loss + (0.5 - model.router_aux_loss_coef) * own.aux_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert own.aux_loss.item() > 0.1


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_lora_on_the_head_is_trained(tmp_path, targets):
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    trainer = build(tmp_path, peft_config=lora, model=tiny.model(tie_word_embeddings=False))
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert any("lm_head" in name for name in moved)


def test_a_teacher_s_divergence_vanishes_on_the_teacher_itself(tmp_path):
    trainer = build(tmp_path, "forward_kl", teacher=tiny.model(), batch=8)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.0, abs=1e-6)
    other = build(tmp_path, "forward_kl", teacher=tiny.model(seed=3), batch=8)
    other.train()
    assert logged(other, "loss")[0] > 0.1


def test_the_saved_model_loads_and_agrees(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"


COVERAGE = {"name": "direct_coverage", "n": 2}
PLAIN = Dataset.from_list([{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, "objective: dft"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 8, "objective": COVERAGE}, "whole sequences"),
        ({"eval_packing": True}, "eval_packing"),
        ({"objective": lambda logp, w: logp * w}, "'w'"),
        ({"eval_dataset": PLAIN, "objective": lambda logp, score: logp}, "eval data lacks the column 'score'"),
        ({"data_collator": object()}, "data_collator"),
        ({"kernel": {"bugdet": 1}}, "did you mean 'kernel.budget'"),
        ({"kernel": {"backend": "streemed"}}, "kernel: unknown backend 'streemed'; did you mean 'streamed'"),
        ({"kernel": {"backend": "dense", "budget": "auto"}}, "kernel: backend 'dense'"),
        ({"teacher": tiny.model(vocab_size=99), "objective": "forward_kl"}, "vocabulary of 99"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)
