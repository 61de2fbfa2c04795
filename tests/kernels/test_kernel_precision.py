"""No further from the float64 truth than dense torch in the same input dtype, plus a named tolerance."""

import pytest
import torch

from posttrain.kernels import LMHead, map_logits, projection, vocab_loss, vocab_statistics
from tests.kernels.problems import DIFFERENTIABLE, gradients, problem, tiles

# Of values, relative to the largest logit or value in sight (at least 1): 16 roundings to float32.
VALUE_TOLERANCE = 16 * 2.0**-24
# Of gradients, in the Euclidean norm, relative to the truth's or to that of the gradient of logp if it is larger: sums
# of hundreds of float32 products, in another order than dense.
GRADIENT_TOLERANCE = 2**-20
FLOATS = (*(name for name in DIFFERENTIABLE if name != "max_nontarget_logit"), "teacher_logp", "teacher_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(dtype, size):
    return problem(24, 211, 32, dtype=dtype, size=size, bias=True, rank=2, scale=0.9, softcap=40.0, temperature=1.1)


def weighted(values):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(values.shape, generator=generator, dtype=torch.float64) * values).sum()


def errors(values, truth):
    return (values.double() - truth).abs().amax().item()


def gradient_errors(values, truth, leaves, exact_leaves):
    """Per tensor: distance of the gradients, and the size of the true one."""
    found, exact = gradients(weighted(values), leaves), gradients(weighted(truth), exact_leaves)
    return [((g.double() - e).norm().item(), e.norm().item()) for g, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("size", [2.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOATS)
def test_no_further_from_the_truth_than_dense(name, dtype, size):
    given = case(dtype, size)
    exact = given.to(torch.float64)
    truth = exact.statistics(name, backend="dense")[name]
    dense = given.statistics(name, backend="dense")[name]
    largest = exact.statistics("max_logit", backend="dense")["max_logit"].abs().amax().item()
    scale = max(1.0, largest, truth.abs().amax().item())
    with tiles(9, 80):
        streamed = given.statistics(name)[name]
        assert streamed.dtype == torch.float32
        assert errors(streamed, truth) <= errors(dense, truth) + VALUE_TOLERANCE * scale
        if name not in DIFFERENTIABLE:
            return
        ours = gradient_errors(streamed, truth, given.leaves, exact.leaves)
    theirs = gradient_errors(dense, truth, given.leaves, exact.leaves)
    logp = exact.statistics("logp", backend="dense")["logp"]
    usual = [size for _, size in gradient_errors(logp, logp, exact.leaves, exact.leaves)]
    for (error, size), (dense_error, _), floor in zip(ours, theirs, usual, strict=True):
        assert error <= dense_error + GRADIENT_TOLERANCE * max(size, floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vocab_loss_keeps_to_the_same_measure(dtype):
    given = case(dtype, 2.0)
    exact = given.to(torch.float64)
    weight = torch.rand(24, generator=torch.Generator().manual_seed(1))

    def found(case, backend):
        arguments = (case.hidden, case.head, case.targets, ("logp", "entropy"), lambda s: s.logp.exp() - s.entropy)
        loss, _ = vocab_loss(*arguments, weight, temperature=1.1, backend=backend)
        return gradients(loss, case.leaves)

    with tiles(9, 80):
        streamed = found(given, "streamed")
    for ours, dense, truth in zip(streamed, found(given, "dense"), found(exact, "dense"), strict=True):
        assert ours.dtype == dtype
        error, dense_error = (ours.double() - truth).norm(), (dense.double() - truth).norm()
        assert error <= dense_error + GRADIENT_TOLERANCE * truth.norm()


def test_small_divergences_keep_their_digits():
    hidden = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.zeros(6, dtype=torch.int64)
    names = ("forward_kl", "reverse_kl", "jsd")
    teacher = (hidden * 1.01, LMHead(weight))

    def ask(dtype, backend):
        held = (teacher[0].to(dtype), LMHead(weight.to(dtype)))
        head = LMHead(weight.to(dtype))
        return vocab_statistics(hidden.to(dtype), head, targets, names, teacher=held, backend=backend)

    truth = ask(torch.float64, "dense")
    with tiles(2, 60):
        streamed = ask(torch.float32, "streamed")
    for name in names:
        assert truth[name].amin() > 1e-6
        torch.testing.assert_close(streamed[name].double(), truth[name], rtol=0, atol=3e-7)


def test_autocast_rounds_the_operands_and_nothing_else():
    given = problem(12, 37, 8, dtype=torch.float32, bias=True, rank=2, softcap=5.0)
    rounded = given.to(torch.bfloat16).to(torch.float32)
    with tiles(5, 10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = given.statistics(*FLOATS)
            inside = gradients(weighted(values["entropy"]), given.leaves)
            outer = given.statistics("entropy")["entropy"]
        outside = gradients(weighted(outer), given.leaves)
        expected = rounded.statistics(*FLOATS)
        expected_gradients = gradients(weighted(expected["entropy"]), rounded.leaves)
    for name in FLOATS:
        assert values[name].dtype == torch.float32 and torch.equal(values[name], expected[name]), name
    for first, second, truth in zip(inside, outside, expected_gradients, strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, truth) and torch.equal(second, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_operands_into_float32(dtype, monkeypatch):
    """The way of a GPU, with its product imitated: gradients of logits round to the operands' dtype, as in dense."""
    plain = torch.mm

    def mm(left, right, out_dtype=None, **options):
        assert (left.dtype == dtype) == (out_dtype is not None), "half operands, float32 result"
        wide = (left, right) if out_dtype is None else (left.to(out_dtype), right.to(out_dtype))
        return plain(*wide, **options)

    given = case(dtype, 2.0)
    exact = given.to(torch.float64)
    truth = exact.statistics("entropy", backend="dense")["entropy"]
    dense = given.statistics("entropy", backend="dense")["entropy"]
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(projection, "adds_in_float32", lambda device: True)
    with tiles(9, 80):
        streamed = given.statistics("entropy")["entropy"]
        assert errors(streamed, truth) <= errors(dense, truth) + VALUE_TOLERANCE
        ours = gradient_errors(streamed, truth, given.leaves, exact.leaves)
        mapped = map_logits(lambda z: z.logsumexp(1), given.hidden, given.head, temperature=1.1)
        expected = given.statistics("logsumexp")["logsumexp"]
    torch.testing.assert_close(mapped, expected)
    theirs = gradient_errors(dense, truth, given.leaves, exact.leaves)
    for (error, size), (dense_error, _) in zip(ours, theirs, strict=True):
        assert error <= dense_error + GRADIENT_TOLERANCE * size


def test_autocast_leaves_float64_alone():
    given = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = given.statistics("logp")
    assert torch.equal(values["logp"], given.statistics("logp")["logp"])


def test_tensors_of_different_dtypes():
    given = problem(6, 9, 4, dtype=torch.float32)
    hidden = given.hidden.detach().to(torch.bfloat16).requires_grad_()
    mixed = given.with_leaves([hidden, given.head.weight])
    same = given.with_leaves([hidden.detach().float().requires_grad_(), given.head.weight])
    values, expected = mixed.statistics("logp")["logp"], same.statistics("logp")["logp"]
    assert torch.equal(values, expected)
    found, truth = gradients(weighted(values), mixed.leaves), gradients(weighted(expected), same.leaves)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], truth[0].bfloat16())
    assert found[1].dtype == torch.float32 and torch.equal(found[1], truth[1])
