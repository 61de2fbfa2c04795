"""Reading a parameter that an engine may have sharded, and finding the model below an engine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class BackboneModules:
    """The parts of a causal language model: ``causal_lm`` holds ``backbone`` and the module ``head``."""

    causal_lm: PreTrainedModel
    backbone: nn.Module
    head: nn.Module


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model below DDP, DeepSpeed, torch.compile and PEFT.

    Raises:
        TypeError: no Hugging Face model is found.
    """
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, PreTrainedModel):
        children = (getattr(inner, name, None) for name in ("module", "_orig_mod", "base_model", "model"))
        inner = next((child for child in children if isinstance(child, nn.Module)), None)
    if inner is None:
        raise TypeError(
            f"{type(model).__name__} holds no Hugging Face model; pass a causal LM or a wrapper around one."
        )
    return inner


def backbone_modules(model: nn.Module) -> BackboneModules:
    """Causal LM, backbone and head module of a possibly wrapped model.

    Raises:
        ValueError: the model has no output embeddings or no separate backbone.
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    backbone = getattr(base, base.base_model_prefix, None) if base.base_model_prefix else None
    if head is None or backbone is None:
        missing = "output embeddings" if head is None else f"backbone (base_model_prefix {base.base_model_prefix!r})"
        raise ValueError(f"{type(base).__name__} has no {missing}; load it with AutoModelForCausalLM.")
    return BackboneModules(base, backbone, head)


def whole(parameter: Tensor) -> Tensor:
    """The full parameter as a plain tensor that autograd may keep until the backward.

    To be called inside the forward of the wrapped model, once per forward.

    Raises:
        RuntimeError: a ZeRO-3 shard outside the engine's forward while gradients are on.
    """
    if isinstance(parameter, DTensor):
        # Without grad_placements, the gradient of a parameter whose unit is not unsharded is never reduced: FSDP
        # averages over the ranks, and so must this.
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    status = getattr(parameter, "ds_status", None)
    # Inside the engine's forward, reading a module's attribute has gathered the parameter already and the engine
    # gathers it again for the backward. Gathering a second time would free it under its other users.
    if status is None or status.name == "AVAILABLE":
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        raise RuntimeError(
            "The head is a ZeRO-3 shard that the engine has not gathered; call the model through its DeepSpeed engine, "
            "or without gradients."
        )
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine frees this model's full weights after the forward."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or hasattr(p, "ds_status") for p in model.parameters())
