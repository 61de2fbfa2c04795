"""Adapters on the head: which module is in charge, and what it adds to the logits."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.modeling.engines import whole


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """What the active adapters add: ``hidden2 @ B.T`` and a bias, both before the head's scale."""

    hidden2: Float[Tensor, "tokens rank"]
    B: Float[Tensor, "vocab rank"]
    bias: Float[Tensor, " vocab"] | None


def head_linear(head: nn.Module) -> tuple[nn.Linear, LoraLinear | None]:
    """The linear layer that is in charge of the logits, and the LoRA layer around it whose adapters are active.

    Raises:
        ValueError: the head or its adapter is of a kind that cannot be read as a weight and a low-rank addition.
    """
    if isinstance(head, ModulesToSaveWrapper):
        return plain_linear(_active_copy(head)), None
    if isinstance(head, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"The head carries {type(head).__name__}, which changes single rows; use modules_to_save=['lm_head'] or "
            "LoRA instead, or keep trainable_token_indices off a tied head."
        )
    if not isinstance(head, BaseTunerLayer):
        return plain_linear(head), None
    base = plain_linear(head.get_base_layer())
    if not isinstance(head, LoraLinear):
        raise ValueError(
            f"The head carries {_kind(head)}; only plain LoRA or modules_to_save is supported on the head."
        )
    if head.disable_adapters:
        if head.merged:
            head.unmerge()
        return base, None
    if head.merged:
        return base, None
    for name in head.active_adapters:
        if name in head.lora_variant:
            raise ValueError(
                f"Adapter {name!r} on the head is {_variant(head, name)}; only plain LoRA or modules_to_save is "
                "supported on the head: exclude the head from target_modules or turn the variant off."
            )
    return base, head


def low_rank_addition(layer: LoraLinear, hidden: Float[Tensor, "tokens width"]) -> HeadAdapter | None:
    """The active adapters of a LoRA layer, concatenated along the rank; None where none of them has weights here."""
    hidden2s: list[Tensor] = []
    Bs: list[Tensor] = []
    biases: list[Tensor] = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
        A = whole(down.weight)
        scaling = layer.scaling[name]
        hidden2s.append(F.linear(layer.lora_dropout[name](hidden.to(A.dtype)), A) * scaling)
        Bs.append(whole(up.weight))
        if up.bias is not None:
            biases.append(whole(up.bias) * scaling)
    if not Bs:
        return None
    bias = torch.stack(biases).sum(0) if biases else None
    if len(Bs) == 1:
        return HeadAdapter(hidden2s[0], Bs[0], bias)
    return HeadAdapter(torch.cat(hidden2s, dim=1), torch.cat(Bs, dim=1), bias)


def plain_linear(module: nn.Module) -> nn.Linear:
    """The module itself, if its output is nothing but ``hidden @ weight.T + bias``.

    Raises:
        ValueError: another kind of module, a quantised weight, or a weight that is not loaded.
    """
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        raise ValueError(f"The head is a {name}, not a linear layer, so its logits cannot be streamed.")
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if type(module).forward is not nn.Linear.forward or wrapped or not weight.is_floating_point():
        raise ValueError(
            f"The head is quantised or specialised ({name} with {type(weight).__name__} of {weight.dtype}); keep it in "
            "full with llm_int8_skip_modules=['lm_head'] (or modules_to_not_convert), which is transformers' default."
        )
    if weight.is_meta:
        raise ValueError("The head's weight is on the meta device (offloaded); keep lm_head on a device in device_map.")
    return module


def _active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _kind(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__}.{type(layer).__name__}".removeprefix("peft.tuners.")


def _variant(layer: LoraLinear, name: str) -> str:
    return "DoRA" if layer.use_dora.get(name) else type(layer.lora_variant[name]).__name__
