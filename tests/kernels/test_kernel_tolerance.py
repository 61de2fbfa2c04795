"""A gradient tolerance: what is left out, what is promised, and that the promise holds."""

import pytest
import torch

from posttrain.kernels import LMHead, record_certificates, tolerance, vocab_loss, vocab_statistics
from posttrain.kernels.tolerance import keep_rows
from tests.kernels.problems import gradients, problem, tiles

WIDTH, VOCAB = 8, 50


def confident(tokens=60, *, seed=0, share=0.7, **head):
    """Tokens of which `share` are predicted with a probability near 1: their hidden state is the target's row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    weight = weight / weight.norm(dim=1, keepdim=True)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    sure = int(share * tokens)
    hidden[:sure] = weight[targets[:sure]] * (40 + 20 * torch.rand(sure, 1, generator=generator, dtype=torch.float64))
    return hidden.requires_grad_(), LMHead(weight.requires_grad_(), **head), targets


def backward(hidden, head, targets, weight, epsilon, **options):
    """Gradients of hidden states and head, and the certificate."""
    leaves = [t for t in (hidden, head.weight, head.bias, *(head.low_rank or ())) if t is not None and t.requires_grad]
    with record_certificates() as certificates:
        values = vocab_statistics(hidden, head, targets, ("logp",), gradient_tolerance=epsilon, **options)
    return gradients((weight * values["logp"]).sum(), leaves), certificates


def joint(parts):
    return torch.cat([part.flatten() for part in parts])


def relative(found, exact):
    return ((joint(found) - joint(exact)).norm() / joint(exact).norm()).item()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("extra", ["plain", "bias", "low_rank", "scaled"])
def test_the_true_error_is_within_the_bounds(extra, epsilon):
    hidden, head, targets = confident()
    normal = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return (0.1 * torch.randn(*shape, generator=normal, dtype=torch.float64)).requires_grad_()

    options = {}
    if extra == "bias":
        head = LMHead(head.weight, leaf(VOCAB))
    if extra == "low_rank":
        head = LMHead(head.weight, low_rank=(leaf(60, 2), leaf(VOCAB, 2)))
    if extra == "scaled":
        head, options = LMHead(head.weight, scale=-0.9, softcap=60.0), {"temperature": 1.3}
    weight = torch.linspace(-2.0, 2.0, 60, dtype=torch.float64)
    exact, nothing = backward(hidden, head, targets, weight, 0.0, **options)
    found, (certificate,) = backward(hidden, head, targets, weight, epsilon, **options)
    assert nothing == []
    sides = ([0], [1]) if extra != "low_rank" else ([0, 2], [1, 3])
    sides = (sides[0], [1, 2]) if extra == "bias" else sides
    for places, bound in zip(sides, (certificate.hidden_bound, certificate.head_bound), strict=True):
        error = relative([found[i] for i in places], [exact[i] for i in places])
        assert error <= bound.item() * (1 + 1e-9) or error == 0.0
    assert certificate.head_bound.item() <= epsilon
    assert certificate.rows == 60
    if epsilon == 1e-1 and extra != "scaled":
        assert certificate.dropped.item() > 20, "confident tokens do go"


def test_closed_form_of_one_dropped_row():
    """Two tokens, two entries: g = w (1 - p) (1, -1), so both bounds are met with equality or known slack."""
    hidden = torch.tensor([[9.0], [0.1]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 0])
    found, (certificate,) = backward(hidden, LMHead(weight), targets, torch.ones(2, dtype=torch.float64), 0.01)
    assert certificate.dropped.item() == 1
    q = 1 / (1 + torch.exp(torch.tensor(18.0, dtype=torch.float64)))
    kept = 0.1 / (1 + torch.exp(torch.tensor(0.2, dtype=torch.float64)))
    error = 2**0.5 * q * 9
    expected = error / (2**0.5 * kept - error)
    torch.testing.assert_close(certificate.head_bound, expected, rtol=1e-6, atol=0.0)
    assert found[0][0].item() == 0.0
    torch.testing.assert_close(found[1][:, 0], torch.stack([kept, -kept]), rtol=1e-12, atol=0.0)


def test_an_up_weighted_token_is_never_lost():
    hidden, head, targets = confident()
    weight = torch.ones(60, dtype=torch.float64)
    plain, _ = backward(hidden, head, targets, weight, 0.05)
    assert (plain[0][:40] == 0).all(1).any(), "sure tokens go"
    dropped = int((plain[0][:40] == 0).all(1).nonzero()[0, 0])
    weight[dropped] = 1e12
    found, _ = backward(hidden, head, targets, weight, 0.05)
    exact, _ = backward(hidden, head, targets, weight, 0.0)
    assert not (found[0][dropped] == 0).all()
    assert relative(found[1:], exact[1:]) <= 0.05


def test_a_token_with_another_gradient_stays():
    hidden, head, targets = confident()
    other = torch.zeros(60, dtype=torch.float64)
    other[3] = 1.0
    results = []
    for epsilon in (0.0, 0.1):
        values = vocab_statistics(hidden, head, targets, ("logp", "mean_logit"), gradient_tolerance=epsilon)
        results.append(gradients((values["logp"] + other * values["mean_logit"]).sum(), [hidden]))
    torch.testing.assert_close(results[1][0][3], results[0][0][3], rtol=1e-10, atol=1e-12)
    assert (results[1][0][:40] == 0).all(1).any()


def test_rows_are_put_back_where_the_estimate_promised_too_much(monkeypatch):
    hidden, head, targets = confident()
    weight = torch.ones(60, dtype=torch.float64)
    _, (usual,) = backward(hidden, head, targets, weight, 1e-3)
    estimate = tolerance._Bounds.estimated_norm
    monkeypatch.setattr(tolerance._Bounds, "estimated_norm", lambda self: 40 * estimate(self))
    found, (certificate,) = backward(hidden, head, targets, weight, 1e-3)
    exact, _ = backward(hidden, head, targets, weight, 0.0)
    assert relative(found[1:], exact[1:]) <= certificate.head_bound.item() <= 1e-3
    assert certificate.dropped.item() > 0.3 * usual.dropped.item() > 0, "chosen again by the norm of what was kept"


def test_all_rows_are_put_back_where_nothing_else_helps(monkeypatch):
    hidden, head, targets = confident()
    weight = torch.ones(60, dtype=torch.float64)
    monkeypatch.setattr(tolerance, "_MARGIN", 1e9)
    found, (certificate,) = backward(hidden, head, targets, weight, 1e-3)
    exact, _ = backward(hidden, head, targets, weight, 0.0)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    assert certificate.dropped.item() == 0 and certificate.head_bound.item() == 0


def test_a_frozen_head_is_judged_by_the_hidden_states():
    hidden, head, targets = confident()
    head.weight.requires_grad_(False)
    weight = torch.ones(60, dtype=torch.float64)
    found, (certificate,) = backward(hidden, head, targets, weight, 1e-2)
    exact, _ = backward(hidden, head, targets, weight, 0.0)
    assert 0 < certificate.dropped.item() < 60
    assert relative(found, exact) <= certificate.hidden_bound.item() <= 1e-2
    assert certificate.head_bound.item() == 0


def test_float32_and_tiles():
    hidden, head, targets = confident(200, share=0.9)
    single = hidden.detach().float().requires_grad_()
    head32 = LMHead(head.weight.detach().float().requires_grad_())
    weight = torch.ones(200)
    exact, _ = backward(hidden, head, targets, weight.double(), 0.0)
    with tiles(64, 16):
        found, (certificate,) = backward(single, head32, targets, weight, 1e-3)
    assert certificate.dropped.item() > 50
    assert relative([found[1].double()], [exact[1]]) <= 1e-3


def test_what_a_float32_sum_over_many_tiles_loses_is_allowed_for():
    """Each tile adds less than a rounding to the total: its 1 - p is smaller than the true one, the bound is not."""
    vocab, gap = 4096, 17.5
    weight = torch.zeros(vocab, 1)
    weight[0] = 1.0
    hidden = torch.tensor([[gap], [0.2]])
    targets = torch.tensor([0, 5])
    exact = backward(
        hidden.double().requires_grad_(), LMHead(weight.double().requires_grad_()), targets, torch.ones(2), 0.0
    )
    with tiles(2, 1):
        head = LMHead(weight.requires_grad_())
        found, (certificate,) = backward(hidden.requires_grad_(), head, targets, torch.ones(2), 0.9)
    error = relative([found[1].double()], [exact[0][1]])
    assert error <= certificate.head_bound.item()


def test_a_batch_without_tokens():
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    weight = torch.zeros(VOCAB, WIDTH, requires_grad=True)
    with record_certificates() as outer, record_certificates() as inner:
        values = vocab_statistics(
            hidden, LMHead(weight), torch.zeros(0, dtype=torch.int64), ("logp", "entropy"), gradient_tolerance=0.1
        )
    (values["logp"].sum() + values["entropy"].sum()).backward()
    assert (weight.grad == 0).all() and hidden.grad.shape == (0, WIDTH)
    assert len(outer) == len(inner) == 1, "every open list gets the certificate"


def test_keep_rows_by_hand():
    bounds = torch.tensor([3.0, 1.0, torch.inf, 2.0, 0.0])
    assert keep_rows(bounds, torch.tensor(3.0)).tolist() == [True, False, True, False, False]
    assert keep_rows(bounds, torch.tensor(0.0)).tolist() == [True, True, True, True, False]


def test_one_pass_has_none():
    case = problem(4, 6, 3)
    ones = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no gradient_tolerance, found 0\.1"):
        vocab_loss(case.hidden, case.head, case.targets, ("logp",), lambda s: s.logp, ones, gradient_tolerance=0.1)
