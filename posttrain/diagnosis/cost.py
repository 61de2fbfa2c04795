"""Predicted time and memory of an optimizer step, by objective and head path: a forecast, not a measurement.

The head's time is that of a few tokens on this device, scaled by units of work (tokens x width x vocabulary; one matrix
product is 2); the backbone's is its measured forward, three times (four with checkpointed activations). Memory follows
from shapes. What the optimizer, the data loader and the engines need beside that is left out.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.diagnosis.sample import TokenSample, synchronize
from posttrain.diagnosis.silence import Candidate
from posttrain.kernels import LMHead, vocab_loss, vocab_statistics
from posttrain.kernels.tiling import block_shape, tile_shape

# Units of work of forward and backward; a pass more for objectives that must know the whole step first.
UNITS: Mapping[str, int] = {"dense": 6, "two-pass": 8, "one-pass": 6}
_COUNTING_UNITS = 2
# Bounds the measured problem: about a tenth of a second on one CPU core.
_MEASURED_UNIT = {"cpu": 5e8, "device": 2e11}
_REPEATS = 3


@dataclass(frozen=True)
class Shapes:
    """A step in numbers.

    Args:
        target_tokens, padded_tokens: of a micro-batch on one device, on average.
        micro_batches: of an optimizer step.
        width, vocab, layers: of the model.
        parameters, trainable: how many there are.
        parameter_bytes: of one parameter.
        checkpointing: activations are recomputed in the backward.
        head_trains: the head's gradient is wanted.
    """

    target_tokens: float
    padded_tokens: float
    micro_batches: int
    width: int
    vocab: int
    layers: int
    parameters: int
    trainable: int
    parameter_bytes: int
    checkpointing: bool
    head_trains: bool


@dataclass(frozen=True)
class Prediction:
    """One objective on one path: seconds of an optimizer step, and bytes at its peak on one device."""

    objective: str
    path: str
    seconds: float
    memory_bytes: int


def seconds_per_unit(
    hidden: Float[Tensor, "few width"], head: LMHead, targets: Int[Tensor, " few"]
) -> dict[str, float]:
    """Path -> seconds of one unit of work, forward and backward of ``nll`` on a few tokens; medians of three runs."""
    vocab, width = head.weight.shape
    most = _MEASURED_UNIT["cpu" if hidden.device.type == "cpu" else "device"] / (width * vocab)
    tokens = max(1, min(hidden.shape[0], int(most)))
    low_rank = None if head.low_rank is None else (head.low_rank[0][:tokens], head.low_rank[1])
    leaf = dataclasses.replace(head, weight=head.weight.detach().requires_grad_(), low_rank=low_rank)
    hidden, targets = hidden[:tokens].detach().requires_grad_(), targets[:tokens]

    def statistics(backend: str) -> None:
        vocab_statistics(hidden, leaf, targets, ("logp",), backend=backend)["logp"].sum().backward()

    def one_pass() -> None:
        weight = torch.ones(tokens, device=hidden.device)
        vocab_loss(hidden, leaf, targets, ("logp",), lambda found: -found["logp"], weight)[0].backward()

    runs: dict[str, Callable[[], None]] = {
        "dense": lambda: statistics("dense"),
        "two-pass": lambda: statistics("auto"),
        "one-pass": one_pass,
    }
    return {name: _median(run, leaf, hidden) / (UNITS[name] * tokens * width * vocab) for name, run in runs.items()}


def _median(run: Callable[[], None], head: LMHead, hidden: Tensor) -> float:
    found: list[float] = []
    for _ in range(_REPEATS + 1):
        head.weight.grad = hidden.grad = None
        synchronize(hidden.device)
        started = time.perf_counter()
        run()
        synchronize(hidden.device)
        found.append(time.perf_counter() - started)
    return float(np.median(found[1:]))


def head_bytes(path: str, shapes: Shapes, device: torch.device) -> int:
    """Peak memory of the head's forward and backward beyond parameters and their gradients."""
    tokens, width, vocab = max(1, round(shapes.target_tokens)), shapes.width, shapes.vocab
    hidden = 4 * tokens * width
    if path == "dense":
        # float32 logits, their log-softmax kept for the backward, and their gradient
        return 3 * 4 * tokens * vocab + hidden
    rows, columns = tile_shape(tokens, vocab, width, device)
    tiles = 2 * 4 * rows * columns
    if path == "two-pass":
        return tiles + hidden
    rows, _ = block_shape(tokens, vocab, width, device)
    return 4 * rows * vocab + tiles + hidden + (4 * vocab * width if shapes.head_trains else 0)


def model_bytes(shapes: Shapes) -> int:
    """Parameters, gradients, AdamW's two moments and the backbone's activations (arXiv:2205.05198 Eq. 2 without the
    attention matrix, which no fused kernel stores)."""
    weights = shapes.parameters * shapes.parameter_bytes + 3 * shapes.trainable * shapes.parameter_bytes
    token = 17 * shapes.width * shapes.parameter_bytes
    kept = (
        token + shapes.layers * shapes.width * shapes.parameter_bytes if shapes.checkpointing else shapes.layers * token
    )
    return weights + int(shapes.padded_tokens * kept)


def predict(
    candidate: Candidate, sample: TokenSample, shapes: Shapes, unit: Mapping[str, float], device: torch.device
) -> list[Prediction]:
    """Every path that the objective can take; the one-pass path needs values that depend on their token alone."""
    one_pass = all(term.declaration.token_local and not term.needs_whole_step for term in candidate.terms)
    whole_step = any(term.prepares for term in candidate.terms) or (
        shapes.micro_batches > 1 and any(term.counts_weight for term in candidate.terms)
    )
    work = shapes.target_tokens * shapes.width * shapes.vocab
    forward = sample.backbone_seconds * shapes.padded_tokens
    found: list[Prediction] = []
    for path in UNITS if one_pass else ("dense", "two-pass"):
        head = unit[path] * work * (UNITS[path] + (_COUNTING_UNITS if whole_step else 0))
        backbone = forward * ((4 if shapes.checkpointing else 3) + (1 if whole_step else 0))
        memory = model_bytes(shapes) + head_bytes(path, shapes, device)
        found.append(Prediction(candidate.label, path, shapes.micro_batches * (backbone + head), memory))
    return found


def shapes_of(model: Any, sample: TokenSample, args: Any, *, trainable: int, head_trains: bool) -> Shapes:
    """The step that the trainer's arguments describe, filled with the sample's average micro-batch."""
    config = model.config.get_text_config()
    vocab, width = sample.head.weight.shape
    return Shapes(
        target_tokens=sample.logp.shape[0] / sample.batches,
        padded_tokens=sample.padded_tokens / sample.batches,
        micro_batches=args.gradient_accumulation_steps,
        width=width,
        vocab=vocab,
        layers=config.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=trainable,
        parameter_bytes=next(model.parameters()).element_size(),
        checkpointing=bool(getattr(args, "activation_checkpointing", False)),
        head_trains=head_trains,
    )
