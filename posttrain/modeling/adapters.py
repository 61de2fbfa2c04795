"""Adapters on the head: which modules are in charge of the logits, and what LoRA adds to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.modeling.engines import call_in_place_of, whole

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """What an adapter adds: ``hidden2 @ B.T`` and a bias, both before the head's scale."""

    hidden2: Float[Tensor, "tokens rank"]
    B: Float[Tensor, "vocab rank"]
    bias: Float[Tensor, " vocab"] | None


@dataclass(frozen=True, eq=False)
class HeadLayers:
    """The modules a head's forward runs through.

    Args:
        wrapper: PEFT's module around the linear layer, None where there is none.
        linear: computes the logits.
        lora: the wrapper again, if it has unmerged adapters switched on.
    """

    wrapper: nn.Module | None
    linear: nn.Linear
    lora: LoraLinear | None


def head_layers(head: nn.Module) -> HeadLayers:
    """What is in charge of the logits now.

    Raises:
        ValueError: the head or its adapter is of a kind that cannot be read as a weight and a low-rank addition.
    """
    if isinstance(head, ModulesToSaveWrapper):
        return HeadLayers(head, _plain_linear(_active_copy(head)), None)
    if isinstance(head, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"The head carries {type(head).__name__}, which changes single rows; use modules_to_save=['lm_head'] or "
            "LoRA instead, or keep trainable_token_indices off a tied head."
        )
    if not isinstance(head, BaseTunerLayer):
        return HeadLayers(None, _plain_linear(head), None)
    linear = _plain_linear(head.get_base_layer())
    if not isinstance(head, LoraLinear):
        kind = f"{type(head).__module__}.{type(head).__name__}".removeprefix("peft.tuners.")
        raise ValueError(f"The head carries {kind}; only plain LoRA or modules_to_save is supported on the head.")
    if head.disable_adapters and head.merged:
        head.unmerge()
    if head.disable_adapters or head.merged:
        return HeadLayers(head, linear, None)
    for name in head.active_adapters:
        if name in head.lora_variant:
            variant = "DoRA" if head.use_dora.get(name) else type(head.lora_variant[name]).__name__
            raise ValueError(
                f"Adapter {name!r} on the head is {variant}; only plain LoRA or modules_to_save is supported on the "
                "head: exclude the head from target_modules or turn the variant off."
            )
    return HeadLayers(head, linear, head)


def with_low_rank(
    layer: LoraLinear, hidden: Float[Tensor, "tokens width"], then: Callable[[HeadAdapter | None], Result]
) -> Result:
    """Calls ``then`` with the active adapters, concatenated along the rank, or None where none has weights here.

    ``then`` runs inside the calls of the adapters' own modules, in the order in which PEFT calls them.
    """

    def enter(names: Sequence[str], collected: Sequence[HeadAdapter]) -> Result:
        if not names:
            return then(_concatenated(collected))
        down, up = (cast(nn.Linear, modules[names[0]]) for modules in (layer.lora_A, layer.lora_B))
        dtype = next(down.parameters()).dtype
        dropped = layer.lora_dropout[names[0]](hidden.to(dtype))
        scaling = layer.scaling[names[0]]

        def inside_down(x: Tensor) -> Result:
            return call_in_place_of(up, inside_up, F.linear(x, whole(down.weight)) * scaling)

        def inside_up(hidden2: Tensor) -> Result:
            bias = None if up.bias is None else whole(up.bias) * scaling
            return enter(names[1:], [*collected, HeadAdapter(hidden2, whole(up.weight), bias)])

        return call_in_place_of(down, inside_down, dropped)

    return enter([name for name in layer.active_adapters if name in layer.lora_A], [])


def _concatenated(adapters: Sequence[HeadAdapter]) -> HeadAdapter | None:
    if len(adapters) < 2:
        return next(iter(adapters), None)
    biases = [adapter.bias for adapter in adapters if adapter.bias is not None]
    return HeadAdapter(
        torch.cat([adapter.hidden2 for adapter in adapters], dim=1),
        torch.cat([adapter.B for adapter in adapters], dim=1),
        torch.stack(biases).sum(0) if biases else None,
    )


def _plain_linear(module: nn.Module) -> nn.Linear:
    """The module itself, if its output is nothing but ``hidden @ weight.T + bias``.

    Raises:
        ValueError: another kind of module, a quantised weight, or a weight that is not loaded.
    """
    # Not module.weight: ZeRO-3 takes that for a use of the weight, and gathers it.
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    kind = type(module).__name__ + ("" if weight is None else f" with {type(weight).__name__} of {weight.dtype}")
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and weight is not None
    if plain and weight is not None:
        subclassed = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
        plain = weight.is_floating_point() and not subclassed
    if not plain:
        raise ValueError(
            f"The head is a {kind}, not a plain linear layer; if it is quantised, keep it in full with "
            "llm_int8_skip_modules=['lm_head'] (or modules_to_not_convert), which is transformers' default."
        )
    if weight is not None and weight.is_meta:
        raise ValueError("The head's weight is on the meta device (offloaded); keep lm_head on a device in device_map.")
    return cast(nn.Linear, module)


def _active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]
