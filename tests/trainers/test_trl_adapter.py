"""What posttrain leans on in TRL and transformers: each fails here first, and by name, when it changes."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer
from trl import DPOConfig, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain import PreferenceTrainer, SupervisedTrainer
from posttrain.trainers import trl_adapter
from tests import tiny
from tests.trainers import preference_step
from tests.trainers.step import config


def test_the_hooks_are_still_there():
    assert "loss_is_scaled_for_ga" in vars(Trainer)
    loader = inspect.signature(Trainer._get_dataloader).parameters
    assert {"dataset", "batch_size", "sampler_fn", "is_training", "dataloader_key"} <= set(loader)
    assert list(inspect.signature(Trainer._get_num_items_in_batch).parameters) == ["self", "batch_samples", "device"]
    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters)[1:] == [
        "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ]  # fmt: skip
    assert "_set_signature_columns_if_needed" in vars(SFTTrainer)
    assert {"max_length", "shuffle_dataset", "packing_strategy", "truncation_mode", "eval_packing"} <= {
        name for name in inspect.signature(SFTConfig).parameters
    }


def test_the_collator_keeps_its_settings():
    assert {"pad_token_id", "padding_free", "return_position_ids", "pad_to_multiple_of"} <= set(
        DataCollatorForLanguageModeling.__dataclass_fields__
    )


@pytest.mark.parametrize("name", trl_adapter.REPLACED)
def test_replaced_settings_exist_and_start_where_we_leave_them(name, tmp_path):
    assert any(name in cls.__dataclass_fields__ for cls in (SFTConfig, DPOConfig, KTOConfig))
    trl_adapter.refuse_replaced_settings(config(str(tmp_path), 1, 1))


def test_trl_still_bakes_partners_and_advises_on_weights(tmp_path, caplog):
    """When TRL's KTO draws its partners batch by batch, `without_mismatched_completions` can go."""
    rows = [{"prompt": "a=", "completion": "12"[i:], "label": i == 0} for i in (0, 1, 0)]
    args = KTOConfig(str(tmp_path), per_device_train_batch_size=3, bf16=False, use_cpu=True, report_to="none")
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny.tokenizer()}
    baked = KTOTrainer(tiny.model(), tiny.model(), args, **given)
    assert "KL_completion_ids" in baked.train_dataset.column_names and "we recommend" in caplog.text
    with trl_adapter.without_mismatched_completions(args):
        plain = KTOTrainer(tiny.model(), tiny.model(), args, **given)
    assert "KL_completion_ids" not in plain.train_dataset.column_names
    assert plain.calculate_KL is False and args.loss_type == "kto"


def test_trl_still_refuses_what_the_adapter_hides(tmp_path):
    """When TRL learns to train an adapted head, `hidden_head_adapter` can go."""
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    rows = Dataset.from_list(tiny.rows())
    arguments = {"args": config(str(tmp_path), 4, 1), "train_dataset": rows, "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match="lm_head"):
        SFTTrainer(get_peft_model(tiny.model(tie_word_embeddings=False), lora), **arguments)
    model = get_peft_model(tiny.model(tie_word_embeddings=False), lora)
    with trl_adapter.hidden_head_adapter(model):
        assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    trainer = SupervisedTrainer(model, **arguments)
    assert trainer.model.get_output_embeddings() is not model.get_output_embeddings().get_base_layer()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["lm_head"], True),
        (["q_proj", "model.lm_head"], True),
        (["q_proj"], False),
        ("all-linear", False),
        (None, False),
    ],
)
def test_whether_a_configuration_adapts_the_head(targets, expected):
    assert trl_adapter.adapts_head(LoraConfig(target_modules=targets), tiny.model()) is expected
    assert trl_adapter.adapts_head(LoraConfig(target_modules=targets), "some/model") is expected


def test_virtual_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PROMPT_TUNING, whose virtual tokens"):
        SupervisedTrainer(
            tiny.model(),
            config(str(tmp_path), 4, 1),
            train_dataset=Dataset.from_list(tiny.rows()),
            processing_class=tiny.tokenizer(),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED, DistributedType.NO])
def test_a_name_is_loaded_by_the_rules_of_trl(monkeypatch, kind):
    found = {}
    monkeypatch.setattr(trl_adapter, "create_model_from_path", lambda name, **options: found.update(model=options))
    processor = SimpleNamespace(from_pretrained=lambda name, **options: found.update(processor=options) or "processor")
    monkeypatch.setattr(trl_adapter, "AutoProcessor", processor)
    given = {"revision": "main", "device_map": "auto"}
    state = SimpleNamespace(distributed_type=kind)
    args = SimpleNamespace(model_init_kwargs=given, trust_remote_code=True, seed=1, distributed_state=state)
    kwargs = {"quantization_config": "four bits"}
    torch.manual_seed(5)
    trl_adapter.loaded("some/model", args, kwargs)
    assert torch.initial_seed() == 1 and kwargs == {"processing_class": "processor"}
    assert found["model"] == {
        "revision": "main",
        "device_map": "auto" if kind == DistributedType.NO else None,
        "trust_remote_code": True,
        "quantization_config": "four bits",
    }
    assert found["processor"] == {"revision": "main", "trust_remote_code": True} and given["device_map"] == "auto"
    args.model_init_kwargs = {"quantization_config": "eight bits"}
    with pytest.raises(ValueError, match="leave it out of one of them"):
        trl_adapter.loaded("some/model", args, {"quantization_config": "four bits"})


def adapting_the_head(kind, tmp_path, model, **options):
    """A trainer whose adapter is on the head."""
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    own = {"processing_class": None if isinstance(model, str) else tiny.tokenizer(), "peft_config": lora}
    if kind is SupervisedTrainer:
        data, args = Dataset.from_list(tiny.rows()), config(str(tmp_path), 4, 1, **options)
    else:
        data, args = Dataset.from_list(preference_step.rows()), preference_step.config(str(tmp_path), 4, 1, **options)
    return kind(model, args=args, train_dataset=data, **own)


@pytest.mark.parametrize("kind", [SupervisedTrainer, PreferenceTrainer])
def test_options_that_loaded_the_model_are_not_said_to_be_ignored(tmp_path, caplog, kind):
    place, options = str(tmp_path / "base"), {"model_init_kwargs": {"dtype": "bfloat16"}}
    tiny.model(tie_word_embeddings=False).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    trainer = adapting_the_head(kind, tmp_path, place, **options)
    assert trainer.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"} and "will be ignored" not in caplog.text
    adapting_the_head(kind, tmp_path, tiny.model(tie_word_embeddings=False), **options)
    assert "will be ignored" in caplog.text


@pytest.mark.parametrize("kind", [SupervisedTrainer, PreferenceTrainer])
def test_a_fresh_adapter_on_the_head_is_that_of_the_seed(tmp_path, kind):
    found = []
    for state in (5, 6):
        model = tiny.model(tie_word_embeddings=False)
        torch.manual_seed(state)
        head = adapting_the_head(kind, tmp_path, model, seed=3).model.get_output_embeddings()
        found.append(head.lora_A["default"].weight.detach().clone())
    assert torch.equal(*found)
