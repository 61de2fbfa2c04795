"""The streamed backend equals the dense one, and behaves as an autograd citizen."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from posttrain.kernels import (
    DETACHED,
    STATISTICS,
    LMHead,
    map_logits,
    passes,
    vocab_loss,
    vocab_statistics,
)
from posttrain.kernels import gradients as gradients_module
from tests.kernels.problems import DIFFERENTIABLE, gradients, mixed_loss, problem, tiles

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def assert_same(case, *wanted, rows, columns):
    """Values and gradients of both backends, for an arbitrary linear combination."""
    truth = case.statistics(*wanted, backend="dense")
    with tiles(rows, columns):
        found = case.statistics(*wanted)
        loss = mixed_loss(found)
        found_gradients = gradients(loss, case.leaves) if loss.requires_grad else ()
    for name in wanted:
        torch.testing.assert_close(found[name], truth[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
        assert found[name].requires_grad == (name not in DETACHED)
    if found_gradients:
        for ours, theirs in zip(found_gradients, gradients(mixed_loss(truth), case.leaves), strict=True):
            torch.testing.assert_close(ours, theirs, **TIGHT)


@given(
    tokens=st.integers(0, 5),
    vocab=st.integers(2, 9),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 10)),
    scale=st.sampled_from([1.0, 0.25, -2.0]),
    softcap=st.sampled_from([None, 0.5, 5.0]),
    bias=st.booleans(),
    rank=st.integers(0, 2),
    temperature=st.sampled_from([1.0, 0.3, 4.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_equals_dense_for_any_shape_and_head(tokens, vocab, tile, seed, **head):
    case = problem(tokens, vocab, 3, seed=seed, size=2.0, **head)
    assert_same(case, *STATISTICS, rows=tile[0], columns=tile[1])


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_alone_equals_dense(name):
    case = problem(5, 11, 4, bias=True, rank=2, softcap=3.0)
    assert_same(case, name, rows=2, columns=4)
    values = case.statistics(name).as_dict()
    assert set(values) == {name}


def test_a_vocabulary_of_one():
    case = problem(3, 1, 2)
    names = [name for name in STATISTICS if name != "max_nontarget_logit"]
    for backend in ("dense", "streamed"):
        values = case.statistics(*STATISTICS, backend=backend)
        assert (values["max_nontarget_logit"] == -torch.inf).all(), "the maximum of nothing"
        assert all(values[name].isfinite().all() for name in names)
        assert (values["logp"] == 0).all() and (values["is_top1"] == 1).all()
        loss = mixed_loss(case.statistics(*names, backend=backend)) + values["max_nontarget_logit"].exp().sum()
        assert all(gradient.isfinite().all() for gradient in gradients(loss, case.leaves))


def test_equal_logits_pick_the_first():
    weight = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(2, 1, dtype=torch.float64)
    with tiles(1, 2):
        values = vocab_statistics(hidden, LMHead(weight), torch.tensor([0, 1]), ("max_logit", "is_top1"))
        values["max_logit"].sum().backward()
    assert values["is_top1"].tolist() == [1.0, 0.0]
    assert weight.grad[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0]


def test_no_tokens_stay_connected():
    case = problem(0, 6, 3, bias=True, rank=1)
    for backend in ("dense", "streamed"):
        values = case.statistics(*STATISTICS, backend=backend)
        assert values["logp"].shape == (0,) and values["ids_logp"].shape == (0, 3)
        found = gradients(mixed_loss(values), case.leaves)
        pairs = zip(found, case.leaves, strict=True)
        assert all((gradient == 0).all() and gradient.shape == leaf.shape for gradient, leaf in pairs)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_tensors_get_no_gradient(frozen, monkeypatch):
    made = []
    original = gradients_module.Gradients.finish
    monkeypatch.setattr(
        gradients_module.Gradients, "finish", lambda self: (made.append(set(self.sums)), original(self))[1]
    )
    case = problem(4, 6, 3, bias=True, rank=1)
    parts = {"hidden": case.leaves[:1], "head": case.leaves[1:]}
    for leaf in parts[frozen]:
        leaf.requires_grad_(False)
    case.statistics("logp")["logp"].sum().backward()
    assert all(leaf.grad is None for leaf in parts[frozen])
    expected = {"head": {"hidden"}, "hidden": {"weight", "bias", "hidden2", "matrix"}}[frozen]
    assert made == [expected], "no memory for what nobody asked for"


def test_only_incoming_gradients_are_propagated(monkeypatch):
    arrived = []
    original = passes.coefficients
    monkeypatch.setattr(passes, "coefficients", lambda g, *rest: (arrived.append(set(g)), original(g, *rest))[1])
    values = problem(4, 6, 3).statistics(*STATISTICS)
    (values["entropy"] + values["jsd"]).sum().backward()
    assert arrived == [{"entropy", "jsd"}]


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    inputs, targets = torch.tensor([1, 4, 4]), torch.tensor([4, 4, 0])

    def grad(backend):
        values = vocab_statistics(embedding[inputs].tanh(), LMHead(embedding), targets, ("logp",), backend=backend)
        return torch.autograd.grad(values["logp"].sum(), embedding)[0]

    torch.testing.assert_close(grad("streamed"), grad("dense"), **TIGHT)


def test_the_teacher_is_a_constant_even_with_a_shared_head():
    case = problem(4, 6, 3)
    hidden = case.options["teacher"][0].requires_grad_()
    options = {"teacher": (case.hidden, dataclasses.replace(case.head, scale=0.5)), "jsd_beta": 0.4}
    names = ("forward_kl", "reverse_kl", "jsd", "teacher_logp", "teacher_entropy")
    found, truth = (
        gradients(mixed_loss(case.statistics(*names, **options, backend=backend)), [*case.leaves, hidden])
        for backend in ("streamed", "dense")
    )
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    same = case.statistics("forward_kl", teacher=(case.hidden, case.head))["forward_kl"]
    assert same.abs().max() < 1e-15 and gradients(same.sum(), case.leaves)[0].abs().max() < 1e-15


def second_derivative(loss, leaf):
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    # The second term alone would give an answer, silently without the first.
    return torch.autograd.grad(first.square().sum() + leaf.pow(3).sum(), leaf)


def test_a_double_backward_raises():
    case = problem(3, 5, 2)
    ones = torch.ones(3)
    losses = {
        "statistics": lambda: case.statistics("entropy")["entropy"].sum(),
        "loss": lambda: vocab_loss(case.hidden, case.head, case.targets, ("logp",), lambda s: s.logp, ones)[0],
        "map": lambda: map_logits(lambda z: z.logsumexp(1), case.hidden, case.head).sum(),
    }
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="first derivatives only"):
            second_derivative(loss(), case.hidden)
        torch.autograd.grad(loss(), case.hidden, create_graph=True)
    second_derivative(case.statistics("entropy", backend="dense")["entropy"].sum(), case.hidden)


def test_a_retained_graph_and_an_outer_checkpoint():
    case = problem(4, 7, 3)

    def loss():
        return mixed_loss(case.statistics(*DIFFERENTIABLE))

    with tiles(2, 3):
        held = loss()
        first = torch.autograd.grad(held, case.leaves, retain_graph=True)
        again = torch.autograd.grad(held, case.leaves)
        inside = torch.autograd.grad(checkpoint(loss, use_reentrant=False), case.leaves)
    for a, b, c in zip(first, again, inside, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_without_gradient_mode_nothing_is_tied():
    case = problem()
    with torch.no_grad():
        assert not case.statistics("logp")["logp"].requires_grad
    assert case.statistics("logp").detach()["logp"].requires_grad is False


def test_noncontiguous_tensors():
    case = problem(4, 6, 3)
    hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
    weight = case.head.weight.detach().T.contiguous().T.requires_grad_()
    odd = case.with_leaves([hidden, weight])
    with tiles(2, 3):
        loss, truth = mixed_loss(odd.statistics(*DIFFERENTIABLE)), mixed_loss(case.statistics(*DIFFERENTIABLE))
    for ours, theirs in zip(gradients(loss, odd.leaves), gradients(truth, case.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_a_token_ruled_out_by_its_bias():
    case = problem(4, 6, 3, bias=True)
    with torch.no_grad():
        case.head.bias[:2] = -torch.inf
    targets = case.targets.clamp(min=2)
    names = ("logp", "logsumexp", "max_logit", "is_top1")
    found = []
    for backend in ("streamed", "dense"):
        with tiles(2, 1):
            values = vocab_statistics(case.hidden, case.head, targets, names, backend=backend)
            found.append((values.as_dict(), gradients(mixed_loss(values), case.leaves)))
    torch.testing.assert_close(found[0], found[1], **TIGHT)
    assert all(gradient.isfinite().all() for gradient in found[0][1])
