"""The forward of a causal LM, extended: hidden states and head in, vocabulary statistics out, never logits.

Everything happens inside the model's own forward, so DDP, FSDP2 and ZeRO see it as any other forward: parameters are
gathered when they are read and their gradients are reduced.
"""

import copy
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from posttrain.kernels import LMHead, vocab_statistics
from posttrain.modeling.blocks import outputs_of_blocks
from posttrain.modeling.engines import backbone_modules, causal_lm
from posttrain.modeling.head import detached, refuse_vision_model, with_head
from posttrain.modeling.request import VocabOutput, VocabRequest, on_device
from posttrain.modeling.shared_prefix import shared_prefix_mask

Model = TypeVar("Model", bound=nn.Module)

_PREVIOUS = "_forward_before_vocab_request"
# Arguments that concern logits, loss or generation; the backbone does not know them.
_NOT_FOR_BACKBONE = frozenset({"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict"})


def attach(model: nn.Module) -> PreTrainedModel:
    """Lets a causal LM answer ``model(**inputs, vocab_request=request)`` with a `VocabOutput`.

    It also takes the ``segment_ids`` of a `SharedPrefixLayout`, in place of an ``attention_mask``.

    Replaces ``forward`` on the instance of the base causal LM, below PEFT and any engine; without the keyword it defers
    to the forward it found. Attaching twice changes nothing. Returns the base causal LM.

    Raises:
        TypeError: no Hugging Face model inside.
        ValueError: a vision model, or a model without backbone and output embeddings.
    """
    base = causal_lm(model)
    refuse_vision_model(base.config)
    backbone_modules(base)
    if not is_attached(base):
        base.__dict__[_PREVIOUS] = base.__dict__.get("forward")
        base.forward = MethodType(_extended_forward(type(base).forward), base)
    return base


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` has been called on this model."""
    return _PREVIOUS in causal_lm(model).__dict__


def detach(model: nn.Module) -> PreTrainedModel:
    """Takes `attach` back; returns the base causal LM.

    Raises:
        RuntimeError: something else wrapped the forward after `attach`; taking ours out would take it out as well.
    """
    base = causal_lm(model)
    if not is_attached(base):
        return base
    if not hasattr(getattr(base.__dict__.get("forward"), "__func__", None), "answers_vocab_request"):
        raise RuntimeError(f"The forward of {type(base).__name__} was wrapped again after attach; undo that first.")
    previous = base.__dict__.pop(_PREVIOUS)
    del base.forward
    if previous is not None:
        base.forward = previous
    return base


def standalone_copy(model: Model) -> Model:
    """A deep copy that runs on its own weights, not attached.

    What trainers put over the forward of an instance may hold that very instance (TRL's fused head does), and a plain
    deep copy would go on calling it.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("forward", _PREVIOUS):
                module.__dict__.pop(name, None)
    return copied


def _extended_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the signature of `original`, which generation and data preparation read."""
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, vocab_request: VocabRequest | None = None, **kwargs: Any) -> Any:
        if "segment_ids" in kwargs:
            kwargs["attention_mask"] = _mask(self, kwargs.pop("segment_ids"))
        if vocab_request is None:
            # Looked up on the instance, so that a deep copy calls its own forward.
            previous = self.__dict__.get(_PREVIOUS)
            return type(self).forward(self, *args, **kwargs) if previous is None else previous(*args, **kwargs)
        return _answer(self, {**dict(zip(names, args, strict=False)), **kwargs}, vocab_request)

    # accelerate unwraps mixed precision by following __wrapped__ to its end, which would take this forward off as well.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    forward.answers_vocab_request = True  # type: ignore[attr-defined]
    return forward


def _mask(model: PreTrainedModel, segment_ids: Tensor) -> Tensor | BlockMask:
    return shared_prefix_mask(segment_ids, str(model.config.get_text_config()._attn_implementation), model.dtype)


def _answer(model: PreTrainedModel, inputs: dict[str, Any], request: VocabRequest) -> VocabOutput:
    inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_BACKBONE and value is not None}
    inputs["use_cache"] = False
    router_logits = _wants_router_logits(model, inputs)
    if router_logits:
        inputs["output_router_logits"] = True
    backbone = backbone_modules(model).backbone
    with outputs_of_blocks(backbone, request.layers) as between:
        outputs = backbone(**inputs)
    aux_loss = _load_balancing_loss(model, outputs, inputs.get("attention_mask")) if router_logits else None
    answer = _score(model, outputs[0], between, request)
    answer["aux_loss"] = aux_loss
    return answer


@torch.compiler.disable
def _score(
    model: PreTrainedModel, last_hidden: Tensor, between: Mapping[int, Tensor], request: VocabRequest
) -> VocabOutput:
    """Selects the positions and runs the kernels where the head's parameters are whole."""
    selected = _at_targets(last_hidden, request)
    chosen = {layer: _at_targets(states, request) for layer, states in between.items()}

    def compute(hidden: Tensor, head: LMHead) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if request.groups or request.compute:
            answer["statistics"] = _statistics(hidden, head, chosen, request)
        if request.return_hidden:
            answer["hidden"] = hidden
        if request.return_head:
            answer["head"] = detached(head, model)
        return answer

    return VocabOutput(**with_head(model, selected, compute))


def _at_targets(states: Tensor, request: VocabRequest) -> Tensor:
    return states.flatten(0, 1).index_select(0, on_device(request.target_index, states.device))


def _statistics(
    hidden: Tensor, head: LMHead, between: Mapping[int, Tensor], request: VocabRequest
) -> tuple[dict[str, Tensor], ...]:
    if request.compute is not None:
        return (_own_storage(request.compute(hidden, head)),)
    targets = on_device(request.targets, hidden.device)
    answers = []
    for group in request.groups:
        options = request.kernel_options(group, hidden.device)
        wanted = tuple(name for name in group.wanted if name != "hidden")
        answer = vocab_statistics(hidden, head, targets, wanted, **options).as_dict() if wanted else {}
        if "hidden" in group.wanted:
            answer["hidden"] = hidden if group.layer is None else between[group.layer]
        answers.append(_own_storage(answer))
    return tuple(answers)


def _own_storage(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of them a view: writing into a view would drop the hooks that engines place on outputs."""
    return {name: value if value._base is None else value.clone() for name, value in statistics.items()}


def _wants_router_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(inputs.get("output_router_logits", configured))


def _load_balancing_loss(model: PreTrainedModel, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss by the function of the model's own module, with the arguments that its forward passes.

    Raises:
        ValueError: the module has no such function, or one with arguments that are not known here.
    """
    modules = (sys.modules.get(cls.__module__) for cls in type(model).__mro__)
    function = next((f for m in modules if (f := getattr(m, "load_balancing_loss_func", None)) is not None), None)
    text = model.config.get_text_config()

    def setting(*names: str) -> Any:
        found = (getattr(owner, name, None) for owner in (model, text) for name in names)
        return next((value for value in found if value is not None), None)

    experts = setting("num_experts", "num_local_experts")
    known = {
        "gate_logits": outputs.get("router_logits"),
        "num_experts": experts,
        "num_keys": math.isqrt(experts) if experts else None,
        "top_k": setting("num_experts_per_tok"),
        "attention_mask": attention_mask,
    }
    arguments = None if function is None else tuple(inspect.signature(function).parameters)
    if function is None or arguments is None or not set(arguments) <= set(known):
        raise ValueError(
            f"The auxiliary loss of {type(model).__name__} is not known here; set output_router_logits=False in the "
            "model's config to train without it."
        )
    return function(**{name: known[name] for name in arguments})
