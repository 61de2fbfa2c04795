"""The self-check: it stops what it must, says why, and leaves no trace."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from posttrain.modeling import adapters, attach, check_head
from posttrain.modeling import head as head_module
from tests.modeling import families

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def fresh_lora(model, **options):
    """LoRA as PEFT leaves it, B = 0: it changes no logit yet."""
    attach(model)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("family", "read", "wrong"),
    [
        ("granite", "logit_scale", 1.0),
        ("granite", "logit_scale", 3.0),
        ("cohere", "logit_scale", 1.0),
        ("gemma2", "logit_softcap", None),
        ("llama", "logit_scale", 1.1),
    ],
)
def test_a_scale_or_cap_read_wrongly_is_found(monkeypatch, family, read, wrong, dtype):
    model = attach(families.model(family).to(dtype))
    inputs = families.batch()
    check_head(model, **inputs)
    monkeypatch.setattr(head_module, read, lambda config: wrong)
    with pytest.raises(RuntimeError, match=rf"{type(model).__name__}.*differ.*nats.*{dtype}.*Likely causes"):
        check_head(model, **inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_ignored_fresh_adapter_is_found(monkeypatch, options, dtype):
    model = fresh_lora(families.model("llama").to(dtype), **{"target_modules": ["q_proj"], **options})
    inputs = families.batch()
    check_head(model, **inputs)

    def ignoring(module):
        base = module.original_module if hasattr(module, "original_module") else module.get_base_layer()
        return adapters.HeadLayers(None, base, None)

    monkeypatch.setattr(head_module, "head_layers", ignoring)
    with pytest.raises(RuntimeError, match="an adapter on the head"):
        check_head(model, **inputs)


def test_a_missing_bias_is_found(monkeypatch):
    model = attach(families.model("phi"))
    read = head_module.LMHead
    monkeypatch.setattr(head_module, "LMHead", lambda weight, bias, *rest: read(weight, None, *rest))
    with pytest.raises(RuntimeError, match="differ"):
        check_head(model, **families.batch())


def test_steps_between_hidden_states_and_head_are_found():
    model = attach(families.model("llama"))
    model.__dict__["_forward_before_vocab_request"] = lambda **inputs: _with_logits(
        type(model).forward(model, **inputs), lambda logits: logits.index_fill(-1, torch.tensor([5]), -1e9)
    )
    with pytest.raises(RuntimeError, match=r"\(a projection, a norm, a sliced\s+or masked vocabulary\)"):
        check_head(model, **families.batch())
    model.__dict__["_forward_before_vocab_request"] = lambda **inputs: _with_logits(
        type(model).forward(model, **inputs), lambda logits: logits[..., :50]
    )
    with pytest.raises(RuntimeError, match="by inf nats"):
        check_head(model, **families.batch())


def _with_logits(output, change):
    output.logits = change(output.logits)
    return output


def test_logits_that_are_not_finite_fail():
    model = attach(families.model("llama"))
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(RuntimeError, match="by nan nats"):
        check_head(model, **families.batch())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, monkeypatch):
    model = fresh_lora(families.model("llama").float(), target_modules=["lm_head", "q_proj"]).train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(head_module, "logit_scale", lambda config: 2.0)
        with pytest.raises(RuntimeError):
            check_head(model, **families.batch())
    else:
        check_head(model, **families.batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_positions_are_limited_and_a_mask_is_optional():
    model = attach(families.model("llama"))
    long = families.batch(rows=4, length=40)["input_ids"]
    assert check_head(model, long) < 1e-10


def test_tolerance_may_be_set(monkeypatch):
    model = attach(families.model("llama").float())
    monkeypatch.setattr(head_module, "logit_scale", lambda config: 1.01)
    with pytest.raises(RuntimeError, match="accepted"):
        check_head(model, **families.batch())
    assert check_head(model, **families.batch(), tolerance=0.1) > 1e-3


def test_unattached_model_and_prompt_tuning_are_refused():
    model = families.model("llama")
    with pytest.raises(ValueError, match=r"call attach\(model\) first"):
        check_head(model, **families.batch())
    prompted = get_peft_model(
        attach(model.float()), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", token_dim=16)
    )
    with pytest.raises(ValueError, match="prompt tuning"):
        check_head(prompted, **families.batch())
