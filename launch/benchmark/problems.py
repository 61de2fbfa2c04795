"""Hidden states, head and targets whose target probabilities are chosen, as they are after post-training."""

from dataclasses import dataclass, replace
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

THRESHOLD = 0.2
PAIRS = 4
IDS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of one head and batch; `name` is the model they come from."""

    name: str
    tokens: int
    width: int
    vocab: int

    @property
    def reduced(self) -> "Shape":
        """Small enough for float64 logits, and ragged against every tile size."""
        return Shape(self.name, min(self.tokens, 96), min(self.width, 256), min(self.vocab, 4099))


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch of tokens before the head.

    Args:
        hidden, weight: the leaves that gradients are taken of.
        targets: target ids.
        ids: ids that are asked for beside the target.
        upstream: a constant factor per token, of both signs.
        reference: per pair, the reference's summed logp of chosen and of rejected. They are equal within a pair, so
            that Liger's preference loss, which takes no constants, computes the same loss without a reference model.
        teacher_hidden, teacher_weight: constants, where the case has a teacher.
    """

    hidden: Float[Tensor, "tokens width"]
    weight: Float[Tensor, "vocab width"]
    targets: Int[Tensor, " tokens"]
    ids: Int[Tensor, "tokens ids"]
    upstream: Float[Tensor, " tokens"]
    reference: Float[Tensor, "pairs 2"]
    teacher_hidden: Float[Tensor, "tokens width"] | None = None
    teacher_weight: Float[Tensor, "vocab width"] | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def double(self) -> "Problem":
        """The same numbers in float64."""
        teacher = (None if t is None else t.double() for t in (self.teacher_hidden, self.teacher_weight))
        teacher_hidden, teacher_weight = teacher
        hidden, weight = (leaf.detach().double().requires_grad_() for leaf in self.leaves)
        return replace(
            self,
            hidden=hidden,
            weight=weight,
            upstream=self.upstream.double(),
            reference=self.reference.double(),
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
        )


def make_probabilities(tokens: int, live_share: float, *, seed: int = 0) -> Float[Tensor, " tokens"]:
    """Target probabilities of which `live_share` lie above the threshold, most of these near one, in random order.

    None lies so near the threshold that rounding could move it across.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, generator=generator)
    live = 0.98 - 0.68 * uniform.square()
    dead = torch.exp(log(1e-4) + (log(0.6 * THRESHOLD) - log(1e-4)) * uniform)
    kept = torch.arange(tokens) < round(live_share * tokens)
    return torch.where(kept, live, dead)[torch.randperm(tokens, generator=generator)]


def resample(probabilities: Float[Tensor, " rows"], tokens: int, *, seed: int = 0) -> Float[Tensor, " tokens"]:
    """`tokens` of the given probabilities, drawn with replacement only where there are too few."""
    generator = torch.Generator().manual_seed(seed)
    rows = probabilities.numel()
    chosen = torch.randperm(rows, generator=generator)[:tokens]
    if rows < tokens:
        chosen = torch.randint(rows, (tokens,), generator=generator)
    return probabilities[chosen].clamp(1e-6, 1 - 1e-4)


def make_problem(
    shape: Shape,
    probabilities: Float[Tensor, " tokens"],
    *,
    dtype: torch.dtype,
    device: torch.device,
    teacher: bool = False,
    weight: Float[Tensor, "vocab width"] | None = None,
    seed: int = 0,
) -> Problem:
    """A problem in which each target has about the given probability.

    The entries of the weight are normal with variance 1 / width, so the other logits of a hidden state h are normal
    with variance |h|² / width and log sum exp of them is close to log(vocab - 1) + |h|² / (2 width). With h = r + a ŵ,
    where r is orthogonal to the target's unit row ŵ, the probability fixes a by a quadratic equation.

    Args:
        weight: the head of another problem, to share it; a new one where None.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, size: float) -> Tensor:
        return size * torch.randn(rows, shape.width, generator=generator, device=device)

    if weight is None:
        weight = normal(shape.vocab, shape.width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    rows = weight.detach()[targets].float()
    norm = rows.norm(dim=1)
    unit = rows / norm[:, None]
    rest = normal(shape.tokens, 1.0)
    rest -= (rest * unit).sum(1, keepdim=True) * unit
    p = probabilities.to(device)
    gap = torch.logit(p) + log(max(shape.vocab - 1, 1)) + rest.square().sum(1) / (2 * shape.width)
    length = shape.width * (norm - (norm.square() - 2 * gap / shape.width).clamp(min=0.01).sqrt())
    hidden = (rest + length[:, None] * unit).to(dtype).requires_grad_()
    noise = 0.3 * shape.width**-0.5
    reference = torch.log(p).sum() / PAIRS / 2 * torch.ones(PAIRS, 2, device=device)
    return Problem(
        hidden,
        weight,
        targets,
        ids=torch.randint(shape.vocab, (shape.tokens, IDS), generator=generator, device=device),
        upstream=torch.randn(shape.tokens, generator=generator, device=device),
        reference=reference,
        teacher_hidden=hidden.detach().clone() if teacher else None,
        teacher_weight=(weight.detach().float() + normal(shape.vocab, noise)).to(dtype) if teacher else None,
    )
