"""Products fused with folds and with dz, against logits in full in float64."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from posttrain.kernels import DETACHED, STATISTICS, LMHead
from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query, check_query
from posttrain.kernels.coefficients import TileGradient, coefficients
from posttrain.kernels.dense import dense_logits
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.kernels.triton import fused
from posttrain.kernels.triton.blocks import ProductBlocks
from posttrain.kernels.triton.coefficients import TritonTileGradient
from tests.kernels.triton_problems import DEVICE

FUSIBLE = tuple(name for name in STATISTICS if name not in TEACHER_STATISTICS | {"ids_logp", "topk_logp", "topk_ids"})
TEMPERATURE = 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks, splits and tiles a split in small problems."""
    monkeypatch.setattr(fused, "product_blocks", lambda *_: ProductBlocks(16, 32, 16, 4, 2))
    monkeypatch.setattr(fused, "_PROGRAMS", 6)


def model(dtype: torch.dtype, tokens: int, vocab: int, width: int, *, extras: bool) -> tuple[torch.Tensor, LMHead]:
    """Hidden states and head; with `extras` a bias, an adapter, a scale and a softcap."""
    generator = torch.Generator().manual_seed(tokens + vocab)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    head = LMHead(normal(vocab, width))
    if extras:
        head = LMHead(head.weight, normal(vocab), 0.5, 5.0, (normal(tokens, 3), normal(vocab, 3)))
    return normal(tokens, width), head


def widened(head: LMHead) -> LMHead:
    low_rank = None if head.low_rank is None else (head.low_rank[0].double(), head.low_rank[1].double())
    bias = None if head.bias is None else head.bias.double()
    return replace(head, weight=head.weight.double(), bias=bias, low_rank=low_rank)


def question(hidden: torch.Tensor, head: LMHead, *wanted: str) -> Query:
    targets = torch.arange(hidden.shape[0], device=DEVICE) * 37 % head.weight.shape[0]
    return check_query(hidden, head, targets, wanted, temperature=TEMPERATURE)


def truth(hidden: torch.Tensor, head: LMHead, query: Query) -> tuple[torch.Tensor, State]:
    z = dense_logits(hidden.double(), widened(head), TEMPERATURE)
    accumulator = BlockAccumulator(query, torch.float64)
    accumulator.update(z.clone(), None, 0)
    return z, accumulator.state()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(5, 150, 20), (33, 65, 16), (1, 2, 7)])
@pytest.mark.parametrize("extras", [False, True])
def test_sums_without_logits(dtype: torch.dtype, tokens: int, vocab: int, width: int, extras: bool) -> None:
    hidden, head = model(dtype, tokens, vocab, width, extras=extras)
    query = question(hidden, head, *FUSIBLE)
    assert fused.can_fold_products(query, hidden, head)
    found, (_, expected) = fused.fold_of_products(hidden, head, query), truth(hidden, head, query)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The operands are exact in every dtype and products are summed in float32.
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=3e-6, atol=3e-6 * value.abs().max().item())


@pytest.mark.parametrize("wanted", [(name,) for name in FUSIBLE], ids=lambda wanted: wanted[0])
def test_each_statistic_alone(wanted: tuple[str, ...]) -> None:
    hidden, head = model(torch.float32, 3, 70, 16, extras=False)
    query = question(hidden, head, *wanted)
    found, (_, expected) = fused.fold_of_products(hidden, head, query), truth(hidden, head, query)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("wanted", [("logp",), FUSIBLE])
def test_dz_without_logits(dtype: torch.dtype, extras: bool, wanted: tuple[str, ...]) -> None:
    hidden, head = model(dtype, 20, 90, 20, extras=extras)
    query = question(hidden, head, *wanted)
    rows, first, last = slice(1, 19), 10, 77
    z, exact = truth(hidden, head, query)
    incoming = {
        name: torch.linspace(-1, 1, 20, dtype=torch.float64, device=DEVICE) for name in wanted if name not in DETACHED
    }
    cap = {"softcap": head.softcap, "temperature": TEMPERATURE}
    expected = TileGradient(coefficients(incoming, exact, query, 90), exact, 0.5, rows, **cap)(
        z[rows, first:last].clone(), None, first
    )
    state = fused.fold_of_products(hidden, head, query)
    found = coefficients({name: gradient.float() for name, gradient in incoming.items()}, state, query, 90)
    low_rank = None if head.low_rank is None else (head.low_rank[0][rows], head.low_rank[1][first:last])
    part = replace(
        head,
        weight=head.weight[first:last],
        bias=None if head.bias is None else head.bias[first:last],
        low_rank=low_rank,
    )
    for out_dtype, tolerance in ((None, 3e-6), (dtype, max(3e-6, torch.finfo(dtype).eps))):
        gradient = TritonTileGradient(found, state, 0.5, rows, out_dtype=out_dtype, **cap)
        dz = fused.gradient_of_products(gradient, hidden[rows], part, first)
        assert dz.dtype == (out_dtype or torch.float32)
        assert (dz.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_no_tokens() -> None:
    hidden, head = model(torch.float32, 0, 9, 4, extras=False)
    state = fused.fold_of_products(hidden, head, question(hidden, head, *FUSIBLE))
    assert all(value.shape == (0,) for value in state.values())


def test_what_cannot_be_fused() -> None:
    hidden, head = model(torch.bfloat16, 2, 9, 4, extras=False)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    options = {"ids": ids, "k": 2, "teacher": (hidden, head)}
    for wanted in ("ids_logp", "topk_logp", "topk_ids", "forward_kl"):
        query = check_query(hidden, head, ids[:, 0], (wanted,), **options)
        assert not fused.can_fold_products(query, hidden, head)
    mixed = replace(head, weight=head.weight.float())
    assert not fused.can_fold_products(question(hidden, mixed, "logp"), hidden, mixed)
