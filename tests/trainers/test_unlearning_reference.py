"""The model before unlearning: asked once and kept, asked without the policy's adapter, or a copy of it."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from posttrain.config import from_tree, resolve
from posttrain.pipeline import prepare
from posttrain.trainers.reference import LiveReference
from tests import tiny
from tests.trainers.test_gradients import relative_difference
from tests.trainers.unlearning_step import data_files, disturb, kl, npo, preference, rows_to_retain, trainer

LORA = {"r": 4, "target_modules": "all-linear"}


def losses(made) -> list[float]:
    return [entry["forget_loss"] for entry in made.state.log_history if "forget_loss" in entry]


def two_steps(objective, output, reference, dtype=torch.float64, **given):
    options = {"num_train_epochs": 2, "learning_rate": 0.01}
    settings = {"model": tiny.model(dtype), "reference": reference, "retain_per_forget": 0.5, **given}
    made = trainer(objective, output, 2, 4, options=options, **settings)
    disturb(made.model)
    made.train()
    return made


STATIC = {"name": "gradient_ascent", "reweight": {"name": "loreun_static", "tau": 0.05}}


@pytest.mark.parametrize(
    ("objective", "column"),
    [
        ({"forget": npo, "retain": "nll"}, "reference_sum_logp"),
        ({"forget": preference, "retain": "nll"}, "reference_sum_logp"),
        ({"forget": STATIC}, "reference_sum_logp"),
        # a role that some micro-batches have no row of
        ({"forget": "gradient_ascent", "retain": npo}, "reference_sum_logp"),
    ],
)
def test_a_cached_reference_gives_the_gradient_of_a_live_one(tmp_path, objective, column):
    cached = two_steps(copy.deepcopy(objective), tmp_path, "cached")
    live = two_steps(copy.deepcopy(objective), tmp_path, "model")
    assert cached.ref_model is None and cached._live_reference is None and live.reference == "model"
    names = [name for part in cached.train_dataset.parts.values() if part is not None for name in part.column_names]
    assert column in names
    assert losses(cached) == pytest.approx(losses(live), rel=1e-12)
    assert relative_difference(cached.gradients.found, live.gradients.found) < 1e-12


def test_a_reference_cached_token_by_token(tmp_path):
    """One float32 a token, as float32 models give it."""
    objective = {"forget": {"name": "token_npo", "beta": 4.0}, "retain": "nll"}
    cached, live = (two_steps(objective, tmp_path, kind, torch.float32) for kind in ("cached", "model"))
    found = cached.train_dataset.parts["forget"]
    assert [len(one) for one in found["reference_logp"]] == [sum(t >= 0 for t in one) for one in found["labels"]]
    assert "reference_logp" not in cached.train_dataset.parts["retain"].column_names
    assert relative_difference(cached.gradients.found, live.gradients.found) < 1e-5


def test_what_was_kept_is_read_again_and_refused_where_it_is_of_something_else(tmp_path, monkeypatch):
    given = {"reference": "cached", "reference_cache": tmp_path / "kept"}
    first = trainer({"forget": preference}, tmp_path, **given)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"forget", "refusal"}
    with monkeypatch.context() as patched:
        patched.setattr(LiveReference, "__call__", lambda *_: pytest.fail("the reference was asked again"))
        again = trainer({"forget": preference}, tmp_path, **given)
    for role in ("forget", "refusal"):
        one, other = (made.train_dataset.parts[role]["reference_sum_logp"][:] for made in (first, again))
        assert one == other
    with pytest.raises(ValueError, match="another reference model"):
        trainer({"forget": preference}, tmp_path, model=tiny.model(torch.float64, seed=3), **given)
    with pytest.raises(ValueError, match="other rows"):
        trainer({"forget": preference}, tmp_path, refusals=["never"], **given)
    with pytest.raises(ValueError, match="reference_cache is set and reference is 'model'"):
        trainer({"forget": npo}, tmp_path, reference="model", reference_cache=tmp_path)


@pytest.mark.parametrize(
    ("objective", "given", "options", "kind"),
    [
        ({"forget": npo, "retain": "nll"}, {}, {}, "cached"),
        ({"forget": "simnpo", "retain": "nll"}, {}, {}, "none"),
        ({"forget": npo, "retain": kl}, {}, {}, "model"),
        ({"forget": npo, "retain": kl}, {"peft_config": LoraConfig(**LORA)}, {}, "adapter_off"),
        # fewer rows are seen than would be asked for
        ({"forget": npo}, {}, {"max_steps": 1, "per_device_train_batch_size": 4}, "model"),
        ({"forget": "simnpo", "retain": npo}, {"retain_per_forget": 0.5}, {}, "model"),
        ({"forget": npo, "retain": "nll"}, {"retain_per_forget": 0.5}, {}, "cached"),
    ],
)
def test_auto_takes_what_costs_least(tmp_path, objective, given, options, kind):
    assert trainer(objective, tmp_path, options=options, **given).reference == kind


@pytest.mark.parametrize("kind", ["cached", "adapter_off", "model"])
def test_an_adapter_that_knows_what_is_to_be_forgotten_belongs_to_the_reference(tmp_path, kind):
    """Without it the model would be compared with one that never knew."""
    model = get_peft_model(tiny.model(torch.float64), LoraConfig(**LORA))
    disturb(model, 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = trainer({"forget": npo}, tmp_path, model=model, reference=kind,
                   options={"num_train_epochs": 2, "learning_rate": 1e-3})  # fmt: skip
    made.train()
    assert losses(made)[0] == pytest.approx(20 * math.log(2), rel=1e-9) and losses(made)[1] < losses(made)[0]
    assert set(model.peft_config) == ({"default", "ref"} if kind == "adapter_off" else {"default"})
    after = model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all(".default." in name for name in moved)


@pytest.mark.parametrize("changed", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_adapters_that_change_what_lies_below_take_a_copy(tmp_path, changed):
    given = {"peft_config": LoraConfig(**LORA, **changed), "model": tiny.model()}
    made = trainer({"forget": npo}, tmp_path, **given)
    assert made.reference == "model"
    made.train()
    assert losses(made)[0] == pytest.approx(20 * math.log(2), rel=1e-4)
    with pytest.raises(ValueError, match="reference is adapter_off, which cannot serve here: peft"):
        trainer({"forget": npo}, tmp_path, reference="adapter_off", **{**given, "model": tiny.model()})


@pytest.mark.parametrize("kind", ["cached", "model"])
def test_a_model_by_name(tmp_path, kind):
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options = {"model_init_kwargs": {"dtype": torch.float64}}
    made = trainer({"forget": npo}, tmp_path, model=str(tmp_path / "base"), reference=kind, options=options)
    disturb(made.model)
    made.train()
    assert made.model.dtype == torch.float64
    own = trainer({"forget": npo}, tmp_path, reference="model", model=tiny.model().double())
    disturb(own.model)
    own.train()
    assert relative_difference(made.gradients.found, own.gradients.found) < 1e-12


def test_a_prompt_in_the_rows_to_retain_is_not_trained_where_the_rows_to_forget_are_plain_text(tmp_path):
    plain = Dataset.from_list([{"text": f"{row['prompt']}{row['completion']}"} for row in tiny.rows()])
    made = trainer({"forget": "simnpo", "retain": "nll"}, tmp_path, forget_dataset=plain)
    parts = made.train_dataset.parts
    assert all(-100 not in labels for labels in parts["forget"]["labels"])
    starts = [len(row["prompt"]) for row in rows_to_retain()]
    assert [labels.count(-100) for labels in parts["retain"]["labels"]] == starts


@pytest.mark.parametrize("peft", [None, LORA])
def test_a_folder_of_an_adapter_is_trained_with_what_it_knows(tmp_path, peft):
    """transformers alone would freeze the adapter, or lose it to the new one."""
    tiny.model().save_pretrained(tmp_path / "base")
    known = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**LORA))
    disturb(known, 0.3)
    known.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    tree = {
        "method": "unlearning",
        "model": {"name_or_path": str(tmp_path / "adapter")},
        "objective": {"preset": "npo"},
        "peft": peft,
        "data": data_files(tmp_path),
        "trainer": {"output_dir": str(tmp_path / "run"), "bf16": False, "use_cpu": True, "report_to": "none"},
    }
    made = prepare(resolve(from_tree(tree))).trainer
    assert made.reference == "cached" and set(made.model.peft_config) == {"default"}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(made.model.eval()(ids).logits, known.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert {"lora" in name for name, one in made.model.named_parameters() if one.requires_grad} == {True}
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="came from an adapter's folder"):
        trainer({"forget": npo}, tmp_path, model=frozen)
