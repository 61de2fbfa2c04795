"""`vocab_loss` and `map_logits` equal the same thing written with dense statistics and logits."""

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels import DETACHED, STATISTICS, map_logits, vocab_loss
from tests.kernels.problems import gradients, problem, tiles

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
HEAD = {"scale": 1.3, "softcap": 4.0, "bias": True, "rank": 2, "temperature": 0.8}


def everything(statistics, factor):
    """Some nonlinear function of all statistics of a token."""
    rows = [value if value.ndim == 1 else value.double().sum(1) for value in statistics.as_dict().values()]
    return sum(((i + 1) * row).sin() for i, row in enumerate(rows)) * factor


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (9, 20)])
@pytest.mark.parametrize("head", [{}, HEAD])
def test_vocab_loss_equals_its_definition(head, shape):
    case = problem(5, 11, 3, **head)
    generator = torch.Generator().manual_seed(2)
    weight, factor = (torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = case.statistics(*STATISTICS, backend="dense")
    expected = (weight * everything(truth, factor)).sum()
    results = []
    for backend in ("streamed", "dense"):
        with tiles(*shape):
            loss, values = vocab_loss(
                *(case.hidden, case.head, case.targets, STATISTICS, everything, weight, factor),
                **case.options,
                backend=backend,
            )
            results.append(gradients(3.0 * loss, case.leaves))
        torch.testing.assert_close(loss, expected, **TIGHT)
        torch.testing.assert_close(values.as_dict(), truth.detach().as_dict(), **TIGHT)
        assert not any(value.requires_grad for value in values.as_dict().values())
    for ours, theirs in zip(results[0], gradients(3.0 * expected, case.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    torch.testing.assert_close(results[0], results[1], **TIGHT)


def test_vocab_loss_is_cross_entropy():
    case = problem(7, 9, 4, dtype=torch.float32)
    weight = torch.tensor([1.0, 0, 2, 1, 1, 0.5, 3])
    loss, _ = vocab_loss(case.hidden, case.head, case.targets, ("logp",), lambda s: -s.logp, weight)
    losses = F.cross_entropy(case.hidden @ case.head.weight.T, case.targets, reduction="none")
    torch.testing.assert_close(loss, (weight * losses).sum())
    for ours, theirs in zip(gradients(loss, case.leaves), gradients((weight * losses).sum(), case.leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_loss_that_only_reads_forms_no_gradient():
    case = problem()
    ones = torch.ones(5)
    with torch.no_grad():
        loss, _ = vocab_loss(case.hidden, case.head, case.targets, ("logp",), lambda s: s.logp, ones)
    assert not loss.requires_grad
    for phi in (lambda s: s.is_top1, lambda s: torch.ones_like(s.is_top1), lambda s: s.entropy.detach()):
        loss, _ = vocab_loss(case.hidden, case.head, case.targets, ("is_top1", "entropy"), phi, ones)
        assert all((gradient == 0).all() for gradient in gradients(loss, case.leaves))


def test_a_second_backward_gives_the_same_gradient():
    case = problem()
    weight = torch.rand(5, generator=torch.Generator().manual_seed(0))
    loss, _ = vocab_loss(case.hidden, case.head, case.targets, ("entropy",), lambda s: s.entropy**2, weight)
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    for gradient, again in zip(first, torch.autograd.grad(loss, case.leaves), strict=True):
        assert torch.equal(gradient, again)


def test_no_tokens():
    case = problem(0, 6, 3, bias=True)
    loss, values = vocab_loss(
        case.hidden, case.head, case.targets, STATISTICS, lambda s: s.logp, torch.ones(0), **case.options
    )
    assert loss.item() == 0 and values["topk_ids"].shape == (0, 3)
    assert all((gradient == 0).all() for gradient in gradients(loss, case.leaves))
    (mapped, ids) = map_logits(lambda z: (z.logsumexp(1), z.argmax(1)), case.hidden, case.head)
    assert mapped.shape == ids.shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients(mapped.sum(), case.leaves))


def test_detached_statistics_reach_phi():
    case = problem()

    def phi(statistics):
        assert all(value.requires_grad == (n not in DETACHED) for n, value in statistics.as_dict().items())
        return statistics.logp * statistics.is_top1

    vocab_loss(case.hidden, case.head, case.targets, ("logp", "is_top1"), phi, torch.ones(5))


def logits(case):
    """z by plain torch."""
    z = F.linear(case.hidden, case.head.weight, case.head.bias)
    if case.head.low_rank is not None:
        z = z + case.head.low_rank[0] @ case.head.low_rank[1].T
    z = z * case.head.scale
    z = z if case.head.softcap is None else case.head.softcap * (z / case.head.softcap).tanh()
    return z / case.options["temperature"]


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (9, 20)])
@pytest.mark.parametrize("head", [{}, HEAD])
def test_map_logits_equals_a_function_of_logits(head, shape):
    case = problem(5, 11, 3, **head)
    generator = torch.Generator().manual_seed(3)
    factor = torch.rand(5, 11, generator=generator, dtype=torch.float64).requires_grad_()
    own = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def fn(z, factor, targets):
        return (z.softmax(1) * factor).sum(1) ** own, (z * own).cos(), targets

    leaves = [factor, own, *case.leaves]
    with tiles(*shape):
        temperature = case.options["temperature"]
        found = map_logits(fn, case.hidden, case.head, factor, case.targets, temperature=temperature)
        found_gradients = gradients(found[0].sum() + found[1].square().sum(), leaves)
    truth = fn(logits(case), factor, case.targets)
    torch.testing.assert_close(found, truth, **TIGHT)
    expected = gradients(truth[0].sum() + truth[1].square().sum(), leaves)
    for ours, theirs in zip(found_gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_map_logits_draws_the_same_numbers_again():
    case = problem(6, 5, 3)
    drawn = []

    def noisy(z):
        noise = torch.rand(z.shape, dtype=z.dtype)
        drawn.append(noise)
        return (z * noise).sum(1)

    with tiles(2, 5):
        torch.manual_seed(0)
        found = gradients(map_logits(noisy, case.hidden, case.head).sum(), case.leaves)
    noise = torch.cat(drawn[:3])
    expected = gradients((case.hidden @ case.head.weight.T * noise).sum(), case.leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_map_logits_without_gradient_mode():
    case = problem()
    with torch.no_grad():
        assert not map_logits(lambda z: z.amax(1), case.hidden, case.head).requires_grad
