"""From hidden states to tiles of logits, and from gradients of tiles back to hidden states and head.

Suffixes: N tokens of a tile, V vocabulary entries of a tile, D width, R rank of an adapter on the head.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.head import LMHead, VocabShard
from posttrain.kernels.tiling import slices

# Elements up to which a converted copy is held (8 MiB in float32).
_SMALL = 1 << 21


class HeadTensors(NamedTuple):
    """The tensors of hidden states and head, in the order in which autograd functions take them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    hidden2: Tensor | None
    matrix: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> "HeadTensors":
        return cls(hidden, head.weight, head.bias, *(head.low_rank or (None, None)))


def operand_dtype(hidden: Tensor, head: LMHead) -> torch.dtype:
    """What the operands of the products are rounded to: autocast's dtype, else what the tensors promote to."""
    dtype = hidden.dtype
    for tensor in HeadTensors.of(hidden, head)[1:]:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Within it products give the dtype they are written for; autocast has had its say in `operand_dtype`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and statistics for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adds_in_float32(device: torch.device) -> bool:
    """Whether half operands give a float32 product: on tensor cores they do, elsewhere they are widened first."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Settings:
    """The numbers of a projection, fixed when the forward starts.

    Args:
        scale, softcap: of the head.
        temperature: of the call.
        operand: dtype to which the operands of every product are rounded.
        product: dtype in which the operands are then multiplied.
        result: dtype of logit tiles, sums and statistics.
        shard: of the head, if it is spread over processes.
    """

    scale: float
    softcap: float | None
    temperature: float
    operand: torch.dtype
    product: torch.dtype
    result: torch.dtype
    shard: VocabShard | None

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead, temperature: float, result: torch.dtype | None = None) -> "Settings":
        operand = operand_dtype(hidden, head)
        result = result or statistics_dtype(operand)
        in_half = operand in (torch.float16, torch.bfloat16) and result == torch.float32
        product = operand if in_half and adds_in_float32(hidden.device) else result
        return cls(head.scale, head.softcap, temperature, operand, product, result, head.shard)

    @property
    def factor(self) -> float:
        """dz / d(product) apart from the softcap's own slope."""
        return self.scale / self.temperature

    def convert(self, tensor: Tensor) -> Tensor:
        """The tensor as an operand; no copy where it already is one."""
        return tensor.to(self.operand).to(self.product)


class Rows(NamedTuple):
    """The operands of some tokens."""

    hidden_ND: Tensor
    hidden2_NR: Tensor | None


class Columns(NamedTuple):
    """The operands of some vocabulary entries."""

    weight_VD: Tensor
    bias_V: Tensor | None
    matrix_VR: Tensor | None


class Projection:
    """Logit tiles of (hidden, head); nothing larger than a tile is converted or computed."""

    def __init__(self, tensors: HeadTensors, settings: Settings) -> None:
        self.tensors = tensors
        self.settings = settings
        self.tokens, self.width = tensors.hidden.shape
        self.vocab = tensors.weight.shape[0]
        shard = settings.shard
        # Of the whole head, where this is a part of it.
        self.start, self.whole_vocab = (0, self.vocab) if shard is None else (shard.start, shard.vocab)
        # Converted once where that is small, else for every tile anew.
        self._converted: dict[tuple[int, int], Rows] | None = {} if tensors.hidden.numel() <= _SMALL else None

    def rows(self, rows: slice) -> Rows:
        """The operands of some tokens."""
        key = (rows.start, rows.stop)
        if self._converted is not None and key in self._converted:
            return self._converted[key]
        hidden2 = self.tensors.hidden2
        convert = self.settings.convert
        found = Rows(convert(self.tensors.hidden[rows]), None if hidden2 is None else convert(hidden2[rows]))
        if self._converted is not None:
            self._converted[key] = found
        return found

    def selected(self, index: Int[Tensor, " rows"]) -> "Projection":
        """The same head at some of the tokens."""
        tensors = self.tensors
        hidden2 = None if tensors.hidden2 is None else tensors.hidden2[index]
        return Projection(tensors._replace(hidden=tensors.hidden[index], hidden2=hidden2), self.settings)

    def columns(self, columns: slice) -> Columns:
        _, weight, bias, _, matrix = self.tensors
        settings = self.settings
        return Columns(
            settings.convert(weight[columns]),
            None if bias is None else bias[columns].to(settings.operand).to(settings.result),
            None if matrix is None else settings.convert(matrix[columns]),
        )

    def logits(
        self, rows: Rows, columns: Columns, out: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """The tile of z, in memory of its own (or `out`) that the caller may overwrite."""
        settings = self.settings
        z_NV = _product(rows.hidden_ND, columns.weight_VD.T, settings.result, out)
        if rows.hidden2_NR is not None and columns.matrix_VR is not None:
            _add_product(z_NV, rows.hidden2_NR, columns.matrix_VR.T, 1.0)
        if columns.bias_V is not None:
            z_NV.add_(columns.bias_V)
        if settings.softcap is not None:
            return z_NV.mul_(settings.scale / settings.softcap).tanh_().mul_(settings.softcap / settings.temperature)
        return z_NV if settings.factor == 1.0 else z_NV.mul_(settings.factor)

    def mean_logit(self) -> Float[Tensor, " tokens"]:
        """The mean of z over the vocabulary by the head's mean row, without any tile; only without softcap."""
        _, weight, bias, _, matrix = self.tensors
        settings = self.settings
        mean_D = _mean_row(weight, settings)
        mean_R = None if matrix is None else _mean_row(matrix, settings)
        parts = []
        for rows in slices(self.tokens, max(1, _SMALL // max(self.width, 1))):
            operands = self.rows(rows)
            mean_N = operands.hidden_ND.to(settings.result) @ mean_D
            if operands.hidden2_NR is not None and mean_R is not None:
                mean_N += operands.hidden2_NR.to(settings.result) @ mean_R
            parts.append(mean_N)
        mean = torch.cat(parts)
        if bias is not None:
            mean += bias.to(settings.operand).double().mean().to(settings.result)
        return mean.mul_(settings.factor)


def _mean_row(weight: Float[Tensor, "vocab width"], settings: Settings) -> Float[Tensor, " width"]:
    """Summed slice by slice and in float64, since a hundred thousand terms cancel."""
    vocab, width = weight.shape
    total = torch.zeros(width, dtype=torch.float64, device=weight.device)
    for columns in slices(vocab, max(1, _SMALL // max(width, 1))):
        total += settings.convert(weight[columns]).to(settings.result).sum(0)
    return (total / vocab).to(settings.result)


def _product(left: Tensor, right: Tensor, result: torch.dtype, out: Tensor | None) -> Tensor:
    if left.dtype == result:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=result) if out is None else torch.mm(left, right, out_dtype=result, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype), alpha=factor)
