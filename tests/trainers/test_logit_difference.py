"""An assistant trained by the unlearning trainer, and the model that is shipped with it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.config import from_tree, load, resolve
from posttrain.evaluation import Source, evaluate
from posttrain.modeling.logit_difference import LogitDifferenceModel, first_layers, logit_difference
from posttrain.pipeline import train
from posttrain.trainers.logit_difference import LogitDifferenceTrainer
from tests import tiny
from tests.trainers.step import config
from tests.trainers.test_gradients import relative_difference
from tests.trainers.unlearning_step import Gradients, data_files, rows_to_retain, trainer

OBJECTIVE = {"forget": "nll", "retain": "uniform_kl", "combine": {"sum": {"forget": 1.0, "retain": 5.0}}}
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
UNLEARNING = Path(__file__).parents[2] / "configs/unlearning"


def build(output, *, model=None, options=None, layers=1, peft=True, **given):
    settings = {"layers": layers, "alpha": 0.5, "filter": 0.1, **given}
    return LogitDifferenceTrainer(
        tiny.model(torch.float64) if model is None else model,
        config(str(output), 4, 1, **{"num_train_epochs": 2, "max_steps": -1, "learning_rate": 0.05, **(options or {})}),
        objective=OBJECTIVE,
        forget_dataset=Dataset.from_list(tiny.rows()),
        retain_dataset=Dataset.from_list(rows_to_retain()),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**PEFT) if peft else None,
        callbacks=[gradients := Gradients()],
        **settings,
    ), gradients


def test_the_assistant_is_trained_as_any_other_model(tmp_path):
    made, gradients = build(tmp_path, peft=False, options={"max_steps": 1})
    made.train()
    plain = trainer(OBJECTIVE, str(tmp_path), 4, model=first_layers(tiny.model(torch.float64), 1), refusals=None,
                    options={"max_steps": 1})  # fmt: skip
    plain.train()
    assert relative_difference(gradients.found, plain.gradients.found) < 1e-12


def test_what_is_saved_is_the_model_with_its_assistant(tmp_path):
    made, _ = build(tmp_path)
    assert made.deployed_model() is made.base, "nothing is taken off before the first step"
    made.train()
    made.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LogitDifferenceModel) and again.dtype == torch.float64
    untouched = tiny.model(torch.float64)
    assert all(torch.equal(value, again.base.state_dict()[name]) for name, value in untouched.state_dict().items())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assistant = made.model.eval()(ids).logits
        start = first_layers(untouched, 1)(ids).logits
        expected = logit_difference(untouched(ids).logits, assistant, alpha=0.5, filter=0.1)
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-9, atol=1e-9)
    assert (assistant - start).abs().max() > 0.1
    assert made.model.training is False and any("lora" in name for name, _ in made.model.named_parameters())


def test_a_resumed_assistant(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    straight, _ = build(tmp_path / "run", options=options)
    straight.train()
    resumed, _ = build(tmp_path / "again", options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for name, tensor in straight.deployed_model().state_dict().items():
        torch.testing.assert_close(resumed.deployed_model().state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "run/checkpoint-2/adapter_config.json").exists(), "a checkpoint holds the assistant alone"


def test_what_cannot_be_is_refused(tmp_path):
    adapted = get_peft_model(tiny.model(), LoraConfig(**PEFT))
    for given, message in (({"layers": 3}, "layers is 3, and the model has 2"), ({"alpha": -1.0}, "alpha is -1"),
                           ({"filter": 1.0}, "filter is 1"), ({"model": adapted}, "merge it first")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build(tmp_path, **given)
    with pytest.raises(ValueError, match="assistant is set, and method supervised"):
        from_tree({"assistant": {"layers": 2}})


def test_a_yaml_run_evaluates_the_model_before_and_the_pair_after(tmp_path):
    tiny.model(seed=0).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tree = {
        "method": "unlearning",
        "model": {"name_or_path": str(tmp_path / "base")},
        "assistant": {"layers": 1},
        "objective": OBJECTIVE,
        "peft": PEFT,
        "data": data_files(tmp_path),
        "trainer": {"output_dir": str(tmp_path / "run"), "num_train_epochs": 5, "learning_rate": 0.02,
                    "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True, "bf16": False,
                    "report_to": "none", "logging_steps": 1, "activation_checkpointing": False},
        "evaluation": {"data": [{"path": str(tmp_path / "forget.jsonl"), "label": "f"}], "metrics": ["likelihood"],
                       "resamples": 10},
    }  # fmt: skip
    outcome = train(resolve(from_tree(tree)))
    before, after = (report.sources["f"].measures["nll"].estimate.value for report in (outcome.before, outcome.after))
    rows = Source(Dataset.from_list(tiny.rows()))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for model, found in ((tiny.model(), before), (saved, after)):
        report = evaluate(model, tiny.tokenizer(), {"f": rows}, metrics=["likelihood"], resamples=10)
        assert report.sources["f"].measures["nll"].estimate.value == pytest.approx(found, rel=1e-5)
    assert after > before + 0.1


def test_the_example_is_a_configuration():
    found = load(UNLEARNING / "uld.yaml", [])
    assert (found.assistant.layers, found.assistant.alpha, found.assistant.filter) == (2, 0.8, 0.01)
    assert found.objective["combine"] == OBJECTIVE["combine"]
