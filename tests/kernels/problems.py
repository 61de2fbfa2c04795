"""Small seeded problems for the kernels, and what every test of them needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import DETACHED, STATISTICS, LMHead, VocabStatistics, vocab_statistics
from posttrain.kernels import block as block_module
from posttrain.kernels import kept as kept_module
from posttrain.kernels import mapping as mapping_module

DIFFERENTIABLE = tuple(name for name in STATISTICS if name not in DETACHED)


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of `vocab_statistics`."""

    hidden: Tensor
    head: LMHead
    targets: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        """Hidden states and the head's tensors: everything that wants a gradient."""
        tensors = [self.hidden, self.head.weight, self.head.bias, *(self.head.low_rank or ())]
        return [tensor for tensor in tensors if tensor is not None]

    def with_leaves(self, leaves: list[Tensor] | tuple[Tensor, ...]) -> "Problem":
        """The same problem about other tensors, in the order of `leaves`."""
        rest = list(leaves)
        hidden, weight = rest.pop(0), rest.pop(0)
        bias = None if self.head.bias is None else rest.pop(0)
        low_rank = None if self.head.low_rank is None else (rest.pop(0), rest.pop(0))
        return replace(self, hidden=hidden, head=replace(self.head, weight=weight, bias=bias, low_rank=low_rank))

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype, the teacher's too."""
        moved = self.with_leaves([leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves])
        hidden, head = self.options["teacher"]
        teacher = (hidden.to(dtype), replace(head, weight=head.weight.to(dtype)))
        return replace(moved, options={**self.options, "teacher": teacher})

    def statistics(self, *wanted: str, **options: Any) -> VocabStatistics:
        return vocab_statistics(self.hidden, self.head, self.targets, wanted, **{**self.options, **options})


def problem(
    tokens: int = 5,
    vocab: int = 11,
    width: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    rank: int = 0,
    temperature: float = 1.0,
) -> Problem:
    """Normal tensors such that logits are about `size` large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def leaf(*shape: int, factor: float = 1.0) -> Tensor:
        return normal(*shape, factor=factor).requires_grad_()

    head = LMHead(
        leaf(vocab, width, factor=size / width**0.5),
        leaf(vocab, factor=size) if bias else None,
        scale,
        softcap,
        (leaf(tokens, rank), leaf(vocab, rank, factor=size)) if rank else None,
    )
    options: dict[str, Any] = {
        "temperature": temperature,
        "ids": torch.randint(vocab, (tokens, 3), generator=generator),
        "k": min(3, vocab),
        "teacher": (normal(tokens, 3), LMHead(normal(vocab, 3, factor=size / 3**0.5))),
        "jsd_beta": 0.3,
    }
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return Problem(leaf(tokens, width), head, targets, options)


def mixed_loss(values: VocabStatistics, seed: int = 7) -> Tensor:
    """A random linear combination of everything differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (name, value) in enumerate(values.as_dict().items()):
        if name not in DETACHED:
            generator = torch.Generator().manual_seed(seed + i)
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (weight * value).sum()
    return total


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss by leaves, zero where they do not meet."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)


@contextmanager
def tiles(rows: int, columns: int) -> Iterator[None]:
    """Every kernel cuts its work into tiles of this size."""

    def shape(*_: object, **__: object) -> tuple[int, int]:
        return rows, columns

    places: list[tuple[Any, str]] = [
        (kept_module, "tile_shape"),
        (block_module, "block_shape"),
        (mapping_module, "block_shape"),
    ]
    originals: list[Callable[..., Any]] = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, shape)
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
