"""Unlearning losses of the next-token distribution against dense rows of logits."""

import math

import pytest
import torch

from posttrain.objectives.unlearning_distribution import (
    inverted_hinge,
    jensen_refusal,
    kl,
    margin_flattening,
    undial,
    uniform_kl,
)
from tests.objectives.truth import Rows, gradient


def teacher_of(rows: Rows, scale: float = 2.0) -> torch.Tensor:
    """Logits of a reference over the same vocabulary."""
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(rows.z.shape, generator=generator, dtype=torch.float64)


def distilled(rows: Rows, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """`undial` from the statistics that the kernels give."""
    r, log_r, log_s = reference.softmax(1), reference.log_softmax(1), rows.z.log_softmax(1)
    return undial(
        rows.logp,
        teacher_logp=log_r.gather(1, rows.targets[:, None])[:, 0],
        forward_kl=(r * (log_r - log_s)).sum(1),
        teacher_entropy=-(r * log_r).sum(1),
        beta=beta,
    ).values


@pytest.mark.parametrize("beta", [0.5, 3.0, 10.0])
def test_undial_is_cross_entropy_with_the_lowered_logits(beta):
    rows = Rows()
    reference = teacher_of(rows)
    target = (reference - beta * rows.e).softmax(1)
    dense = -(target * rows.z.log_softmax(1)).sum(1)
    torch.testing.assert_close(distilled(rows, reference, beta), dense)
    found = rows.logits_gradient(lambda: distilled(rows, reference, beta))
    torch.testing.assert_close(found, rows.s - target)


def test_undial_holds_where_the_reference_has_memorised():
    """1 - r of about 1e-9, where beta = 10 takes the token's share from all to a millionth of the rest."""
    rows = Rows()
    reference = teacher_of(rows, scale=0.3) + 24 * rows.e
    target = (reference - 10 * rows.e).softmax(1)
    found = rows.logits_gradient(lambda: distilled(rows, reference, 10.0))
    torch.testing.assert_close(found, rows.s - target, rtol=0, atol=1e-9)


def test_undial_counts_the_tokens_it_is_given_and_no_others():
    """open-unlearning averages over prompt and padding too; their label -100 is the 100th token from the end there."""
    rows = Rows()
    reference = teacher_of(rows)
    whole = distilled(rows, reference, 10.0)
    rows.z, rows.targets = rows.z.detach()[2:5].requires_grad_(), rows.targets[2:5]
    torch.testing.assert_close(distilled(rows, reference[2:5], 10.0), whole[2:5])


def test_margin_flattening_has_pdu_s_gradient():
    rows = Rows()
    found = rows.logits_gradient(lambda: margin_flattening(rows.z.max(1).values, rows.z.mean(1)).values)
    margin = (rows.z.max(1).values - rows.z.mean(1)).detach()
    largest = torch.nn.functional.one_hot(rows.z.argmax(1), rows.vocab).double()
    torch.testing.assert_close(found, 2 * margin[:, None] * (largest - 1 / rows.vocab))
    flat = torch.zeros(3, dtype=torch.float64)
    assert margin_flattening(flat, flat).values.tolist() == [0, 0, 0]


def test_margin_flattening_is_finite_for_large_logits():
    largest = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = margin_flattening(largest, -largest.detach())
    assert loss.values.isfinite().all() and gradient(loss.values, largest).isfinite().all()


def test_uniform_kl_but_for_its_constant():
    rows = Rows()
    uniform = torch.full_like(rows.s, 1 / rows.vocab)
    dense = (uniform * (uniform.log() - rows.z.log_softmax(1))).sum(1)
    found = uniform_kl(rows.z.logsumexp(1), rows.z.mean(1)).values
    torch.testing.assert_close(found - math.log(rows.vocab), dense)
    torch.testing.assert_close(
        rows.logits_gradient(lambda: uniform_kl(rows.z.logsumexp(1), rows.z.mean(1)).values), rows.s - uniform
    )


def test_uniform_kl_lifts_the_rarest_tokens_too():
    """The authors' 1e-12 under the logarithm takes the gradient of tokens rarer than that."""
    rows = Rows(scale=0.1)
    with torch.no_grad():
        rows.z[:, 0] -= 60
    found = rows.logits_gradient(lambda: uniform_kl(rows.z.logsumexp(1), rows.z.mean(1)).values)
    torch.testing.assert_close(found[:, 0], torch.full_like(found[:, 0], -1 / rows.vocab))


def hinge(rows: Rows, margin: float) -> torch.Tensor:
    others = rows.z.masked_fill(rows.e.bool(), -torch.inf)
    return inverted_hinge(rows.logp, rows.z.logsumexp(1), others.max(1).values, margin=margin).values


@pytest.mark.parametrize("margin", [1.0, 0.2])
def test_inverted_hinge_on_dense_rows(margin):
    rows = Rows()
    s = rows.z.softmax(1)
    p = s.gather(1, rows.targets[:, None])[:, 0]
    other = s.masked_fill(rows.e.bool(), 0).max(1).values
    dense = (margin + p - other).clamp(min=0)
    assert (dense == 0).any() == (margin < 1)
    torch.testing.assert_close(hinge(rows, margin), dense)
    expected = gradient(dense, rows.z)
    torch.testing.assert_close(rows.logits_gradient(lambda: hinge(rows, margin)), expected)


def test_inverted_hinge_is_finite_at_the_ends():
    logp = torch.tensor([0.0, -1e4, -1e4], requires_grad=True)
    logsumexp = torch.tensor([1e4, 1e4, -1e4], requires_grad=True)
    other = torch.tensor([-torch.inf, 1e4, -1e4], requires_grad=True)
    loss = inverted_hinge(logp, logsumexp, other)
    assert loss.values.tolist() == [2.0, 0.0, 0.0]
    for tensor in (logp, logsumexp, other):
        assert gradient(loss.values, tensor).isfinite().all()


def test_jensen_refusal_is_the_divergence_to_a_one_hot_vector():
    rows = Rows()
    ids = torch.arange(7) % 3

    def dense():
        s = rows.z.softmax(1)
        hot = torch.nn.functional.one_hot(ids, rows.vocab).double()
        mixture = (s + hot) / 2
        return ((s * (s / mixture).log()).sum(1) + (1 / mixture).gather(1, ids[:, None])[:, 0].log()) / 2

    def loss():
        return jensen_refusal(rows.z.log_softmax(1).gather(1, ids[:, None])).values

    torch.testing.assert_close(loss(), dense())
    torch.testing.assert_close(rows.logits_gradient(loss), rows.logits_gradient(dense))


def test_jensen_refusal_at_the_ends():
    logp = torch.tensor([[0.0], [-1e-7], [-1.0], [-1e4]], requires_grad=True)
    loss = jensen_refusal(logp)
    assert loss.values.tolist() == pytest.approx([0.0, 0.0, loss.values[2].item(), math.log(2)], abs=1e-6)
    found = gradient(loss.values, logp)[:, 0]
    assert found[0].item() == pytest.approx(-math.log(2) / 2, rel=1e-6) and found[3].item() == 0


def test_kl_is_the_divergence_as_it_comes():
    value = torch.tensor([0.3, 2.0], requires_grad=True)
    assert torch.equal(kl(value).values, value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: undial(x, x, x, x, beta=0.0), "beta is 0.0"),
        (lambda x: inverted_hinge(x, x, x, margin=0.0), "margin is 0.0"),
        (lambda x: inverted_hinge(x, x, x, margin=1.5), "margin is 1.5"),
        (lambda x: undial(x, x[:1], x, x), "teacher_logp"),
    ],
)
def test_settings_without_meaning_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.tensor([-0.5, -1.0]))
