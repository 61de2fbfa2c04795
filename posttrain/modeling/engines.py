"""Reading a parameter that an engine may have sharded, and finding the model below an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

Result = TypeVar("Result")


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
        # Registered children only: PEFT's attributes fall through to the model inside, whose base_model is no wrapper.
        children = (inner._modules.get(name) for name in ("module", "_orig_mod", "base_model", "model"))
        inner = next((child for child in children if child is not None), None)
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
        raise ValueError(
            f"{type(base).__name__} has no {missing} of its own, which the head's kernel needs; give a causal language "
            "model with one (of a logit difference, its base)."
        )
    return BackboneModules(base, backbone, head)


def call_in_place_of(module: nn.Module, forward: Callable[[Tensor], Result], hidden: Tensor) -> Result:
    """Calls a module with its forward replaced.

    The hooks of FSDP2 and ZeRO-3 then gather the module's parameters around ``forward``, gather them again for its
    backward, and reduce their gradients, just as for the module's own forward. Its result must be a dictionary, tuple
    or list, in which they look for tensors.
    """
    found = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if found is not None:
            module.forward = found


def whole(parameter: Tensor) -> Tensor:
    """The full parameter as a plain tensor that autograd may keep until the backward.

    To be called where the engine has gathered the parameter, that is within `call_in_place_of` its module.

    Raises:
        RuntimeError: a ZeRO-3 shard, because the model was not called through its engine.
    """
    if isinstance(parameter, DTensor):
        # Sharded by something other than a unit of FSDP. Without grad_placements its gradient would not be reduced;
        # FSDP averages over the ranks, and so must this.
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    status = getattr(parameter, "ds_status", None)
    if status is not None and status.name != "AVAILABLE":
        raise RuntimeError(
            "The head is a ZeRO-3 shard that is not gathered; call the model through its DeepSpeed engine."
        )
    return parameter


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine frees this model's full weights after the forward."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or hasattr(p, "ds_status") for p in model.parameters())
