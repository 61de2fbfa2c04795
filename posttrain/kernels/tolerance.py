"""A backward that leaves out rows whose contribution is provably small, and says by how much it may be off.

For a gradient w through log p_y alone, a token's dz is g = w (e_y - p) with ||g||_2 <= sqrt(2) |w| (1 - p_y) and
||g||_1 = 2 |w| (1 - p_y), times |scale| / temperature (a softcap's slope is at most 1). The gradient of the head (its
weight, bias and adapter taken together) is the sum over tokens of g times the token's row r = (hidden, 1, hidden2), so
leaving a token out costs at most ||g||_2 ||r||; a hidden row's gradient is at most ||g||_1 max_k ||w_k||.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.kernels.accumulation import State
from posttrain.kernels.checks import Query
from posttrain.kernels.kept import KeptTiles, Models
from posttrain.kernels.passes import propagate
from posttrain.kernels.projection import HeadTensors, Projection
from posttrain.kernels.tiling import slices

# The norm of the gradient is only known after the backward. Rows are chosen by an estimate of it, and this share of
# what the tolerance would allow is used, so that the check afterwards seldom fails.
_MARGIN = 0.5


@dataclass(frozen=True)
class Certificate:
    """What a backward with a gradient tolerance left out.

    Args:
        rows: tokens of the backward.
        dropped: 0-d, tokens left out.
        head_bound: 0-d, bound on the relative error of the head's gradient; 0 where the head has none.
        hidden_bound: 0-d, bound on the relative error of the hidden states' gradient; 0 where they have none.
    """

    rows: int
    dropped: Tensor
    head_bound: Tensor
    hidden_bound: Tensor


Recorder = tuple[list[Certificate], ...]
_recorders: list[list[Certificate]] = []


@contextmanager
def record_certificates() -> Iterator[list[Certificate]]:
    """A list to which every forward made within adds one `Certificate` when its backward has run.

    Only forwards with ``gradient_tolerance`` > 0 do, and each certificate speaks of the gradient of that one call: of a
    micro-batch on a rank, and of the head's share where the head is tied to the embedding. The backward may run after
    the ``with``, and on another thread. Under reentrant checkpointing the forward that counts runs in the backward.
    """
    found: list[Certificate] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.pop()


def active_recorder() -> Recorder:
    """The lists that a forward made now belongs to."""
    return tuple(_recorders)


def keep_rows(bounds: Float[Tensor, " rows"], allowed: Float[Tensor, ""]) -> Bool[Tensor, " rows"]:
    """False for as many rows as possible, the smallest first, while their bounds sum to at most `allowed`."""
    order = bounds.argsort(stable=True)
    keep = torch.empty_like(bounds, dtype=torch.bool)
    keep[order] = bounds[order].double().cumsum(0) > allowed
    return keep


def propagate_within(
    models: Models,
    query: Query,
    arrived: Mapping[str, Tensor],
    state: State,
    kept: KeptTiles,
    needs: Sequence[bool],
    recorder: Recorder,
) -> tuple[Tensor | None, ...]:
    """`propagate` without the rows that ``query.gradient_tolerance`` allows to leave out.

    They are chosen by an estimate of the gradient's norm. Where the norm of what was kept turns out too small for them,
    they are chosen again by that norm and the others are put back; where that fails as well, all of them are.
    """
    tolerance = query.gradient_tolerance
    bounds = _Bounds(models.student, query, arrived, state, needs, models.tile_shape[1])

    def through(rows: Bool[Tensor, " tokens"]) -> tuple[Tensor | None, ...]:
        return propagate(models, query, arrived, state, kept, needs, index=rows.nonzero()[:, 0])

    keep = bounds.choose(tolerance, bounds.estimated_norm())
    gradients = through(keep)
    for is_last in (False, True):
        certificate = bounds.certify(keep, gradients)
        governing = certificate.head_bound if bounds.has_head else certificate.hidden_bound
        if bool(governing <= tolerance):
            break
        chosen = torch.ones_like(keep) if is_last else keep | bounds.choose(tolerance, bounds.norm(gradients))
        back = through(chosen & ~keep)
        gradients = tuple(None if a is None or b is None else a.add_(b) for a, b in zip(gradients, back, strict=True))
        keep = chosen
    else:
        certificate = bounds.certify(keep, gradients)
    for certificates in recorder:
        certificates.append(certificate)
    return gradients


class _Bounds:
    """What each token can contribute at most, by norms; a token with a gradient through more than logp is unbounded.

    Args:
        student: hidden states and head.
        query, arrived, state, needs: as in `propagate`.
        columns_size: vocabulary entries of a tile.
    """

    def __init__(
        self,
        student: Projection,
        query: Query,
        arrived: Mapping[str, Tensor],
        state: State,
        needs: Sequence[bool],
        columns_size: int,
    ) -> None:
        self.student, self.targets = student, query.targets
        self.tensors = student.tensors
        wants = HeadTensors(*needs)  # type: ignore[arg-type]
        self.has_hidden = bool(wants.hidden or wants.hidden2)
        parts = {"weight": wants.weight, "bias": wants.bias, "matrix": wants.matrix}
        self.head = tuple(name for name, wanted in parts.items() if wanted and getattr(self.tensors, name) is not None)
        self.has_head = bool(self.head)
        self.size = _size(student, arrived, state, vocab_tiles=-(-student.vocab // columns_size))
        others = [gradient for name, gradient in arrived.items() if name != "logp"]
        for gradient in others:
            is_there = gradient != 0 if gradient.ndim == 1 else (gradient != 0).any(1)
            self.size = torch.where(is_there, torch.inf, self.size)
        self.per_token = self.size * sqrt(2) * self._row_norms()

    def choose(self, tolerance: float, norm: Float[Tensor, ""]) -> Bool[Tensor, " tokens"]:
        """The rows to go through, if the gradient (the head's, where it has one) has this norm."""
        allowed = tolerance * _MARGIN * norm
        if self.has_head:
            return keep_rows(self.per_token, allowed)
        return keep_rows(self._hidden_bounds().square(), allowed.square())

    def estimated_norm(self) -> Float[Tensor, ""]:
        """Of the gradient's part at the targets' own vocabulary entries, the pull of other tokens left out."""
        finite = torch.where(self.size.isfinite(), self.size, 0.0)
        if self.has_head:
            return self._target_part(finite)
        weight = self.tensors.weight
        parts = [
            finite[rows] * torch.linalg.vector_norm(weight[self.targets[rows]], dim=1, dtype=finite.dtype)
            for rows in slices(self.targets.shape[0], 1024)
        ]
        return torch.cat(parts).double().norm()

    def norm(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, ""]:
        """Of the gradients of the head, or of the hidden states where it has none."""
        found = HeadTensors(*gradients)  # type: ignore[arg-type]
        return _norm([getattr(found, name) for name in self.head] if self.has_head else [found.hidden, found.hidden2])

    def certify(self, keep: Bool[Tensor, " tokens"], gradients: Sequence[Tensor | None]) -> Certificate:
        """The bounds on the relative errors, from the norms of what was kept."""
        found = HeadTensors(*gradients)  # type: ignore[arg-type]
        dropped = keep.logical_not()
        head = torch.where(dropped, self.per_token, 0.0).double().sum()
        hidden = torch.where(dropped, self._hidden_bounds(), 0.0).double().square().sum().sqrt()
        return Certificate(
            keep.shape[0],
            dropped.sum(),
            _relative(head, [getattr(found, name) for name in self.head]),
            _relative(hidden, [found.hidden, found.hidden2] if self.has_hidden else []),
        )

    def _row_norms(self) -> Float[Tensor, " tokens"]:
        """||r||, over the parts of the head that want a gradient."""
        squares = torch.zeros_like(self.size)
        for name, rows in (("weight", self.tensors.hidden), ("matrix", self.tensors.hidden2)):
            if name in self.head and rows is not None:
                squares += torch.linalg.vector_norm(rows, dim=1, dtype=squares.dtype).square_()
        return squares.add_(float("bias" in self.head)).sqrt_()

    def _hidden_bounds(self) -> Float[Tensor, " tokens"]:
        """||g||_1 max_k ||(w_k, B_k)||."""
        largest = torch.zeros((), dtype=self.size.dtype, device=self.size.device)
        weight, matrix = self.tensors.weight, self.tensors.matrix
        for columns in slices(self.student.vocab, 1 << 13):
            squares = torch.linalg.vector_norm(weight[columns], dim=1, dtype=self.size.dtype).square_()
            if matrix is not None:
                squares += torch.linalg.vector_norm(matrix[columns], dim=1, dtype=self.size.dtype).square_()
            largest = torch.maximum(largest, squares.max())
        return self.size * 2 * largest.sqrt()

    def _target_part(self, size: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
        """The norm of the head's gradient at the targets' own vocabulary entries, the pull of other tokens left out."""
        distinct, place = self.targets.unique(return_inverse=True)
        square = torch.zeros((), dtype=torch.float64, device=size.device)
        rows_of = {"weight": self.tensors.hidden, "matrix": self.tensors.hidden2, "bias": size.new_ones(len(size), 1)}
        for name in self.head:
            rows = rows_of[name]
            assert rows is not None
            total = size.new_zeros(distinct.shape[0], rows.shape[1])
            for part in slices(size.shape[0], 1024):
                total.index_add_(0, place[part], rows[part].to(size.dtype) * size[part, None])
            square += total.double().square().sum()
        return square.sqrt()


def _size(
    student: Projection, arrived: Mapping[str, Tensor], state: State, *, vocab_tiles: int
) -> Float[Tensor, " tokens"]:
    """|w| (1 - p) |scale| / temperature, with room for the rounding of p; unbounded where nothing is known of w."""
    incoming = arrived.get("logp")
    if incoming is None:
        count = student.tokens
        return torch.full((count,), torch.inf, dtype=student.settings.result, device=student.tensors.hidden.device)
    logp = state["target_logit"] - state["maximum"] - state["total"].log()
    # The logits are taken as they are: z - m is then exact where p is near 1. The sum rounds by some units in a tile
    # and by one for each tile that is added, which may be all there is of 1 - p.
    rounding = (8 + vocab_tiles) * torch.finfo(logp.dtype).eps
    return incoming.abs() * (-torch.expm1(logp.clamp_max(0.0)) + rounding) * abs(student.settings.factor)


def _relative(bound: Float[Tensor, ""], gradients: Sequence[Tensor | None]) -> Float[Tensor, ""]:
    """bound / (||kept|| - bound); infinite where the bound is no smaller than what was kept, 0 without gradients."""
    if not gradients:
        return torch.zeros_like(bound)
    norm = _norm(gradients)
    rest = norm - bound
    return torch.where(bound == 0, 0.0, torch.where(rest > 0, bound / rest, torch.inf))


def _norm(gradients: Sequence[Tensor | None]) -> Float[Tensor, ""]:
    """The Euclidean norm of all of them together, in float64, which no whole gradient is converted to."""
    parts = [
        torch.linalg.vector_norm(gradient[rows], dtype=torch.float64)
        for gradient in gradients
        if gradient is not None
        for rows in slices(gradient.shape[0], max(1, (1 << 21) // max(1, gradient[:1].numel())))
    ]
    return torch.stack(parts).norm()
