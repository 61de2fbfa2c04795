"""What surrounds the request: the rest of the model's life goes on as before."""

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from transformers import AutoConfig, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from posttrain.modeling import (
    StatisticsGroup,
    VocabRequest,
    attach,
    backbone_modules,
    detach,
    is_attached,
    standalone_copy,
)
from posttrain.modeling.head import is_vision_model, logit_scale, logit_softcap
from tests.modeling import families

LOGP = (StatisticsGroup(("logp",)),)


def request(inputs, **options):
    index, targets = families.targets(inputs)
    return VocabRequest(index, targets, **({"groups": LOGP} | options))


def test_attach_is_idempotent_and_detach_takes_it_off():
    model = families.model("llama")
    signature, forward = inspect.signature(model.forward), model.forward
    inputs = families.batch()
    logits = model(**inputs).logits
    assert attach(model) is model and is_attached(model)
    attached = model.__dict__["forward"]
    attach(model)
    assert model.__dict__["forward"] is attached
    assert inspect.signature(model.forward) == signature
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=0)
    detach(detach(model))
    assert not is_attached(model) and model.forward == forward
    assert "logits" in model(**inputs, vocab_request=request(inputs))


def test_positional_arguments_and_labels_are_understood():
    model = attach(families.model("gptj"))
    inputs = families.batch()
    by_name = model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    by_position = model(
        *(inputs["input_ids"], None, inputs["attention_mask"]),
        labels=inputs["input_ids"],
        return_dict=False,
        vocab_request=request(inputs),
    ).statistics[0]["logp"]
    torch.testing.assert_close(by_position, by_name, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["trl", "ours"])
def test_lives_with_the_fused_head_of_trl(first):
    model = families.model("granite").float()
    inputs = families.batch()
    expected = families.own_logp(model, inputs)
    for patch in (add_fused_lm_head, attach) if first == "trl" else (attach, add_fused_lm_head):
        patch(model)
    found = model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(-100))
    fused = model(**inputs, labels=labels, fused_lm_head=True)
    assert fused.log_probs.shape == (3, 8)
    if first == "ours":
        with pytest.raises(RuntimeError, match="wrapped again"):
            detach(model)
    else:
        assert model(**inputs, labels=labels, fused_lm_head=True).loss == fused.loss
        detach(model)
        assert model(**inputs, labels=labels, fused_lm_head=True).loss == fused.loss


def test_a_deep_copy_answers_with_its_own_parameters():
    model = attach(families.model("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    inputs = families.batch()
    torch.testing.assert_close(
        twin(**inputs, vocab_request=request(inputs)).statistics[0]["logp"], families.own_logp(twin, inputs)
    )
    assert (families.own_logp(twin, inputs) - families.own_logp(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("patches", [(add_fused_lm_head,), (add_fused_lm_head, attach), (attach, add_fused_lm_head)])
def test_a_standalone_copy_runs_on_its_own_weights_whatever_stood_over_its_forward(patches):
    """TRL's forward holds the model that it was made for: a plain deep copy would answer with that one's weights."""
    model, inputs = families.model("llama"), families.batch()
    for patch in patches:
        patch(model)
    expected = model(**inputs).logits
    twin = standalone_copy(model)
    assert not is_attached(twin)
    torch.testing.assert_close(twin(**inputs).logits, expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(**inputs).logits.any()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_generation_goes_on():
    model = families.model("llama")
    ids = families.batch(rows=1)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    torch.testing.assert_close(attach(model).generate(ids, **settings), expected, rtol=0, atol=0)
    assert is_attached(model)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state a process, which other tests of this process have set and will set again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_survives_mixed_precision_of_accelerate_and_its_unwrapping():
    model = attach(families.model("llama").float())
    inputs = families.batch()
    expected = model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    found = prepared(**inputs, vocab_request=request(inputs, return_hidden=True))
    difference = (found.statistics[0]["logp"] - expected).abs().max()
    assert 1e-4 < difference < 0.2
    assert found.hidden.dtype == torch.float32
    unwrapped = extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    again = unwrapped(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_padding_changes_nothing():
    model = attach(families.model("llama"))
    inputs = families.batch()
    padded = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in inputs.items()}
    torch.testing.assert_close(
        model(**padded, vocab_request=request(padded)).statistics[0]["logp"],
        model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"],
        rtol=0,
        atol=1e-12,
    )


def test_no_targets_give_finite_zero_gradients():
    model = attach(families.model("llama"))
    none = torch.zeros(0, dtype=torch.long)
    answer = model(**families.batch(), vocab_request=VocabRequest(none, none, LOGP))
    answer.statistics[0]["logp"].sum().backward()
    assert answer.statistics[0]["logp"].shape == (0,)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


def test_groups_have_their_own_options():
    model = attach(families.model("llama"))
    inputs = families.batch()
    index, targets = families.targets(inputs)
    ids = torch.stack([targets, (targets + 1) % families.VOCABULARY], dim=1)
    groups = (StatisticsGroup(("logp",)), StatisticsGroup(("logp", "ids_logp"), temperature=2.0, ids=ids))
    plain, warm = model(**inputs, vocab_request=VocabRequest(index, targets, groups)).statistics
    logits = model(**inputs).logits.flatten(0, 1)[index]
    torch.testing.assert_close(warm["ids_logp"], (logits / 2).log_softmax(-1).gather(1, ids))
    torch.testing.assert_close(warm["logp"], warm["ids_logp"][:, 0])
    torch.testing.assert_close(plain["logp"], logits.log_softmax(-1).gather(1, ids)[:, 0])


def test_hidden_and_head_of_a_teacher_serve_a_student():
    teacher, student = attach(families.model("cohere", seed=3)), attach(families.model("gemma2", seed=4))
    inputs = families.batch()
    index, targets = families.targets(inputs)
    with torch.no_grad():
        taught = teacher(**inputs, vocab_request=VocabRequest(index, targets, return_hidden=True, return_head=True))
    asked = VocabRequest(index, targets, (StatisticsGroup(("forward_kl",)),), teacher=(taught.hidden, taught.head))
    found = student(**inputs, vocab_request=asked).statistics[0]["forward_kl"]
    t, s = (m(**inputs).logits.flatten(0, 1)[index].log_softmax(-1) for m in (teacher, student))
    torch.testing.assert_close(found, (t.exp() * (t - s)).sum(-1))
    assert not taught.head.weight.requires_grad
    assert taught.head.weight.data_ptr() == teacher.lm_head.weight.data_ptr()


def test_compute_runs_on_selected_hidden_and_head():
    model = attach(families.model("llama"))
    inputs = families.batch()

    def squared_norm(hidden, head):
        return {"norm": hidden.square().sum(-1), "rows": head.weight.sum()}

    index, targets = families.targets(inputs)
    answer = model(**inputs, vocab_request=VocabRequest(index, targets, compute=squared_norm, return_hidden=True))
    torch.testing.assert_close(answer.statistics[0]["norm"], answer.hidden.square().sum(-1))
    answer.statistics[0]["rows"].backward()
    assert model.lm_head.weight.grad.eq(1).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_auxiliary_loss_is_the_models_own(family):
    model = families.model(family)
    inputs = families.batch()
    expected = model(**inputs).aux_loss
    expected_gradients = families.gradients(model, expected[None])
    attach(model)
    found = model(**inputs, vocab_request=request(inputs)).aux_loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found > 1
    for name, gradient in families.gradients(model, found[None]).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-12)
    model.config.output_router_logits = False
    assert model(**inputs, vocab_request=request(inputs)).aux_loss is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(reentrant):
    model = attach(families.model("llama"))
    inputs = families.batch()
    expected = families.gradients(model, model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = families.gradients(model, model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_bf16_is_as_near_to_float64_as_dense_bf16():
    truth = families.own_logp(families.model("llama"), families.batch())
    model = attach(families.model("llama").bfloat16())
    inputs = families.batch()
    found = model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    assert found.dtype == torch.float32
    dense = families.own_logp(model, inputs)
    assert (found - truth).abs().max() <= (dense - truth).abs().max() + 0.02


def test_compiled_model_answers_alike():
    model = attach(families.model("llama"))
    inputs = families.batch()
    expected = model(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    compiled = torch.compile(model, backend="eager")
    found = compiled(**inputs, vocab_request=request(inputs)).statistics[0]["logp"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (AutoConfig.for_model("cohere", logit_scale=0.0625), 0.0625, None),
        (AutoConfig.for_model("granite", logits_scaling=8.0), 0.125, None),
        (AutoConfig.for_model("hyperclovax", logits_scaling=8.0), 8.0, None),
        (AutoConfig.for_model("minicpm3", hidden_size=80, dim_model_base=20), 0.25, None),
        (AutoConfig.for_model("falcon_h1", lm_head_multiplier=0.5), 0.5, None),
        (AutoConfig.for_model("mpt", logit_scale=0.5), 1.0, None),
        (AutoConfig.for_model("gemma2"), 1.0, 30.0),
        (AutoConfig.for_model("gemma2", final_logit_softcapping=None), 1.0, None),
        (AutoConfig.for_model("recurrent_gemma"), 1.0, 30.0),
        (LlamaConfig(logit_scale=None), 1.0, None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_scale_and_softcap_of_the_config(config, scale, softcap):
    assert logit_scale(config) == pytest.approx(scale)
    assert logit_softcap(config) == softcap


def test_models_that_cannot_be_attached_are_refused_with_a_sentence():
    assert is_vision_model(AutoConfig.for_model("llava"))
    assert not any(is_vision_model(AutoConfig.for_model(family)) for family in families.FAMILIES)
    model = families.model("llama")
    model.config.vision_config = {"hidden_size": 8}
    with pytest.raises(ValueError, match="vision-language model"):
        attach(model)
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        attach(families.model("llama").model)
    with pytest.raises(TypeError, match="Linear holds no Hugging Face model"):
        attach(torch.nn.Linear(2, 2))


def test_backbone_modules_are_found_below_a_wrapper():
    model = families.model("gpt2")
    parts = backbone_modules(torch.compile(model, backend="eager"))
    assert (parts.causal_lm, parts.backbone, parts.head) == (model, model.transformer, model.lm_head)


def test_quantised_head_is_refused_by_name():
    class Linear4bit(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = attach(families.model("llama"))
    model.lm_head = Linear4bit(16, families.VOCABULARY, bias=False).double()
    inputs = families.batch()
    with pytest.raises(ValueError, match=r"Linear4bit.*llm_int8_skip_modules=\['lm_head'\]"):
        model(**inputs, vocab_request=request(inputs))
    model.lm_head = torch.nn.Linear(16, families.VOCABULARY, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        model(**inputs, vocab_request=request(inputs))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.arange(3), torch.arange(2), LOGP), "one target for every selected position"),
        ((torch.arange(3), torch.arange(3)), "asks for nothing"),
        ((torch.arange(3), torch.arange(3), LOGP, None, "auto", 0.0, None, dict), "compute replaces groups"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        VocabRequest(*arguments)


def test_unknown_auxiliary_loss_is_refused():
    model = attach(families.model("llama", output_router_logits=True))
    inputs = families.batch()
    with pytest.raises(ValueError, match="auxiliary loss of LlamaForCausalLM"):
        model(**inputs, vocab_request=request(inputs))
