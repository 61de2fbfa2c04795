"""From a Hugging Face model to the `LMHead` of the kernels."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from posttrain.kernels.head import LMHead
from posttrain.modeling.adapters import HeadAdapter, head_layers, with_low_rank
from posttrain.modeling.engines import backbone_modules, call_in_place_of, causal_lm, is_sharded, whole

Result = TypeVar("Result")

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


def with_head(
    model: PreTrainedModel, hidden: Float[Tensor, "tokens width"], function: Callable[[Tensor, LMHead], Result]
) -> Result:
    """Calls ``function(hidden, head)`` where the head's parameters are whole; see `call_in_place_of`.

    The hidden states it gets are on the head's device, which may differ from the last layer's.

    Raises:
        ValueError: a quantised or offloaded head, or an adapter on it other than plain LoRA and modules_to_save.
    """
    layers = head_layers(backbone_modules(model).head)
    scale, softcap = logit_scale(model.config), logit_softcap(model.config)

    def inside_linear(hidden: Tensor) -> Result:
        weight = whole(layers.linear.weight)
        bias = None if layers.linear.bias is None else whole(layers.linear.bias)
        hidden = hidden.to(weight.device)
        if layers.lora is None:
            return function(hidden, LMHead(weight, bias, scale, softcap))

        def inside_adapters(adapter: HeadAdapter | None) -> Result:
            if adapter is None:
                return function(hidden, LMHead(weight, bias, scale, softcap))
            biases = [part for part in (bias, adapter.bias) if part is not None]
            total = torch.stack(biases).sum(0) if biases else None
            return function(hidden, LMHead(weight, total, scale, softcap, (adapter.hidden2, adapter.B)))

        return with_low_rank(layers.lora, hidden, inside_adapters)

    if layers.wrapper is None:
        return call_in_place_of(layers.linear, inside_linear, hidden)
    return call_in_place_of(layers.wrapper, lambda x: call_in_place_of(layers.linear, inside_linear, x), hidden)


def read_head(model: PreTrainedModel, hidden: Float[Tensor, "tokens width"]) -> LMHead:
    """The head as it stands, with the active adapters applied to these hidden states; differentiable.

    For a model in one piece; under an engine that shards it, ask through the forward (`VocabRequest.return_head`).

    Args:
        model: the causal LM, or a wrapper around it.
        hidden: (tokens, width), last hidden states of the tokens to score.

    Raises:
        ValueError: a quantised or offloaded head, or an adapter on it other than plain LoRA and modules_to_save.
        RuntimeError: the head is sharded.
    """
    return with_head(causal_lm(model), hidden, lambda _, head: {"head": head})["head"]


def detached(head: LMHead, model: nn.Module) -> LMHead:
    """The head without gradient, to be kept beyond the forward: a copy where an engine is about to free the weights."""
    sharded = is_sharded(model)

    def keep(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if sharded else tensor.detach()

    bias = None if head.bias is None else keep(head.bias)
    low_rank = None if head.low_rank is None else (head.low_rank[0].detach(), keep(head.low_rank[1]))
    return dataclasses.replace(head, weight=keep(head.weight), bias=bias, low_rank=low_rank)
