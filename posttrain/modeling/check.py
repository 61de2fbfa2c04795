"""The check at start-up: hidden states and head must give the model's own log-probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.kernels import LMHead, map_logits, vocab_statistics
from posttrain.modeling.engines import causal_lm
from posttrain.modeling.forward import is_attached
from posttrain.modeling.head import logit_scale, logit_softcap
from posttrain.modeling.perturb import perturbed_adapters
from posttrain.modeling.request import VocabRequest

# Largest accepted |difference of log p| over the largest |logit|, by the coarsest dtype the logits pass through. The
# model rounds its logits to that dtype after every step (product, scale, cap), ours once.
HEAD_TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2**-8,
    torch.bfloat16: 2**-6,
}
_TF32_TOLERANCE = 2**-8
# What the log-softmax itself may differ by, in nats.
_FLOOR: dict[torch.dtype, float] = {torch.float64: 1e-12}
_DEFAULT_FLOOR = 1e-5
_MOST_POSITIONS = 64


def check_head(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | None = None,
    *,
    tolerance: float | None = None,
    backend: str = "auto",
) -> float:
    """Compares log-probabilities from `vocab_request` with those of the model's own logits, on one tiny batch.

    Runs in evaluation mode without gradient, through the model as given (wrapped or not) and with its adapters
    perturbed; parameters and modes are restored. Every rank has to call it.

    Args:
        model: attached (see `attach`), possibly wrapped by PEFT and an engine.
        input_ids: (batch, length), on the model's device; at most 64 positions are compared.
        attention_mask: (batch, length), 1 where there is a token.
        tolerance: largest accepted difference divided by the largest logit; None takes `HEAD_TOLERANCE` by dtype.
        backend: of the kernel that is compared beside the dense log-softmax.

    Returns:
        The largest difference found on this rank, in nats.

    Raises:
        RuntimeError: they differ or are not finite, on any rank.
        ValueError: the model is not attached, or its head is of a kind that cannot be read.
    """
    base = causal_lm(model)
    if not is_attached(model):
        raise ValueError(f"{type(base).__name__} does not answer vocab_request yet; call attach(model) first.")
    with torch.no_grad(), perturbed_adapters(model, base.get_output_embeddings()):
        difference, accepted, dtype = head_difference(
            model, input_ids, attention_mask, tolerance=tolerance, backend=backend
        )
    if on_any_rank(not difference <= accepted, input_ids.device):
        raise RuntimeError(_explanation(base, difference, accepted, dtype))
    return difference


@torch.no_grad()
def head_difference(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | None = None,
    *,
    tolerance: float | None = None,
    backend: str = "auto",
) -> tuple[float, float, torch.dtype]:
    """What `check_head` judges, on this rank alone and with the adapters as they are.

    Returns:
        The largest difference of log-probabilities found and the largest accepted, in nats, and the coarsest dtype that
        the logits pass through.

    Raises:
        ValueError: the head is of a kind that cannot be read, or the model adds positions.
    """
    index, targets = _positions(input_ids, attention_mask)
    inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    dtypes: list[torch.dtype] = []

    def dense_and_kernel(hidden: Tensor, head: LMHead) -> dict[str, Tensor]:
        dtypes.append(_coarsest(hidden, head))
        rows = map_logits(lambda logits: logits.log_softmax(-1), hidden, head)
        answer = vocab_statistics(hidden, head, targets, ("logp",), backend=backend)
        return {"rows": rows, "logp": answer["logp"]}

    request = VocabRequest(index, targets, compute=dense_and_kernel)
    with evaluating(model):
        logits = model(**inputs, use_cache=False).logits
        ours = model(**inputs, vocab_request=request).statistics[0]
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"The model returned logits for {tuple(logits.shape[:2])} positions of {tuple(input_ids.shape)} tokens; "
            "prompt tuning and other methods that add positions are not supported, use LoRA."
        )
    own = logits.flatten(0, 1).index_select(0, index.to(logits.device))
    difference, largest = _compare(own, ours, targets)
    dtype = _coarser(dtypes[0], logits.dtype)
    return difference, _relative(dtype, tolerance) * largest + _FLOOR.get(dtype, _DEFAULT_FLOOR), dtype


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The flattened positions to compare and, as their targets, the tokens that follow (the first after the last)."""
    flat = input_ids.flatten()
    kept = torch.arange(flat.numel()) if attention_mask is None else attention_mask.flatten().nonzero()[:, 0].cpu()
    index = kept[:_MOST_POSITIONS].to(flat.device)
    return index, flat.roll(-1)[index]


def _compare(own: Float[Tensor, "tokens vocab"], ours: dict[str, Tensor], targets: Tensor) -> tuple[float, float]:
    """Largest difference of log p (infinite where the vocabularies differ), and the model's largest |logit|."""
    rows = ours["rows"]
    if own.shape != rows.shape:
        return float("inf"), 1.0
    own = own.to(device=rows.device, dtype=torch.promote_types(own.dtype, torch.float32))
    truth = own.log_softmax(-1)
    kernel = (truth.gather(1, targets[:, None].to(rows.device))[:, 0] - ours["logp"]).abs().amax()
    difference = torch.maximum((truth - rows).abs().amax(), kernel)
    return float(difference), float(own.abs().amax())


def _coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def _coarsest(hidden: Tensor, head: LMHead) -> torch.dtype:
    device = hidden.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return _coarser(computed, hidden.dtype)


def _relative(dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    if dtype == torch.float32 and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        return _TF32_TOLERANCE
    return HEAD_TOLERANCE[dtype]


def on_any_rank(failed: bool, device: torch.device) -> bool:
    """Whether something failed on any of the ranks, all of which have to ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return failed
    flag = torch.tensor(float(failed), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _explanation(base: PreTrainedModel, difference: float, accepted: float, dtype: torch.dtype) -> str:
    scale, softcap = logit_scale(base.config), logit_softcap(base.config)
    return (
        f"{type(base).__name__}: log-probabilities from hidden states and head differ from those of the model's own "
        f"logits by {difference:.3g} nats on this rank (accepted {accepted:.3g} in {dtype}; one rank fails all). "
        "Likely causes: a logit scale or softcap that the config does not state in a known way (read: scale "
        f"{scale:g}, softcap {softcap}) or that was changed after loading; an adapter on the head that the model does "
        "not apply, or the reverse; steps between the last hidden state and the head (a projection, a norm, a sliced "
        "or masked vocabulary); logits that are not finite. This model cannot be trained until they agree."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
