"""Logits that exist in registers only: products and folds in one kernel, and products and dz in one kernel."""

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import State
from posttrain.kernels.checks import Query
from posttrain.kernels.head import LMHead
from posttrain.kernels.triton.accumulation import Sums, TritonAccumulator
from posttrain.kernels.triton.blocks import ProductBlocks, next_power, product_blocks
from posttrain.kernels.triton.coefficients import TritonTileGradient
from posttrain.kernels.triton.products import Form, Operands, fold_products, gradient_products, join_splits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Programs that are to be at work at once; more splits of the vocabulary make more of them out of few tokens.
_PROGRAMS = 528


def can_fold_products(query: Query, hidden: Tensor, head: LMHead) -> bool:
    """Whether `fold_of_products` can answer: about the student alone, without picks of several ids, one dtype."""
    needed = {"ids_logp", "topk_logp", "topk_ids"}.intersection(query.needed)
    tensors = (head.weight, *(() if head.bias is None else (head.bias,)), *(head.low_rank or ()))
    same = hidden.dtype in _DTYPES and all(tensor.dtype == hidden.dtype for tensor in tensors)
    return same and query.teacher is None and not needed


def fold_of_products(hidden: Float[Tensor, "tokens width"], head: LMHead, query: Query) -> State:
    """The state of a `BlockAccumulator` that has seen all tiles of z, none of which was ever in memory.

    Operands must be such that `can_fold_products`. Sums are float32, products of float32 operands exact.
    """
    held = TritonAccumulator(query, torch.float32)
    tokens, vocab = hidden.shape[0], head.weight.shape[0]
    if tokens == 0:
        return held.state()
    blocks = product_blocks(hidden.device, hidden.dtype, any(held.folds.parts[1:]))
    row_programs, tiles = -(-tokens // blocks.rows), -(-vocab // blocks.columns)
    per_split = -(-tiles // max(1, min(tiles, _PROGRAMS // row_programs)))
    splits = -(-tiles // per_split)
    parts = Sums((splits, tokens), held.folds.parts, hidden.device)
    target = held.picked.get("target_logit")
    with torch.cuda.device_of(hidden):
        fold_products[row_programs, splits](
            _operands(hidden, head, query.temperature),
            held.targets_N,
            parts.floats if target is None else target.values_NK,
            parts.floats,
            parts.integers,
            tokens,
            vocab,
            per_split,
            parts=parts.parts,
            form=_form(head),
            PICKS=target is not None,
            **_sizes(blocks),
        )
        join_splits[-(-tokens // 8),](
            parts.floats,
            parts.integers,
            held.folds.floats,
            held.folds.integers,
            tokens,
            splits,
            parts=parts.parts,
            ROWS=8,
            SPLITS=next_power(splits),
            enable_fp_fusion=True,
        )
    return held.state()


def gradient_of_products(
    gradient: TritonTileGradient,
    hidden: Float[Tensor, "rows width"],
    head: LMHead,
    start: int,
) -> Float[Tensor, "rows columns"]:
    """dz of the tile of all `hidden` and all of `head`, a slice of the vocabulary from `start` on.

    In `gradient.out_dtype`, float32 where that is None. Operands must be such that `can_fold_products`.
    """
    assert not gradient.reads_teacher and not gradient.scatters
    rows, columns = hidden.shape[0], head.weight.shape[0]
    dz_NV = torch.empty((rows, columns), dtype=gradient.out_dtype or torch.float32, device=hidden.device)
    if rows == 0:
        return dz_NV
    terms = gradient.terms
    rich = terms.quadratic or terms.square or terms.logit
    blocks = product_blocks(hidden.device, hidden.dtype, rich)
    with torch.cuda.device_of(hidden):
        gradient_products[-(-rows // blocks.rows), -(-columns // blocks.columns)](
            _operands(hidden, head, gradient.temperature),
            dz_NV,
            gradient.factors,
            gradient.factors if gradient.ids_NS is None else gradient.ids_NS,
            gradient.factors if gradient.values_NS is None else gradient.values_NS,
            rows,
            columns,
            start,
            dz_NV.stride(0),
            gradient.slope,
            terms=terms,
            form=_form(head),
            **_sizes(blocks),
        )
    return dz_NV


def _operands(hidden: Tensor, head: LMHead, temperature: float) -> Operands:
    hidden, weight = _unit_stride(hidden), _unit_stride(head.weight)
    hidden2, matrix = (hidden, weight) if head.low_rank is None else map(_unit_stride, head.low_rank)
    cap = head.softcap
    before, after = (head.scale / temperature, 1.0) if cap is None else (head.scale / cap, cap / temperature)
    return Operands(
        hidden,
        weight,
        weight if head.bias is None else head.bias.contiguous(),
        hidden2,
        matrix,
        hidden.stride(0),
        weight.stride(0),
        hidden2.stride(0),
        matrix.stride(0),
        hidden.shape[1],
        hidden2.shape[1],
        before,
        after,
    )


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _form(head: LMHead) -> Form:
    widen = bool(triton.knobs.runtime.interpret)
    return Form(head.bias is not None, head.low_rank is not None, head.softcap is not None, widen)


def _sizes(blocks: ProductBlocks) -> dict[str, int | bool]:
    return {
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.width,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,
    }
