"""Which models share prompts, and what the others are told."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.modeling import attach, forward
from posttrain.modeling import shared_prefix_support as support
from posttrain.modeling.shared_prefix_support import check_shared_prefix, refuse_shared_prefix, shared_prefix_obstacle
from tests.modeling import families

SMALL = families._SMALL
STATE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(family, **settings):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "granite", "cohere", "minicpm3", "phi"])
def test_rotary_families_pass_by_configuration_and_by_trial(family):
    model = attach(families.model(family))
    assert shared_prefix_obstacle(model) is None
    assert check_shared_prefix(model) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "opt"])
def test_so_do_other_positions_that_can_be_given(family):
    model = attach(families.model(family))
    assert shared_prefix_obstacle(model) is None
    assert check_shared_prefix(model) < 1e-5


@pytest.mark.parametrize(
    ("family", "settings", "found"),
    [
        ("mistral", {**SMALL, "sliding_window": 8}, "sliding_window 8"),
        ("qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_att"),
        ("gemma2", families.FAMILIES["gemma2"], "sliding_attention"),
        ("gemma3_text", {**SMALL, "layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ("gpt_neo", {**SMALL, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}, "local"),
        ("gemma", {**SMALL, "use_bidirectional_attention": True}, "looks ahead"),
        ("mamba", STATE, "linear_attention"),
        ("rwkv", {**STATE, "attention_hidden_size": 16}, "recurrent state"),
        ("bloom", {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "no position_ids"),
        ("mpt", {"vocab_size": 61, "d_model": 16, "n_layers": 2, "n_heads": 2}, "no position_ids"),
        ("falcon", {"vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "alibi": True}, "alibi"),
        ("mixtral", families.FAMILIES["mixtral"], "output_router_logits"),
    ],
)
def test_other_layers_and_positions_are_refused_by_name(family, settings, found):
    model = built(family, **settings)
    with pytest.raises(ValueError, match=f"shared_prefix.*{type(model).__name__}.*{found}.*set shared_prefix: false"):
        refuse_shared_prefix(model)


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("layer_types", ["linear_attention", "full_attention"], "layers of linear_attention"),
        ("layer_types", ["chunked_attention", "full_attention"], "layers of chunked_attention"),
        ("attention_chunk_size", 4, "attention_chunk_size 4"),
        ("is_causal", False, "looks ahead"),
        ("add_cross_attention", True, "cross-attention"),
    ],
)
def test_what_a_configuration_says_is_enough(setting, value, found):
    model = families.model("llama")
    setattr(model.config, setting, value)
    assert found in str(shared_prefix_obstacle(model))


def test_a_window_that_is_switched_off_is_none():
    model = built("qwen2", **SMALL, use_sliding_window=False, sliding_window=8)
    refuse_shared_prefix(model)
    refuse_shared_prefix(built("mistral", **{**SMALL, "sliding_window": None}))


def test_flash_attention_is_refused_with_what_to_take():
    model = families.model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM runs attn_implementation 'flash_attention_2'.*sdpa"):
        refuse_shared_prefix(model)


def test_below_adapters():
    model = get_peft_model(families.model("mistral", sliding_window=8), LoraConfig(target_modules=["q_proj"]))
    assert "MistralForCausalLM" in str(shared_prefix_obstacle(model))
    model = get_peft_model(attach(families.model("llama")), LoraConfig(target_modules=["q_proj"]))
    assert shared_prefix_obstacle(model) is None and check_shared_prefix(model) < 1e-5


def test_the_trial_finds_a_model_that_does_not_read_its_mask(monkeypatch):
    """Completions that see one another."""
    model = attach(families.model("llama"))
    model.train()
    causal = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    monkeypatch.setattr(forward, "shared_prefix_mask", lambda *_: causal)
    with pytest.raises(RuntimeError, match=r"hidden states of LlamaForCausalLM differ.*set shared_prefix: false"):
        check_shared_prefix(model)
    assert model.training


def test_the_trial_finds_positions_that_are_not_read():
    model = attach(families.model("llama"))
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(RuntimeError, match="shared_prefix is not exact here"):
        check_shared_prefix(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_bears_low_precision(dtype):
    model = attach(families.model("qwen3", num_hidden_layers=16).to(dtype))
    assert check_shared_prefix(model) < support.TOLERANCE[dtype] / 2
