"""dz of the Triton kernels against torch's, in float32 and in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from posttrain.kernels import DETACHED, STATISTICS
from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.coefficients import Coefficients, TileGradient, coefficients
from posttrain.kernels.triton import make_tile_gradient
from posttrain.kernels.triton.accumulation import TritonAccumulator
from posttrain.kernels.triton.coefficients import TritonTileGradient
from tests.kernels.triton_problems import DEVICE, IDS, Logits, logits

DIFFERENTIABLE = tuple(name for name in STATISTICS if name not in DETACHED)
# Truncated by the interpreter, rounded by a GPU.
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def arrived(problem: Logits, wanted: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Incoming gradients of about 1."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"ids_logp": (IDS,), "topk_logp": (min(3, problem.z.shape[1]),)}
    tokens = problem.z.shape[0]
    found = {name: torch.randn(tokens, *shapes.get(name, ()), generator=generator) for name in wanted}
    return {name: gradient.to(DEVICE, dtype) for name, gradient in found.items()}


def prepared(problem: Logits, wanted: tuple[str, ...], kind: Any, dtype: torch.dtype) -> tuple[Coefficients, State]:
    query = problem.query(*wanted)
    state = problem.feed(kind(query, dtype), dtype)
    return coefficients(arrived(problem, wanted, dtype), state, query, problem.z.shape[1]), state


def all_tiles(gradient: Any, problem: Logits, rows: slice, dtype: torch.dtype, has_teacher: bool = False) -> Tensor:
    """dz of some rows, tile by tile; z comes as views of a wider tensor."""
    z, u = problem.z.to(dtype, copy=True), problem.u.to(dtype, copy=True)
    tiles = []
    for first, last in problem.tiles():
        u_NV = u[rows, first:last] if has_teacher else None
        tiles.append(gradient(z[rows, first:last], u_NV, first))
    return torch.cat(tiles, 1)


def check(
    problem: Logits, *wanted: str, softcap: float | None = None, temperature: float = 1.0, tolerance: float = 3e-6
) -> None:
    """No further from float64 than torch in float32, plus a share of the largest entry."""
    rows = slice(1, None) if problem.z.shape[0] > 1 else slice(None)

    def dz_of(accumulator: Any, kind: Any, dtype: torch.dtype) -> Tensor:
        found, state = prepared(problem, wanted, accumulator, dtype)
        gradient = kind(found, state, 0.3, rows, softcap=softcap, temperature=temperature)
        return all_tiles(gradient, problem, rows, dtype, "teacher_maximum" in state)

    dz = dz_of(TritonAccumulator, TritonTileGradient, torch.float32)
    expected = dz_of(BlockAccumulator, TileGradient, torch.float64)
    allowed = (
        dz_of(BlockAccumulator, TileGradient, torch.float32) - expected
    ).abs().max() + tolerance * expected.abs().max().clamp_min(1.0)
    assert dz.isfinite().all()
    assert (dz - expected).abs().max() <= allowed


@pytest.mark.parametrize(
    "wanted", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE], ids=lambda wanted: wanted[0]
)
def test_every_term(wanted: tuple[str, ...]) -> None:
    check(logits(), *wanted)


@pytest.mark.parametrize(
    "problem",
    [
        logits(1, seed=1),
        logits(9, 7, seed=2, cuts=(3,)),
        logits(3, 1, seed=3, cuts=()),
        logits(3, 70, seed=4, cuts=(1, 69)),
        logits(2, 600, seed=5, cuts=(577,)),
        logits(3, seed=6, size=1e4),
    ],
    ids=["one token", "few entries", "one entry", "ragged", "long", "large"],
)
def test_shapes_and_extremes(problem: Logits) -> None:
    check(problem, *(name for name in DIFFERENTIABLE if problem.z.abs().max() < 1e4 or "square" not in name))


@pytest.mark.parametrize("wanted", [("logp",), ("ids_logp", "entropy"), ("mean_logit",), DIFFERENTIABLE])
def test_the_slope_of_the_softcap_is_included(wanted: tuple[str, ...]) -> None:
    check(logits(3, seed=7, size=3.0, softcap=5.0, temperature=0.7), *wanted, softcap=5.0, temperature=0.7)


def test_a_value_reaches_the_tile_that_holds_its_id_and_no_other() -> None:
    problem = logits(2, 12, seed=8, cuts=())
    ids = torch.tensor([[3, 3, 9], [-1, 5, 3]], device=DEVICE)
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], device=DEVICE)
    single = torch.tensor([[4], [-1]], device=DEVICE), torch.tensor([[64.0], [128.0]], device=DEVICE)
    found = Coefficients(scatters=[(ids, values), single])
    gradient = TritonTileGradient(found, {"any": problem.z[:, 0]}, 0.5, slice(None))
    expected = torch.zeros(2, 12, device=DEVICE)
    expected[0, 3], expected[0, 9], expected[0, 4] = 3.0, 4.0, 64.0
    expected[1, 5], expected[1, 3] = 16.0, 32.0
    for first, last in ((0, 4), (4, 9), (9, 12)):
        unread = torch.full((2, last - first), torch.nan, device=DEVICE)
        assert torch.equal(gradient(unread, None, first), expected[:, first:last])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wanted", [("logp",), ("entropy", "ids_logp")])
def test_dz_as_an_operand(dtype: torch.dtype, wanted: tuple[str, ...]) -> None:
    problem = logits(seed=9)
    found, state = prepared(problem, wanted, TritonAccumulator, torch.float32)
    expected = all_tiles(TritonTileGradient(found, state, 0.3, slice(None)), problem, slice(None), torch.float32)
    gradient = TritonTileGradient(found, state, 0.3, slice(None), out_dtype=dtype)
    dz = all_tiles(gradient, problem, slice(None), torch.float32)
    assert dz.dtype == dtype
    torch.testing.assert_close(dz.float(), expected, rtol=HALF[dtype], atol=1e-7)


def test_dz_takes_the_place_of_z_alone() -> None:
    problem = logits(3, seed=10)
    found, state = prepared(problem, ("logp",), TritonAccumulator, torch.float32)
    whole = problem.z.clone()
    tile = whole[:, 10:20]
    dz = TritonTileGradient(found, state, 0.3, slice(None))(tile, None, 10)
    assert dz.data_ptr() == tile.data_ptr() and torch.equal(whole[:, 10:20], dz)
    assert torch.equal(whole[:, :10], problem.z[:, :10]) and torch.equal(whole[:, 20:], problem.z[:, 20:])


def test_float64_stays_with_torch_and_has_the_same_options() -> None:
    problem = logits(3, seed=11, size=3.0, softcap=5.0)
    wanted = ("logp", "entropy")
    rows = slice(None)
    exact = make_tile_gradient(
        *prepared(problem, wanted, BlockAccumulator, torch.float64), 0.3, rows, dtype=torch.float64, softcap=5.0
    )
    quick = make_tile_gradient(*prepared(problem, wanted, TritonAccumulator, torch.float32), 0.3, rows, softcap=5.0)
    assert type(exact) is TileGradient and type(quick) is TritonTileGradient
    expected = all_tiles(exact, problem, rows, torch.float64)
    torch.testing.assert_close(all_tiles(quick, problem, rows, torch.float32).double(), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    problem = logits(0)
    found, state = prepared(problem, DIFFERENTIABLE, TritonAccumulator, torch.float32)
    assert TritonTileGradient(found, state, 0.3, slice(None))(problem.z, problem.u, 0).shape == (0, 53)
