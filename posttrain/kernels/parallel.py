"""A head whose vocabulary is spread over processes: each sums over its slice, and the sums are joined exactly.

Hidden states, targets and incoming gradients are the same on every process of the group, as in tensor parallelism.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.accumulation import State
from posttrain.kernels.head import VocabShard


def merge_over_ranks(state: State, shard: VocabShard | None, k: int | None) -> State:
    """The state of the whole vocabulary from each rank's state of its slice; two collectives, one per kind of dtype.

    Args:
        state: of this rank's slice.
        shard: None where there is but one.
        k: of the top k, of which a small slice has found fewer.
    """
    if shard is None or not state:
        return state
    if "topk_logit" in state and k is not None:
        missing = (0, k - state["topk_logit"].shape[1])
        padded = {"topk_logit": (state["topk_logit"], -torch.inf), "topk_ids": (state["topk_ids"], -1)}
        state = state | {name: F.pad(value, missing, value=fill) for name, (value, fill) in padded.items()}
    ranks: list[State] = [{} for _ in range(dist.get_world_size(shard.group))]
    for floating in (True, False):
        names = [name for name, value in state.items() if value.is_floating_point() == floating]
        if not names:
            continue
        flat = torch.cat([state[name].flatten() for name in names])
        gathered = [torch.empty_like(flat) for _ in ranks]
        dist.all_gather(gathered, flat, group=shard.group)
        sizes = [state[name].numel() for name in names]
        for found, everything in zip(ranks, gathered, strict=True):
            parts = zip(names, everything.split(sizes), strict=True)
            found |= {name: part.view_as(state[name]) for name, part in parts}
    return merge_states(ranks)


def sum_over_ranks(tensors: Sequence[Tensor | None], shard: VocabShard | None) -> None:
    """Adds up, in place, what each rank found for the same tokens."""
    if shard is None:
        return
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor, group=shard.group)


def merge_states(states: Sequence[State]) -> State:
    """One state out of those of consecutive slices of the vocabulary, in their order."""
    merged: State = {}
    every = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    for name in ("target_logit", "ids_logit", "teacher_target_logit"):
        if name in every:
            merged[name] = _only(every[name])
    for name in ("sum", "sum_square"):
        if name in every:
            merged[name] = every[name].sum(0)
    for name in ("largest", "other"):
        if name in every:
            merged |= _largest(every[name], every[f"{name}_index"], name)
    if "topk_logit" in every:
        merged |= _topk(states)
    for prefix in ("", "teacher_"):
        if f"{prefix}total" in every:
            merged |= _softmax(every, prefix)
    if "forward_difference" in every or "reverse_difference" in every:
        merged |= _differences(every, merged)
    return merged


def _only(values: Tensor) -> Tensor:
    """What the one rank that has it found; the others have nan."""
    result = values[0]
    for value in values[1:]:
        result = torch.where(result.isnan(), value, result)
    return result


def _largest(values: Tensor, index: Tensor, name: str) -> State:
    value, place = values[0], index[0]
    for other, other_place in zip(values[1:], index[1:], strict=True):
        place = torch.where(other > value, other_place, place)
        value = torch.maximum(value, other)
    return {name: value, f"{name}_index": place}


def _topk(states: Sequence[State]) -> State:
    """The k largest of all."""
    logits = torch.cat([state["topk_logit"] for state in states], 1)
    ids = torch.cat([state["topk_ids"] for state in states], 1)
    logits, order = logits.topk(states[0]["topk_logit"].shape[1], dim=1)
    return {"topk_logit": logits, "topk_ids": ids.gather(1, order)}


def _softmax(every: State, prefix: str) -> State:
    """Maximum, total and moments, each slice's moved to the common maximum."""
    maximum = every[f"{prefix}maximum"].amax(0)
    fall = every[f"{prefix}maximum"] - maximum
    weight = every[f"{prefix}total"] * fall.exp()
    total = weight.sum(0)
    merged = {f"{prefix}maximum": maximum, f"{prefix}total": total}
    share = weight / total
    if f"{prefix}mean" in every:
        means = _where_any(share, every[f"{prefix}mean"] + fall)
        mean = (share * means).sum(0)
        merged[f"{prefix}mean"] = mean
        if f"{prefix}variance" in every:
            variance = every[f"{prefix}variance"] + _where_any(share, means - mean).square()
            merged[f"{prefix}variance"] = (share * variance).sum(0)
    if f"{prefix}squares" in every:
        merged[f"{prefix}squares"] = (every[f"{prefix}squares"] * (2 * fall).exp()).sum(0)
    return merged


def _differences(every: State, merged: State) -> State:
    """The means of x - w under either distribution, with x and w seen from the common maxima."""
    fall = every["maximum"] - merged["maximum"]
    teacher_fall = every["teacher_maximum"] - merged["teacher_maximum"]
    found: State = {}
    for name, prefix, apart in (
        ("forward_difference", "teacher_", teacher_fall - fall),
        ("reverse_difference", "", fall - teacher_fall),
    ):
        if name in every:
            own_fall = teacher_fall if prefix else fall
            share = every[f"{prefix}total"] * own_fall.exp() / merged[f"{prefix}total"]
            found[name] = (share * _where_any(share, every[name] + apart)).sum(0)
    return found


def _where_any(share: Tensor, values: Tensor) -> Tensor:
    """The values, 0 where a slice has no share: there they may be infinite."""
    return torch.where(share > 0, values, 0.0)
