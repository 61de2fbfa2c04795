"""Adapters: the head with LoRA or a trained copy on it gives the PEFT model's own log-probabilities and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.modeling import StatisticsGroup, VocabRequest, attach, causal_lm, check_head, read_head
from tests.modeling import families

GROUP = (StatisticsGroup(("logp",)),)
pytestmark = [
    # peft asks transformers by a name that transformers has deprecated
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def adapted(model, seed=0, **options):
    """The model with noise in place of LoRA's zeros, attached before the adapters were put on."""
    attach(model)
    options = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj"], **options}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False)
    fill(peft_model, seed)
    return peft_model.eval()


def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)


def logp(model, inputs):
    index, targets = families.targets(inputs)
    return model(**inputs, vocab_request=VocabRequest(index, targets, GROUP)).statistics[0]["logp"]


def assert_equals_own(model, *, has):
    inputs = families.batch()
    expected = families.own_logp(model, inputs)
    expected_gradients = families.gradients(model, expected)
    found = logp(model, inputs)
    found_gradients = families.gradients(model, found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert any(has in name and gradient.abs().max() > 1e-6 for name, gradient in found_gradients.items())
    assert check_head(model, **inputs) < 1e-10


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "phi"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({}, "q_proj.lora_A"),
        ({"target_modules": ["lm_head"]}, "lm_head.lora_A"),
        ({"target_modules": ["lm_head", "q_proj"], "use_rslora": True}, "lm_head.lora_B"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "lm_head.lora_B.default.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
    ],
    ids=["body", "head", "rslora", "lora_bias", "modules_to_save"],
)
def test_adapted_model_equals_its_own_logits(family, tied, options, has):
    assert_equals_own(adapted(families.model(family, tied=tied), **options), has=has)


def test_two_adapters_add_up_and_each_may_be_chosen():
    model = adapted(families.model("llama"), target_modules=["lm_head", "q_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    fill(model.double(), seed=4)
    inputs = families.batch()
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        assert_equals_own(model, has=f"lm_head.lora_B.{name}")
        alone[name] = logp(model, inputs)
    model.base_model.set_adapter(["default", "second"])
    assert_equals_own(model, has="lm_head.lora_B.second")
    both = logp(model, inputs)
    assert all((both - one).abs().max() > 1e-3 for one in alone.values())
    hidden = torch.randn(4, 16, dtype=torch.float64)
    assert read_head(causal_lm(model), hidden).low_rank[0].shape == (4, 3 + 2)


def test_merged_disabled_and_unmerged():
    model = adapted(families.model("llama"), target_modules=["lm_head", "q_proj"])
    inputs = families.batch()
    with torch.no_grad():
        before = logp(model, inputs)
        with model.disable_adapter():
            base = logp(model, inputs)
            torch.testing.assert_close(base, families.own_logp(model, inputs), rtol=0, atol=1e-12)
        assert (base - before).abs().max() > 1e-2
        model.merge_adapter()
        torch.testing.assert_close(logp(model, inputs), before, rtol=0, atol=1e-12)
        assert read_head(causal_lm(model), torch.zeros(1, 16).double()).low_rank is None
        with model.disable_adapter():
            torch.testing.assert_close(logp(model, inputs), base, rtol=0, atol=1e-12)
    # disabling has unmerged the adapters, here as in the model's own forward
    torch.testing.assert_close(logp(model, inputs).detach(), before, rtol=0, atol=1e-12)


def test_disabled_modules_to_save_reads_the_original():
    model = adapted(families.model("llama"), modules_to_save=["lm_head"])
    inputs = families.batch()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(logp(model, inputs), families.own_logp(model, inputs), rtol=0, atol=1e-12)
        disabled = logp(model, inputs)
    assert (logp(model, inputs) - disabled).abs().max() > 1e-2


def test_dropout_on_the_head_falls_as_it_does_in_peft():
    """With every position a target, in order, the same seed drops the same elements."""
    model = adapted(families.model("llama"), target_modules=["lm_head"], lora_dropout=0.5).train()
    ids = families.batch(rows=2, length=5)["input_ids"]
    targets = ids.flatten()
    torch.manual_seed(7)
    expected = model(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)[torch.arange(10), targets]
    torch.manual_seed(7)
    request = VocabRequest(torch.arange(10), targets, GROUP)
    found = model(input_ids=ids, vocab_request=request).statistics[0]["logp"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.manual_seed(8)
    other = model(input_ids=ids, vocab_request=request).statistics[0]["logp"]
    assert (other - found).abs().max() > 1e-3


def test_float32_adapters_on_a_bf16_model():
    model = families.model("llama").bfloat16()
    attach(model)
    config = LoraConfig(r=3, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    fill(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    inputs = families.batch()
    found = logp(model, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, families.own_logp(model, inputs), rtol=0, atol=0.1)
    check_head(model, **inputs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["lm_head"], "use_dora": True}, "'default' on the head is DoRA"),
        ({"trainable_token_indices": {"lm_head": [3, 4]}}, "TrainableTokensWrapper"),
    ],
)
def test_other_adapters_on_the_head_are_refused_by_name(options, sentence):
    model = adapted(families.model("llama"), **options)
    with pytest.raises(ValueError, match=sentence):
        check_head(model, **families.batch())


def test_other_tuners_on_the_head_are_refused_by_name():
    from peft import IA3Config

    model = families.model("llama")
    attach(model)
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"ia3.*Linear"):
        logp(model, families.batch())
