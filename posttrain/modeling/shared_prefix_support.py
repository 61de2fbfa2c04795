"""Which models can take the completions of one prompt in one row: by their configuration, and by a trial."""

import inspect

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.kernels import LMHead
from posttrain.modeling.check import evaluating, on_any_rank
from posttrain.modeling.engines import backbone_modules, causal_lm
from posttrain.modeling.request import VocabRequest
from posttrain.modeling.shared_prefix import IMPLEMENTATIONS, shared_prefix_layout

# Largest accepted |difference of hidden states| over |hidden states| in the 2-norm, by the dtype of the layers.
# Rounding is far below on a CPU; on a GPU the layouts may run through different kernels, and depth adds to it.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2**-6,
    torch.bfloat16: 2**-4,
}
_TF32_TOLERANCE = 2**-7
# any tokens serve: a prompt and two completions
_TRIAL = (range(3, 8), range(11, 14), range(17, 19))


def shared_prefix_obstacle(model: nn.Module) -> str | None:
    """Why this model cannot share prompts exactly: a sentence with what to do; None where nothing is known against it.

    Raises:
        TypeError: no Hugging Face model inside.
        ValueError: the model has no output embeddings or no separate backbone.
    """
    base = causal_lm(model)
    name, remedy = type(base).__name__, "set shared_prefix: false"
    found = _of_architecture(base) or _of_positions(base) or _of_training(base)
    if found is None and _implementation(base) not in IMPLEMENTATIONS:
        found = f"runs attn_implementation {_implementation(base)!r}, which takes no mask of its own"
        remedy += " or attn_implementation: sdpa (on a GPU flex_attention)"
    return None if found is None else f"shared_prefix cannot be exact here: {name} {found}; {remedy}."


def refuse_shared_prefix(model: nn.Module) -> None:
    """Raises a ValueError for a model that cannot share prompts exactly; see `shared_prefix_obstacle`."""
    obstacle = shared_prefix_obstacle(model)
    if obstacle is not None:
        raise ValueError(obstacle)


def _implementation(base: PreTrainedModel) -> str:
    return str(base.config.get_text_config()._attn_implementation)


def _of_architecture(base: PreTrainedModel) -> str | None:
    """Layers that look at tokens by their distance in the row, or carry a state through it."""
    config = base.config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or ())]
    # GPT-Neo's name for the same
    kinds += ["local_attention" for kind in getattr(config, "attention_layers", ()) if kind == "local"]
    other = sorted(set(kinds) - {"full_attention"})
    if other:
        return f"has layers of {', '.join(other)}, which do not look at a row through its mask alone"
    if base._is_stateful:
        return "carries a recurrent state from token to token, through one completion into the next"
    for setting in ("sliding_window", "attention_chunk_size"):
        if not kinds and getattr(config, setting, None):
            return f"looks no further back than {setting} {getattr(config, setting)}, counted along the row"
    return None


def _of_positions(base: PreTrainedModel) -> str | None:
    """Positions or directions that the layout's inputs cannot say."""
    config = base.config.get_text_config()
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "has cross-attention, which belongs to no row"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "looks ahead (is_causal or use_bidirectional_attention in its config)"
    if getattr(config, "alibi", False):
        return "takes distances from the order in the row (alibi)"
    if "position_ids" not in inspect.signature(type(backbone_modules(base).backbone).forward).parameters:
        return "takes no position_ids, and positions from the order in the row"
    return None


def _of_training(base: PreTrainedModel) -> str | None:
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return "trains with output_router_logits, and its load-balancing loss would count a prompt once, not twice"
    return None


@torch.no_grad()
def check_shared_prefix(model: nn.Module, device: torch.device | str = "cpu") -> float:
    """Compares the hidden states of two short completions in one row with those in rows of their own.

    Runs in evaluation mode without gradient, through the model as given. Every rank has to call it.

    Args:
        model: attached (see `attach`), possibly wrapped by PEFT and an engine.
        device: of the model's inputs.

    Returns:
        The difference found on this rank over the hidden states' size, in the 2-norm.

    Raises:
        RuntimeError: the two differ, on any rank.
    """
    vocab = causal_lm(model).config.get_text_config().vocab_size
    prompt, *completions = [[token % vocab for token in tokens] for tokens in _TRIAL]
    device = torch.device(device)
    with evaluating(model):
        shared, dtype = _hidden(model, device, prompt, completions, shared=True)
        separate = [_hidden(model, device, prompt, [own], shared=False)[0] for own in completions]
    own = torch.cat(separate)
    difference, accepted = float((shared - own).norm() / own.norm()), _accepted(dtype)
    if on_any_rank(not difference <= accepted, device):
        raise RuntimeError(
            f"shared_prefix is not exact here: hidden states of {type(causal_lm(model)).__name__} differ from those of "
            f"separate rows by {difference:.2g} of their size on this rank (accepted {accepted:.2g} in {dtype}; one "
            "rank fails all); set shared_prefix: false."
        )
    return difference


def _hidden(
    model: nn.Module, device: torch.device, prompt: list[int], completions: list[list[int]], *, shared: bool
) -> tuple[Float[Tensor, "targets width"], torch.dtype]:
    """Hidden states that predict one row's completions, and the dtype of the layers.

    Where the row holds a single completion, the model makes its own mask and positions.
    """
    layout = shared_prefix_layout([prompt], *[[own] for own in completions], pad_token_id=0)
    inputs = {"input_ids": layout.input_ids.to(device)}
    if shared:
        inputs["position_ids"] = layout.position_ids.to(device)
        inputs["segment_ids"] = layout.segment_ids.to(device)
    dtypes: list[torch.dtype] = []

    def inside(hidden: Tensor, head: LMHead) -> dict[str, Tensor]:
        kind = hidden.device.type
        dtypes.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype)
        return {"hidden": hidden.float()}

    request = VocabRequest(layout.target_index.to(device), layout.targets.to(device), compute=inside)
    return model(**inputs, vocab_request=request).statistics[0]["hidden"], dtypes[0]


def _accepted(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        return _TF32_TOLERANCE
    return TOLERANCE[dtype]
