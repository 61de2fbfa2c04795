"""One pass of the base over a sample: target probabilities, and what a gradient tolerance would leave out."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from posttrain.diagnosis.tolerance import head_bounds
from posttrain.kernels import LMHead, vocab_statistics
from posttrain.kernels.tolerance import keep_rows
from posttrain.modeling import VocabRequest
from posttrain.prepared import PreparedRows
from posttrain.side import Side

TOLERANCES = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class TokenSample:
    """What the base makes of the sample's trained tokens.

    Args:
        logp: (tokens,) float64 on the CPU, nats.
        lengths: (sequences,) trained tokens of each.
        batches: micro-batches read.
        padded_tokens: tokens of all micro-batches, prompts and padding included.
        backbone_seconds: median over micro-batches of the forward's time per padded token, without the head.
        dropped: gradient tolerance -> share of trained tokens that it could leave out under ``nll``, micro-batch by
            micro-batch.
        hidden: (few, width) last hidden states of the first micro-batch, detached.
        targets: (few,) their tokens.
        head: the model's, detached.
    """

    logp: Float[Tensor, " tokens"]
    lengths: Int[Tensor, " sequences"]
    batches: int
    padded_tokens: int
    backbone_seconds: float
    dropped: Mapping[float, float]
    hidden: Float[Tensor, "few width"]
    targets: Int[Tensor, " few"]
    head: LMHead

    @property
    def side(self) -> Side:
        """The sample as one batch, for binding statistics; it has no positions."""
        tokens, sequences = self.logp.shape[0], self.lengths.shape[0]
        none, rows = torch.zeros(tokens, dtype=torch.long), torch.arange(sequences)
        return Side(none, none, self.lengths, rows, rows, {}, {}, tokens, sequences)


def read_sample(prepared: PreparedRows, *, batch_size: int, progress: bool = True) -> TokenSample:
    """Read prepared rows with the model that prepared them.

    Args:
        batch_size: rows of a micro-batch.

    Raises:
        ValueError: the model gives a token a log-probability that is not finite.
    """
    loader: DataLoader[Any] = DataLoader(prepared.dataset, batch_size=batch_size, collate_fn=prepared.collator)
    reader = _Reader(prepared.device)
    padded = 0
    lengths: list[Tensor] = []
    for batch in track(loader, description="Asking the base", disable=not progress):
        side: Side = batch["side"].to(prepared.device)
        inputs = {name: batch[name].to(prepared.device) for name in ("input_ids", "attention_mask")}
        request = VocabRequest(side.target_index, side.targets, compute=reader.bound_to(side.targets))
        reader.start(batch["input_ids"].numel())
        with torch.no_grad():
            prepared.model(**inputs, vocab_request=request)
        padded += batch["input_ids"].numel()
        lengths.append(side.lengths.cpu())
    logp = torch.cat(reader.logp)
    if not logp.isfinite().all():
        raise ValueError(
            "the model gives a token of the sample a log-probability of NaN or infinity; check its weights."
        )
    assert reader.first is not None
    hidden, targets, head = reader.first
    dropped = {tolerance: reader.dropped[tolerance] / logp.shape[0] for tolerance in TOLERANCES}
    seconds = float(np.median(reader.seconds[1:] or reader.seconds))
    return TokenSample(logp, torch.cat(lengths), len(lengths), padded, seconds, dropped, hidden, targets, head)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Reader:
    """Runs where the head's parameters are whole and keeps what it finds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.logp: list[Tensor] = []
        self.seconds: list[float] = []
        self.dropped = dict.fromkeys(TOLERANCES, 0)
        self.first: tuple[Tensor, Tensor, LMHead] | None = None
        self._started, self._tokens = 0.0, 1

    def start(self, tokens: int) -> None:
        synchronize(self.device)
        self._started, self._tokens = time.perf_counter(), tokens

    def bound_to(self, targets: Tensor) -> Any:
        return lambda hidden, head: self(hidden, head, targets)

    def __call__(self, hidden: Tensor, head: LMHead, targets: Tensor) -> Mapping[str, Tensor]:
        synchronize(self.device)
        self.seconds.append((time.perf_counter() - self._started) / self._tokens)
        hidden = hidden.detach()
        weight = head.weight.detach().requires_grad_()
        with torch.enable_grad():
            logp = vocab_statistics(hidden, dataclasses.replace(head, weight=weight), targets, ("logp",))["logp"]
            (gradient,) = torch.autograd.grad(logp.sum(), weight)
        norm = torch.linalg.vector_norm(gradient, dtype=logp.dtype)
        bounds = head_bounds(logp.detach(), hidden, scale=head.scale)
        for tolerance in TOLERANCES:
            self.dropped[tolerance] += int(keep_rows(bounds, tolerance * norm).logical_not().sum())
        self.logp.append(logp.detach().double().cpu())
        if self.first is None:
            low_rank = None if head.low_rank is None else (head.low_rank[0].detach(), head.low_rank[1].detach())
            kept = dataclasses.replace(head, weight=head.weight.detach(), low_rank=low_rank)
            self.first = hidden, targets, kept
        return {"logp": logp.detach()}


def quantiles(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """5, 25, 50, 75 and 95 % quantile."""
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {f"{level:g}": float(value) for level, value in zip(levels, np.quantile(values, levels), strict=True)}
