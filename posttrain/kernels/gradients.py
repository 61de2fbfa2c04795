"""Gradients of hidden states and head, summed over tiles.

Suffixes: N tokens of a tile, V vocabulary entries of a tile, D width, R rank of an adapter on the head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.projection import Columns, HeadTensors, Projection, Rows


class RowSums(NamedTuple):
    """Where the gradients of some tokens are summed; None where none is wanted."""

    hidden_ND: Tensor | None
    hidden2_NR: Tensor | None


class Gradients:
    """Gradients of the tensors of a projection, summed over tiles in the dtype of its results.

    Args:
        projection: whose tensors.
        needs: which of its tensors want a gradient.
        whole_weight: whether tiles of the same vocabulary entries come apart in time. If they come together (True is
            not needed) the weight's sums are held for one slice of the vocabulary only, then rounded to its dtype.
    """

    def __init__(self, projection: Projection, needs: Sequence[bool], *, whole_weight: bool) -> None:
        self.projection = projection
        result = projection.settings.result
        self.whole_weight = whole_weight or projection.tensors.weight.dtype == result
        self.sums: dict[str, Tensor] = {}
        for (name, tensor), needed in zip(projection.tensors._asdict().items(), needs, strict=True):
            if not needed or tensor is None:
                continue
            if name == "weight":
                # Not set to zero: the first product that reaches a slice writes it.
                dtype = result if self.whole_weight else tensor.dtype
                self.sums[name] = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
            else:
                self.sums[name] = torch.zeros(tensor.shape, dtype=result, device=tensor.device)
        self._slice: Tensor | None = None
        self._scratch: Tensor | None = None
        self._fresh = True
        self.reached_weight = False

    def clear_weight(self) -> None:
        """Sets the weight's sums to zero, where no tile reached them."""
        if "weight" in self.sums:
            self.sums["weight"].zero_()

    def open(self, columns: slice, *, fresh: bool = True) -> None:
        """Tiles of these vocabulary entries follow; `fresh` says that they are the first."""
        if "weight" not in self.sums:
            return
        held, self._fresh = self.sums["weight"][columns], fresh
        if self.whole_weight:
            self._slice = held
            return
        if self._scratch is None:
            self._scratch = torch.empty_like(held, dtype=self.projection.settings.result)
        self._slice = self._scratch[: held.shape[0]]

    def close(self, columns: slice) -> None:
        """No further tile of these vocabulary entries follows (before the next `open`)."""
        if self._slice is not None and not self.whole_weight:
            self.sums["weight"][columns] = self._slice
        self._slice = None

    def rows(self, rows: slice) -> RowSums:
        """The sums of some tokens."""
        hidden, hidden2 = self.sums.get("hidden"), self.sums.get("hidden2")
        return RowSums(None if hidden is None else hidden[rows], None if hidden2 is None else hidden2[rows])

    def new_rows(self, count: int) -> RowSums:
        """Sums of some tokens from zero, each width's together as in the tiles; to be handed to `put_rows`."""

        def zeros(name: str) -> Tensor | None:
            total = self.sums.get(name)
            return None if total is None else total.new_zeros(total.shape[1], count).T

        return RowSums(zeros("hidden"), zeros("hidden2"))

    def put_rows(self, rows: slice | Int[Tensor, " rows"], sums: RowSums) -> None:
        """Writes the sums of some tokens to their places."""
        for name, part in (("hidden", sums.hidden_ND), ("hidden2", sums.hidden2_NR)):
            if part is not None:
                self.sums[name][rows] = part

    def add(
        self, dz_NV: Float[Tensor, "rows columns"], rows: Rows, columns: Columns, sums: RowSums, column_slice: slice
    ) -> None:
        """Adds what a tile's gradient (with respect to z over the softcap's slope) contributes."""
        settings = self.projection.settings
        factor = settings.factor
        operand_NV = dz_NV.to(settings.product)
        if sums.hidden_ND is not None:
            _add_product(sums.hidden_ND, operand_NV, columns.weight_VD, factor)
        if self._slice is not None:
            _add_product(self._slice, operand_NV.T, rows.hidden_ND, factor, fresh=self._fresh)
            self._fresh = False
        if "bias" in self.sums:
            self.sums["bias"][column_slice].add_(dz_NV.sum(0, dtype=settings.result), alpha=factor)
        if sums.hidden2_NR is not None and columns.matrix_VR is not None:
            _add_product(sums.hidden2_NR, operand_NV, columns.matrix_VR, factor)
        if "matrix" in self.sums and rows.hidden2_NR is not None:
            _add_product(self.sums["matrix"][column_slice], operand_NV.T, rows.hidden2_NR, factor)

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes of their tensors, None where none is needed."""
        tensors = self.projection.tensors._asdict()
        return tuple(
            self.sums[name].to(tensor.dtype) if tensor is not None and name in self.sums else None
            for name, tensor in tensors.items()
        )


def spread(gradients: Sequence[Tensor | None], index: Int[Tensor, " rows"], tokens: int) -> tuple[Tensor | None, ...]:
    """Gradients of selected tokens as gradients of all `tokens`, zero for the others."""
    found = HeadTensors(*gradients)  # type: ignore[arg-type]

    def put(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.new_zeros(tokens, part.shape[1]).index_copy_(0, index, part)

    return tuple(found._replace(hidden=put(found.hidden), hidden2=put(found.hidden2)))  # type: ignore[arg-type]


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float, *, fresh: bool = False) -> None:
    """total += factor * left @ right; a `fresh` total is overwritten, whatever it holds."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0.0 if fresh else 1.0, alpha=factor)
    elif fresh:
        torch.mul(torch.mm(left, right, out_dtype=total.dtype), factor, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype), alpha=factor)
