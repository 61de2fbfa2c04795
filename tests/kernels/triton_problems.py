"""Tiles of logits with every difficulty, for the tests of the Triton kernels: on a GPU, or interpreted on a CPU."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from posttrain.kernels import LMHead
from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query, check_query

IDS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Logits:
    """z and the teacher's u of a few tokens, with targets and ids; numbers that float32 holds exactly."""

    z: Tensor
    u: Tensor
    targets: Tensor
    ids: Tensor
    cuts: tuple[int, ...]

    def query(self, *wanted: str, jsd_beta: float = 0.3) -> Query:
        """As `vocab_statistics` would ask; hidden states and head are there for their shapes."""
        tokens, vocab = self.z.shape
        hidden, head = torch.zeros(tokens, 1, device=DEVICE), LMHead(torch.zeros(vocab, 1, device=DEVICE))
        return check_query(
            hidden, head, self.targets, wanted, ids=self.ids, k=min(3, vocab), teacher=(hidden, head), jsd_beta=jsd_beta
        )

    def tiles(self) -> list[tuple[int, int]]:
        """First and last column of each tile."""
        ends = [0, *self.cuts, self.z.shape[1]]
        return list(pairwise(ends))

    def feed(self, accumulator: BlockAccumulator, dtype: torch.dtype = torch.float32) -> State:
        """What it collects out of views of the logits."""
        z, u = self.z.to(dtype), self.u.to(dtype)
        has_teacher = accumulator.teacher is not None
        for is_second in (False, True) if "jsd" in accumulator.needed else (False,):
            z_pass, u_pass = z.clone(), u.clone()
            for first, last in self.tiles():
                z_NV, u_NV = z_pass[:, first:last], u_pass[:, first:last]
                if is_second:
                    accumulator.update_mixture(z_NV, u_NV)
                else:
                    reads = z_NV if accumulator.reads_student else None
                    accumulator.update(reads, u_NV if has_teacher else None, first)
        return accumulator.state()


def logits(
    tokens: int = 5,
    vocab: int = 53,
    *,
    size: float = 1.0,
    seed: int = 0,
    cuts: tuple[int, ...] = (20, 21),
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Logits:
    """Normal logits times `size`, with ties for the maximum within and across tiles, and repeated ids."""
    generator = torch.Generator().manual_seed(seed)
    z, u = (size * torch.randn(tokens, vocab, generator=generator) for _ in range(2))
    if vocab > 30 and tokens > 0:
        z[0, 7] = z[0, 30] = z[0, 8] = z[0].max() + size
    if softcap is not None:
        z = softcap * (z / softcap).tanh() / temperature
    targets = torch.randint(vocab, (tokens,), generator=generator)
    if tokens > 0:
        targets[0] = min(7, vocab - 1)
    ids = torch.randint(vocab, (tokens, IDS), generator=generator)
    ids[:, 1] = ids[:, 0]
    return Logits(
        z.to(DEVICE), u.to(DEVICE), targets.to(DEVICE), ids.to(DEVICE), cuts if vocab > max(cuts, default=0) else ()
    )
