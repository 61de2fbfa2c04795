"""From a Hugging Face model to the `LMHead` of the kernels."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from posttrain.kernels.head import LMHead
from posttrain.modeling.adapters import head_linear, low_rank_addition
from posttrain.modeling.engines import is_sharded, whole

# Config attributes that multiply the logits, and those that divide them.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIES_BY_LOGITS_SCALING = frozenset({"hyperclovax"})
# Their config carries the attribute, but their forward does not read it.
_IGNORES_LOGIT_SCALE = frozenset({"mpt"})


def is_vision_model(config: PreTrainedConfig) -> bool:
    """Whether a model with this config also reads images."""
    sub_configs = (*getattr(config, "sub_configs", {}), "vision_config")
    return any("vision" in name and getattr(config, name, None) is not None for name in sub_configs)


def refuse_vision_model(config: PreTrainedConfig) -> None:
    """Raises a ValueError for a model that also reads images."""
    if is_vision_model(config):
        raise ValueError(
            f"{config.model_type} is a vision-language model, which posttrain does not train; "
            "give a text-only causal LM (often published as its text part) as model.name_or_path."
        )


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor on the logits that the config asks for; 1 where it says nothing."""
    text = config.get_text_config()
    for name in _MULTIPLIERS:
        value = getattr(text, name, None)
        if value is not None and text.model_type not in _IGNORES_LOGIT_SCALE:
            return float(value)
    for name in _DIVISORS:
        value = getattr(text, name, None)
        if value is not None:
            return float(value) if text.model_type in _MULTIPLIES_BY_LOGITS_SCALING else 1.0 / float(value)
    return 1.0


def logit_softcap(config: PreTrainedConfig) -> float | None:
    """The cap of ``cap * tanh(logits / cap)``, in logit units; None where the config sets none."""
    text = config.get_text_config()
    values = (getattr(text, name, None) for name in _SOFTCAPS)
    return next((float(value) for value in values if value), None)


def read_head(model: PreTrainedModel, hidden: Float[Tensor, "tokens width"]) -> LMHead:
    """The head as it stands, with the active adapters applied to these hidden states; differentiable.

    Called inside the model's forward, so that sharded parameters can be gathered (once) and their gradients reduced.

    Args:
        model: the causal LM itself, below PEFT and engines.
        hidden: (tokens, width), last hidden states of the tokens to score.

    Raises:
        ValueError: a quantised or offloaded head, or an adapter on it other than plain LoRA and modules_to_save.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; load it with AutoModelForCausalLM.")
    linear, adapted = head_linear(module)
    weight = _in_dtype_of(hidden, linear.weight)
    bias = None if linear.bias is None else _in_dtype_of(hidden, linear.bias)
    addition = None if adapted is None else low_rank_addition(adapted, hidden.to(weight.device))
    low_rank = None
    if addition is not None:
        low_rank = (addition.hidden2, addition.B)
        if addition.bias is not None:
            bias = addition.bias if bias is None else bias + addition.bias
    return LMHead(weight, bias, logit_scale(model.config), logit_softcap(model.config), low_rank)


def detached(head: LMHead, model: nn.Module) -> LMHead:
    """The head without gradient, to be kept beyond the forward: a copy where an engine is about to free the weights."""
    sharded = is_sharded(model)

    def keep(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if sharded else tensor.detach()

    bias = None if head.bias is None else keep(head.bias)
    low_rank = None if head.low_rank is None else (head.low_rank[0].detach(), keep(head.low_rank[1]))
    return dataclasses.replace(head, weight=keep(head.weight), bias=bias, low_rank=low_rank)


def _in_dtype_of(hidden: Tensor, parameter: Tensor) -> Tensor:
    """The full parameter; where FSDP computes in another dtype than it stores and autocast is off, in that dtype."""
    gathered = whole(parameter)
    if gathered is parameter or torch.is_autocast_enabled(hidden.device.type):
        return gathered
    return gathered.to(hidden.dtype)
