"""The truth of the numerical contract: statistics and gradients in float64, and what a few roundings may change."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels import DETACHED, LMHead
from tests.kernels.problems import Problem

# One rounding to float32, relative.
UNIT = 2.0**-24
# Of a value: that many roundings of every logit, taken with the value's derivatives by the logits, of the value itself,
# and of one. A logit is rounded relative to |hidden||weight|, which bounds the sum of the absolute products: dense
# float32 adds them in one order, a tiled kernel in another.
VALUE_ROUNDINGS = 4
# Of a gradient, in the Euclidean norm: that many roundings of every probability (relative, as large as those of the
# logits), of every product, and of its sum over vocabulary or tokens (which grow with the root of their number), as if
# the tokens' errors were independent. A token's share counts at least as much as in the gradient of logp, since
# gradients of other statistics are small differences of terms of that size.
GRADIENT_ROUNDINGS = 4
# Beside that a gradient may be as far off as the true one rounded once to the dtype of its tensor.

# Statistics whose gradient depends on which logits are the largest: undecided where those are a rounding apart.
SELECTIONS = {"max_logit", "max_nontarget_logit", "topk_logp", "topk_ids", "is_top1"}
# Logits of the truth that are held at once.
BLOCK = 1 << 23


def logits(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
    """z by its definition."""
    z = F.linear(hidden, head.weight, head.bias)
    if head.low_rank is not None:
        z = z + F.linear(*head.low_rank)
    z = head.scale * z
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / temperature


def upstream(given: Problem, name: str) -> Tensor:
    """The incoming gradient of a statistic: per token or, for several values a token, per value."""
    generator = torch.Generator().manual_seed(1)
    k = given.options["k"]
    columns = {"ids_logp": (3,), "topk_logp": (k,), "topk_ids": (k,)}.get(name, ())
    shape = (given.hidden.shape[0], *columns)
    weight = torch.rand(shape, generator=generator) + 0.5
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    # Far logits give large gradients, which fp16 cannot hold.
    largest = given.head.weight.detach().abs().amax().item()
    return (weight * sign).to(given.hidden.device) / max(1.0, largest)


def definitions(names: tuple[str, ...], z: Tensor, u: Tensor | None, given: Problem, rows: slice) -> dict[str, Tensor]:
    """The statistics of logits z, and of the teacher's u, by their definitions."""
    target, ids, k = given.targets[rows, None], given.options["ids"][rows], given.options["k"]
    beta = given.options["jsd_beta"]
    logp = z.log_softmax(-1)
    teacher = z if u is None else u.log_softmax(-1)

    def mean(weight: Tensor, values: Tensor) -> Tensor:
        return (weight.exp() * values).sum(-1)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return mean(first, first - second)

    def mixture() -> Tensor:
        return torch.logaddexp(teacher + math.log(beta), logp + math.log(1 - beta))

    table = {
        "logp": lambda: logp.gather(1, target)[:, 0],
        "logsumexp": lambda: z.logsumexp(-1),
        "entropy": lambda: -mean(logp, logp),
        "surprisal_variance": lambda: mean(logp, (logp - mean(logp, logp)[:, None]).square()),
        "log_sum_sq_probs": lambda: (2 * logp).logsumexp(-1),
        "mean_logit": lambda: z.mean(-1),
        "mean_square_logit": lambda: z.square().mean(-1),
        "max_logit": lambda: z.max(-1).values,
        "max_nontarget_logit": lambda: z.scatter(1, target, -torch.inf).max(-1).values,
        "is_top1": lambda: (z.argmax(-1) == target[:, 0]).to(z.dtype),
        "ids_logp": lambda: logp.gather(1, ids),
        "topk_logp": lambda: logp.gather(1, z.topk(k).indices),
        "topk_ids": lambda: z.topk(k).indices,
        "forward_kl": lambda: kl(teacher, logp),
        "reverse_kl": lambda: kl(logp, teacher),
        "jsd": lambda: beta * kl(teacher, mixture()) + (1 - beta) * kl(logp, mixture()),
        "teacher_logp": lambda: teacher.gather(1, target)[:, 0],
        "teacher_entropy": lambda: -mean(teacher, teacher),
    }
    return {name: table[name]() for name in names}


def sizes(hidden: Tensor, head: LMHead, temperature: float) -> tuple[float, float, float]:
    """Bounds of |hidden||weight| + ..., which a logit's roundings are relative to, and of |weight| and |B| alone."""

    def longest(tensor: Tensor) -> float:
        return tensor.detach().double().norm(dim=-1).amax().item()

    weight = longest(head.weight)
    size, matrix = longest(hidden) * weight, 0.0
    if head.bias is not None:
        size += head.bias.detach().abs().amax().item()
    if head.low_rank is not None:
        matrix = longest(head.low_rank[1])
        size += longest(head.low_rank[0]) * matrix
    return abs(head.scale) / temperature * size, weight, matrix


class Truth:
    """Values and gradients of a case in float64, and how much a few roundings may change them.

    Args:
        given: the case's numbers in float64.
        names: of the statistics.

    Attributes:
        values: by statistic.
        tolerances: of the values, per token.
        gradients: by differentiable statistic, in the order of `given.leaves`.
        gradient_tolerances: in the Euclidean norm, alike.
        decided: (tokens,) whether no two of the largest logits are within a rounding of each other.
    """

    def __init__(self, given: Problem, names: tuple[str, ...]) -> None:
        self.given, self.names = given, names
        self.temperature = given.options["temperature"]
        self.size, self.weight, self.matrix = sizes(given.hidden, given.head, self.temperature)
        self.teacher_size = sizes(*given.options["teacher"], self.temperature)[0]
        self.gradients: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(leaf) for leaf in given.leaves] for name in names if name not in DETACHED
        }
        squares = {name: torch.zeros(len(given.leaves), dtype=torch.float64) for name in self.gradients}
        parts = [self._block(rows, squares) for rows in self._blocks()]
        self.values = {name: torch.cat([part[0][name] for part in parts]) for name in names}
        self.tolerances = {name: torch.cat([part[1][name] for part in parts]) for name in names}
        self.decided = torch.cat([part[2] for part in parts])
        self.gradient_tolerances = {name: GRADIENT_ROUNDINGS * UNIT * square.sqrt() for name, square in squares.items()}

    def _blocks(self) -> Iterator[slice]:
        tokens, size = self.given.hidden.shape[0], max(1, BLOCK // self.given.head.weight.shape[0])
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))

    def _block(self, rows: slice, squares: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        given, head = self.given, self.given.head
        if head.low_rank is not None:
            head = replace(head, low_rank=(head.low_rank[0][rows], head.low_rank[1]))
        z = logits(given.hidden[rows], head, self.temperature)
        teacher_hidden, teacher_head = given.options["teacher"]
        u = None
        if "forward_kl" in self.names:
            u = logits(teacher_hidden[rows], teacher_head, self.temperature).requires_grad_()
        values = definitions(self.names, z, u, given, rows)
        decided = self._decided(z.detach())
        logp = values["logp"] if "logp" in values else definitions(("logp",), z.detach(), None, given, rows)["logp"]
        p_target = logp.detach().exp()
        tolerances = {}
        for name, value in values.items():
            weight = upstream(given, name)[rows].double()
            per_token = weight.abs().reshape(len(weight), -1).amax(1)
            spread = torch.zeros_like(p_target)
            if value.requires_grad:
                inputs = [tensor for tensor in (z, u) if tensor is not None]
                found = torch.autograd.grad(value, inputs, weight, retain_graph=True, materialize_grads=True)
                lengths = [dz.abs().sum(1) / per_token for dz in found]
                # Several values a token may cancel in the sum; each of them is a logp, with derivatives of length 2.
                spread = lengths[0] * self.size if value.ndim == 1 else torch.full_like(p_target, 2 * self.size)
                spread = spread + sum(length * self.teacher_size for length in lengths[1:])
                if name in self.gradients:
                    dz = found[0] * decided[:, None] if name in SELECTIONS else found[0]
                    self._propagate(name, z, dz, per_token * (1 - p_target), rows, squares[name])
            largest = value.detach().abs().reshape(len(value), -1).amax(1) if name != "topk_ids" else spread
            tolerances[name] = VALUE_ROUNDINGS * UNIT * (spread + largest + 1)
        return {name: value.detach() for name, value in values.items()}, tolerances, decided

    def _decided(self, z: Tensor) -> Tensor:
        if not SELECTIONS.intersection(self.names):
            return torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
        top = z.topk(min(self.given.options["k"] + 2, z.shape[1])).values
        return (top[:, :-1] - top[:, 1:] > 2 * VALUE_ROUNDINGS * UNIT * self.size).all(1)

    def _propagate(self, name: str, z: Tensor, dz: Tensor, usual: Tensor, rows: slice, squares: Tensor) -> None:
        """Adds a block's gradients, and per tensor the sum over tokens of the squared errors of one rounding each."""
        given, head = self.given, self.given.head
        factor = abs(head.scale) / self.temperature
        found = torch.autograd.grad(z, given.leaves, dz, retain_graph=True)
        by_token = (1 + self.size + head.weight.shape[0] ** 0.5) * torch.maximum(dz.abs().sum(1), 2 * usual)
        by_entry = (1 + self.size + given.hidden.shape[0] ** 0.5) * torch.maximum(dz.norm(dim=1), usual)
        shares = [by_token * self.weight, by_entry * given.hidden.detach()[rows].norm(dim=1)]
        if head.bias is not None:
            shares.append(by_entry)
        if head.low_rank is not None:
            shares += [by_token * self.matrix, by_entry * head.low_rank[0].detach()[rows].norm(dim=1)]
        for total, part in zip(self.gradients[name], found, strict=True):
            total += part
        squares += torch.stack([(factor * share).square().sum().cpu() for share in shares])
