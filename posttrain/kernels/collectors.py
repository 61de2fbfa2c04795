"""What one pass over the vocabulary collects for each token: running maxima, sums and picks.

Suffixes: N tokens of a tile, V vocabulary entries of a tile, K picks per token. A collector sees the tiles of a token
in the order of the vocabulary. Tiles of z are overwritten by the last collector that reads them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def local_picks(ids_NK: Int[Tensor, "rows k"], start: int, size: int) -> tuple[Tensor, Tensor]:
    """Where global ids lie in the tile that starts at `start` (any valid place if outside), and whether they do."""
    local_NK = ids_NK - start
    inside_NK = (local_NK >= 0) & (local_NK < size)
    return local_NK.clamp_(0, size - 1), inside_NK


class Picked:
    """z at given ids. An id outside the vocabulary leaves nan."""

    def __init__(self, ids_NK: Int[Tensor, "rows k"], dtype: torch.dtype) -> None:
        self.ids_NK = ids_NK
        self.values_NK = torch.full(ids_NK.shape, torch.nan, dtype=dtype, device=ids_NK.device)

    def update(self, z_NV: Float[Tensor, "rows columns"], start: int) -> None:
        local_NK, inside_NK = local_picks(self.ids_NK, start, z_NV.shape[1])
        self.values_NK = torch.where(inside_NK, z_NV.gather(1, local_NK), self.values_NK)


class Largest:
    """The largest z and its first place."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.value_N = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.index_N = torch.full((rows,), -1, dtype=torch.int64, device=device)

    def update(self, z_NV: Float[Tensor, "rows columns"], start: int) -> None:
        top_N, place_N = z_NV.max(1)
        self.index_N = torch.where(top_N > self.value_N, place_N + start, self.index_N)
        self.value_N = torch.maximum(self.value_N, top_N)


class LargestOther(Largest):
    """The largest z that is not the target's."""

    def __init__(self, targets_N: Int[Tensor, " rows"], dtype: torch.dtype) -> None:
        super().__init__(targets_N.shape[0], dtype, targets_N.device)
        self.targets_NK = targets_N[:, None]

    def update(self, z_NV: Float[Tensor, "rows columns"], start: int) -> None:
        local_NK, inside_NK = local_picks(self.targets_NK, start, z_NV.shape[1])
        hidden_NK = z_NV.gather(1, local_NK)
        # Taken out of the tile and put back, which spares a copy of it.
        z_NV.scatter_(1, local_NK, torch.where(inside_NK, -torch.inf, hidden_NK))
        super().update(z_NV, start)
        z_NV.scatter_(1, local_NK, hidden_NK)


class TopK:
    """The k largest z, falling, and their ids."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values_NK: Tensor | None = None
        self.ids_NK: Tensor | None = None

    def update(self, z_NV: Float[Tensor, "rows columns"], start: int) -> None:
        values_NK, ids_NK = z_NV.topk(min(self.k, z_NV.shape[1]), dim=1)
        ids_NK = ids_NK + start
        if self.values_NK is not None and self.ids_NK is not None:
            values_NK = torch.cat([self.values_NK, values_NK], 1)
            ids_NK = torch.cat([self.ids_NK, ids_NK], 1)
            values_NK, order_NK = values_NK.topk(min(self.k, values_NK.shape[1]), dim=1)
            ids_NK = ids_NK.gather(1, order_NK)
        self.values_NK, self.ids_NK = values_NK, ids_NK


class Shifted(NamedTuple):
    """A tile as seen from the running maximum m.

    Args:
        x_NV: z - m; overwritten by e where it was not to be kept.
        e_NV: exp(z - m).
        fall_N: the maximum before this tile less the one after, <= 0.
        decay_N: exp of it, by which earlier sums shrink.
    """

    x_NV: Tensor
    e_NV: Tensor
    fall_N: Tensor
    decay_N: Tensor


class Softmax:
    """Online softmax: the maximum m, the sum of exp(z - m), and moments of z - m under these weights.

    All moments are of z - m, which keeps their digits when the logits are large: entropy and divergences are small
    differences of numbers of the size of z. The variance is merged from the tiles' own variances (Chan, Golub and
    LeVeque 1983), so that it is never the difference of two large squares and never negative.
    """

    def __init__(self, *, mean: bool, variance: bool, squares: bool) -> None:
        self.with_mean, self.with_variance, self.with_squares = mean or variance, variance, squares
        self.started = False
        self.maximum_N: Tensor
        self.total_N: Tensor
        self.first_N: Tensor
        self.spread_N: Tensor
        self.squares_N: Tensor

    def update(self, z_NV: Float[Tensor, "rows columns"], *, keep: bool) -> Shifted:
        """Overwrites z; `keep` says whether z - m is of use to the caller."""
        # A token that is ruled out has z = -inf; a maximum of -inf would make nan of it.
        top_N = z_NV.amax(1).clamp_min_(torch.finfo(z_NV.dtype).min)
        maximum_N = torch.maximum(self.maximum_N, top_N) if self.started else top_N
        fall_N = self.maximum_N - maximum_N if self.started else torch.zeros_like(top_N)
        decay_N = fall_N.exp()
        keep = keep or self.with_mean
        x_NV = z_NV.sub_(maximum_N[:, None])
        e_NV = x_NV.exp() if keep else x_NV.exp_()
        weight_N = e_NV.sum(1)
        self._merge(x_NV, e_NV, weight_N, fall_N, decay_N)
        self.maximum_N, self.started = maximum_N, True
        return Shifted(x_NV, e_NV, fall_N, decay_N)

    def _merge(self, x_NV: Tensor, e_NV: Tensor, weight_N: Tensor, fall_N: Tensor, decay_N: Tensor) -> None:
        before_N = self.total_N * decay_N if self.started else torch.zeros_like(weight_N)
        if self.with_mean:
            tile_first_N = (e_NV * x_NV).sum(1)
            first_N = self.first_N * decay_N + fall_N * before_N if self.started else torch.zeros_like(weight_N)
            if self.with_variance:
                tiny = torch.finfo(weight_N.dtype).tiny
                tile_mean_N = tile_first_N / weight_N.clamp_min(tiny)
                tile_spread_N = (x_NV - tile_mean_N[:, None]).square_().mul_(e_NV).sum(1)
                apart_N = first_N / before_N.clamp_min(tiny) - tile_mean_N
                between_N = apart_N.square() * (before_N * weight_N / (before_N + weight_N).clamp_min(tiny))
                spread_N = self.spread_N * decay_N if self.started else torch.zeros_like(weight_N)
                self.spread_N = spread_N + tile_spread_N + between_N
            self.first_N = first_N + tile_first_N
        if self.with_squares:
            squares_N = self.squares_N * decay_N.square() if self.started else torch.zeros_like(weight_N)
            self.squares_N = squares_N + e_NV.square().sum(1)
        self.total_N = before_N + weight_N

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The collected sums by name."""
        state = {f"{prefix}maximum": self.maximum_N, f"{prefix}total": self.total_N}
        if self.with_mean:
            state[f"{prefix}mean"] = self.first_N / self.total_N
        if self.with_variance:
            state[f"{prefix}variance"] = self.spread_N / self.total_N
        if self.with_squares:
            state[f"{prefix}squares"] = self.squares_N
        return state


class Difference:
    """Sum of e * (x - x'), where x = z - m and x' = z' - m' are the shifted logits of two models, e one's weights."""

    def __init__(self) -> None:
        self.sum_N: Tensor | None = None

    def update(
        self, e_NV: Tensor, apart_NV: Tensor, total_before_N: Tensor | None, decay_N: Tensor, fall_N: Tensor
    ) -> None:
        """Adds a tile; `total_before_N` is the sum of e before it, `fall_N` the fall of m less that of m'."""
        tile_N = (e_NV * apart_NV).sum(1)
        if self.sum_N is not None and total_before_N is not None:
            tile_N += (self.sum_N + fall_N * total_before_N) * decay_N
        self.sum_N = tile_N
