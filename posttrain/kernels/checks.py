"""What a caller may ask of the kernels, checked before any work and without waiting for a device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TypedDict

import torch
from torch import Tensor

from posttrain.kernels.backends import resolve_backend
from posttrain.kernels.budget import budget_bytes, check_savings
from posttrain.kernels.head import LMHead
from posttrain.kernels.table import STATISTICS, TEACHER_STATISTICS, VocabStatistics, nearest

Teacher = tuple[Tensor, LMHead]


class Options(TypedDict, total=False):
    """The keyword options that `vocab_statistics` and `vocab_loss` share; explained at `vocab_statistics`."""

    temperature: float
    ids: Tensor | None
    k: int | None
    teacher: Teacher | None
    jsd_beta: float
    gradient_tolerance: float
    budget: int | str | None
    backend: str


@dataclass(frozen=True, eq=False)
class Query:
    """A checked question about the distributions of (hidden, head)."""

    wanted: tuple[str, ...]
    targets: Tensor
    temperature: float
    ids: Tensor | None
    k: int | None
    teacher: Teacher | None
    jsd_beta: float
    gradient_tolerance: float
    budget: int | None
    backend: str

    @property
    def needed(self) -> tuple[str, ...]:
        """What has to be computed, each once: at its ends `jsd_beta` makes the jsd one of the plain divergences."""
        return tuple(dict.fromkeys(self._computed_as(name) for name in self.wanted))

    def rows(self, rows: slice | Tensor) -> "Query":
        """The same question about some of the tokens, a slice or their indices; the teacher stays as it is."""
        ids = None if self.ids is None else self.ids[rows]
        return replace(self, targets=self.targets[rows], ids=ids)

    def without(self, name: str) -> "Query":
        """The same question less one statistic."""
        return replace(self, wanted=tuple(wanted for wanted in self.wanted if wanted != name))

    def answer(self, values: Mapping[str, Tensor]) -> VocabStatistics:
        """The wanted statistics out of the needed ones."""
        return VocabStatistics(**{name: values[self._computed_as(name)] for name in self.wanted})

    def _computed_as(self, name: str) -> str:
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return ends.get(self.jsd_beta, name) if name == "jsd" else name


def check_query(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    wanted: Iterable[str],
    *,
    temperature: float = 1.0,
    ids: Tensor | None = None,
    k: int | None = None,
    teacher: Teacher | None = None,
    jsd_beta: float = 0.5,
    gradient_tolerance: float = 0.0,
    budget: int | str | None = None,
    backend: str = "auto",
) -> Query:
    """The arguments as a `Query`, with `backend` resolved and only the options that `wanted` needs.

    Raises:
        ValueError: an argument is malformed or missing; the message names it and what to do.
    """
    names = _check_names(wanted)
    check_head(hidden, head, temperature)
    vocab, device = head.vocab, hidden.device
    backend = resolve_backend(backend, device)
    if head.shard is not None:
        backend = check_shard(head, teacher, backend, gradient_tolerance)
    check_savings(gradient_tolerance, budget)
    if backend == "dense" and (gradient_tolerance > 0 or budget is not None):
        raise ValueError(
            f"backend 'dense' holds all logits and skips nothing, found gradient_tolerance {gradient_tolerance!r} and "
            f"budget {budget!r}; leave them at 0.0 and None or take backend 'streamed'"
        )
    if targets.ndim != 1 or targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"targets must be (tokens,) = ({hidden.shape[0]},), found {tuple(targets.shape)}")
    targets = _check_ids("targets", targets, vocab, device)
    if "ids_logp" in names:
        if ids is None:
            raise ValueError("ids_logp needs ids=, a (tokens, n) tensor of vocabulary ids")
        if ids.ndim != 2 or ids.shape[0] != hidden.shape[0]:
            raise ValueError(f"ids must be (tokens, n) with tokens = {hidden.shape[0]}, found {tuple(ids.shape)}")
        ids = _check_ids("ids", ids, vocab, device)
    if "topk_logp" in names or "topk_ids" in names:
        if k is None:
            raise ValueError("topk_logp and topk_ids need k=, how many of the most likely tokens to return")
        if not 1 <= k <= vocab:
            raise ValueError(f"k must lie between 1 and the vocabulary size {vocab}, found {k}")
    if TEACHER_STATISTICS.intersection(names):
        _check_teacher(hidden, vocab, teacher, temperature, jsd_beta, names)
    else:
        teacher = None
    ids = ids if "ids_logp" in names else None
    size = budget_bytes(
        budget, tokens=hidden.shape[0], vocab=head.weight.shape[0], models=1 if teacher is None else 2, device=device
    )
    return Query(names, targets, temperature, ids, k, teacher, jsd_beta, gradient_tolerance, size, backend)


def check_head(hidden: Tensor, head: LMHead, temperature: float, owner: str = "") -> None:
    """Hidden states and head belong together; `owner` says in the message whose they are."""
    if hidden.ndim != 2:
        raise ValueError(f"{owner}hidden must be (tokens, width), found {tuple(hidden.shape)}")
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[1] or head.weight.shape[0] == 0:
        raise ValueError(
            f"{owner}head.weight must be (vocab, width) with width {hidden.shape[1]} of hidden "
            f"{tuple(hidden.shape)}, found {tuple(head.weight.shape)}"
        )
    vocab = head.weight.shape[0]
    tensors = {"hidden": hidden, "head.weight": head.weight}
    if head.bias is not None:
        if head.bias.shape != (vocab,):
            raise ValueError(f"{owner}head.bias must be (vocab,) = ({vocab},), found {tuple(head.bias.shape)}")
        tensors["head.bias"] = head.bias
    if head.low_rank is not None:
        hidden2, matrix = head.low_rank
        tensors |= {"head.low_rank[0]": hidden2, "head.low_rank[1]": matrix}
        rank = hidden2.shape[-1]
        if hidden2.shape != (hidden.shape[0], rank) or matrix.shape != (vocab, rank):
            raise ValueError(
                f"{owner}head.low_rank must be (tokens, rank) and (vocab, rank) with tokens {hidden.shape[0]} and "
                f"vocab {vocab}, found {tuple(hidden2.shape)} and {tuple(matrix.shape)}"
            )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{owner}{name} must be floating point, found {tensor.dtype} of {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{owner}{name} {tuple(tensor.shape)} is on {tensor.device} but hidden {tuple(hidden.shape)} on "
                f"{hidden.device}; move them together"
            )
    if not (isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"{owner}head.softcap must be positive or None, found {head.softcap}")


def _check_names(wanted: Iterable[str]) -> tuple[str, ...]:
    if isinstance(wanted, str):
        raise ValueError(f"wanted must be a sequence of names, found the string {wanted!r}; write ({wanted!r},)")
    names = tuple(wanted)
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; {nearest(name, STATISTICS)}")
    return names


def _check_ids(name: str, ids: Tensor, vocab: int, device: torch.device) -> Tensor:
    """The ids as int64. Out of range, they raise on a CPU and fail an assertion on the device, later, elsewhere."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, found {ids.dtype} of {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} {tuple(ids.shape)} is on {ids.device} but hidden on {device}; move them together")
    if ids.device.type == "cpu" and ids.numel() > 0:
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{name} must lie in [0, {vocab}), found values from {low} to {high}; drop ignored positions before"
            )
    elif ids.device.type == "cuda" and ids.numel() > 0:
        torch._assert_async(((ids >= 0) & (ids < vocab)).all(), f"{name} must lie in [0, {vocab})")
    return ids.long()


def _check_teacher(
    hidden: Tensor, vocab: int, teacher: Teacher | None, temperature: float, jsd_beta: float, names: tuple[str, ...]
) -> None:
    if teacher is None:
        asked = ", ".join(name for name in names if name in TEACHER_STATISTICS)
        raise ValueError(f"{asked} needs teacher=(hidden, head) of the teacher at the same tokens")
    teacher_hidden, teacher_head = teacher
    check_head(teacher_hidden, teacher_head, temperature, owner="teacher ")
    if teacher_hidden.shape[0] != hidden.shape[0] or teacher_head.vocab != vocab:
        raise ValueError(
            f"the teacher must have {hidden.shape[0]} tokens and {vocab} vocabulary entries like the student, found "
            f"{teacher_hidden.shape[0]} and {teacher_head.vocab}"
        )
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"the teacher {tuple(teacher_hidden.shape)} is on {teacher_hidden.device} but hidden {tuple(hidden.shape)} "
            f"on {hidden.device}; move them together"
        )
    if "jsd" in names and not 0.0 <= jsd_beta <= 1.0:
        raise ValueError(f"jsd_beta must lie in [0, 1], found {jsd_beta}")


def check_shard(head: LMHead, teacher: Teacher | None, backend: str, gradient_tolerance: float) -> str:
    """The backend for a head that is spread over processes.

    Raises:
        ValueError: the slice does not lie in the vocabulary, the teacher's is another, or what is asked for needs the
            whole head in one place.
    """
    shard, own = head.shard, head.weight.shape[0]
    assert shard is not None
    if not 0 <= shard.start <= shard.start + own <= shard.vocab:
        raise ValueError(
            f"head.shard starts at {shard.start} with {own} entries, beyond its vocabulary of {shard.vocab}"
        )
    if backend == "dense" or gradient_tolerance > 0:
        raise ValueError(
            "a head spread over processes has neither backend 'dense' nor gradient_tolerance, found backend "
            f"{backend!r} and gradient_tolerance {gradient_tolerance}; take 'streamed' and 0.0"
        )
    other = None if teacher is None else teacher[1].shard
    if teacher is not None and (other is None or (other.start, other.vocab) != (shard.start, shard.vocab)):
        raise ValueError("the teacher's head must be spread over the same processes in the same slices")
    return "streamed"


def check_per_token(hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, each with one entry per token and on the device of the hidden states."""
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"a per-token tensor must have {hidden.shape[0]} entries, found shape {tuple(tensor.shape)}"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"a per-token tensor is on {tensor.device} but hidden on {hidden.device}; move it there")
    return tensors
