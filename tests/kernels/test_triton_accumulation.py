"""The Triton accumulator against torch's in float32 and against the definitions in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from posttrain.kernels import STATISTICS
from posttrain.kernels.accumulation import BlockAccumulator, State, statistics
from posttrain.kernels.triton import make_accumulator
from posttrain.kernels.triton.accumulation import TritonAccumulator
from tests.kernels.triton_problems import DEVICE, Logits, logits

ALONE = [(name,) for name in STATISTICS]
TOGETHER = [("logp", "entropy"), ("reverse_kl", "surprisal_variance"), ("is_top1", "mean_logit"), STATISTICS]


def states(problem: Logits, *wanted: str, jsd_beta: float = 0.3) -> tuple[State, State, State]:
    """Of the Triton kernels, of torch in float32, of torch in float64."""
    query = problem.query(*wanted, jsd_beta=jsd_beta)
    triton = problem.feed(TritonAccumulator(query, torch.float32))
    torch32 = problem.feed(BlockAccumulator(query, torch.float32))
    return triton, torch32, problem.feed(BlockAccumulator(query, torch.float64), torch.float64)


def assert_as_good(found: State, torch32: State, truth: State) -> None:
    """No further from the truth than torch in float32, plus 1e-6 of the largest number and 1e-7; integers are equal."""
    assert found.keys() == torch32.keys()
    for name, value in found.items():
        assert value.shape == torch32[name].shape and value.dtype == torch32[name].dtype, name
        if value.dtype == torch.int64:
            assert torch.equal(value, truth[name]), name
        else:
            assert value.isfinite().all(), name
            error = (value.double() - truth[name]).abs().max()
            allowed = (torch32[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max() + 1e-7
            assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("wanted", [*ALONE, *TOGETHER], ids=lambda wanted: wanted[0] + f"-{len(wanted)}")
def test_every_sum_is_collected(wanted: tuple[str, ...]) -> None:
    assert_as_good(*states(logits(), *wanted))


@pytest.mark.parametrize(
    "problem",
    [
        logits(1, seed=1),
        logits(9, 7, seed=2, cuts=(3,)),
        logits(3, 1, seed=3),
        logits(3, 70, seed=4, cuts=(1, 69)),
        logits(2, 600, seed=5, cuts=(577,)),
        logits(3, seed=6, size=1e4),
        logits(3, seed=7, size=1e-3),
        logits(3, seed=8, size=30.0, softcap=10.0, temperature=0.7),
    ],
    ids=["one token", "few entries", "one entry", "ragged", "long", "large", "flat", "capped"],
)
def test_shapes_and_extremes(problem: Logits) -> None:
    wanted = [name for name in STATISTICS if problem.z.shape[1] > 1 or name != "max_nontarget_logit"]
    assert_as_good(*states(problem, *wanted))


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("apart", [1e-3, 1.0, 1e4])
def test_jsd_keeps_its_digits_near_and_far(beta: float, apart: float) -> None:
    problem = logits(3, seed=9)
    problem.u = problem.z + apart * problem.u
    query = problem.query("jsd", jsd_beta=beta)
    found, _, truth = states(problem, "jsd", jsd_beta=beta)
    vocab = problem.z.shape[1]
    jsd, expected = statistics(found, query, vocab)["jsd"], statistics(truth, query, vocab)["jsd"]
    torch.testing.assert_close(jsd.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_large_offset_costs_no_more_digits_than_in_torch() -> None:
    problem = logits(4, seed=10)
    problem.z += 1e4
    problem.u -= 1e4
    assert_as_good(*states(problem, *STATISTICS))


def test_the_only_entry_leaves_no_other() -> None:
    state = states(logits(2, 1, cuts=()), "max_nontarget_logit")[0]
    assert state["other"].tolist() == [-torch.inf] * 2 and state["other_index"].tolist() == [-1] * 2


def test_ruled_out_entries_weigh_nothing() -> None:
    problem = logits(3, seed=11)
    problem.z[:, ::2] = -torch.inf
    problem.targets[:] = 1
    state = problem.feed(TritonAccumulator(problem.query("logp", "entropy", "max_logit"), torch.float32))
    z = problem.z[:, 1::2].double()
    torch.testing.assert_close((state["maximum"] + state["total"].log()).double(), z.logsumexp(1))
    entropy = torch.distributions.Categorical(logits=z).entropy()
    torch.testing.assert_close((state["total"].log() - state["mean"]).double(), entropy)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_nan_is_never_passed_over() -> None:
    problem = logits(3, seed=12)
    problem.z[1, 40] = torch.nan
    wanted = ("logp", "entropy", "max_logit", "max_nontarget_logit", "mean_logit", "surprisal_variance", "forward_kl")
    state = problem.feed(TritonAccumulator(problem.query(*wanted), torch.float32))
    for name in ("total", "mean", "largest", "other", "sum", "variance", "forward_difference"):
        assert state[name].isnan().tolist() == [False, True, False], name


def test_nothing_to_read() -> None:
    state = states(logits(0), *STATISTICS)[0]
    assert all(value.shape[0] == 0 for value in state.values())


def test_tiles_of_any_stride() -> None:
    problem = logits(4, 30, seed=13, cuts=(11,))
    expected = problem.feed(TritonAccumulator(problem.query("logp", "entropy"), torch.float32))
    accumulator = TritonAccumulator(problem.query("logp", "entropy"), torch.float32)
    across = problem.z.T.contiguous().T
    accumulator.update(across[:, :11], None, 0)
    accumulator.update(across[:, 11:], None, 11)
    for name, value in accumulator.state().items():
        assert torch.equal(value, expected[name]), name


def test_the_same_tiles_give_the_same_bits() -> None:
    first, second = (states(logits(seed=14), *STATISTICS)[0] for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_float64_stays_with_torch() -> None:
    query = logits().query("logp")
    assert type(make_accumulator(query, torch.float64)) is BlockAccumulator
    assert type(make_accumulator(query, torch.float32)) is TritonAccumulator
    assert query.targets.device.type == DEVICE.type
