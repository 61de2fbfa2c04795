"""Logits of ±1e4: values and gradients are finite and right."""

import pytest
import torch

from posttrain.kernels import DETACHED, STATISTICS, LMHead, vocab_loss, vocab_statistics
from tests.kernels.problems import gradients, tiles

FAR = 1e4
# One token each, every logit given; the same rows in reverse order are the teacher's.
LOGITS = torch.tensor(
    [
        [FAR, -FAR, 0, 0, 1, -1],
        [-FAR, FAR, -FAR, -FAR, -FAR, -FAR],
        [FAR, FAR, FAR, FAR, FAR, FAR],
        [-FAR, -FAR, -FAR, -FAR, -FAR, -FAR],
        [FAR, FAR - 1, -FAR, FAR - 2, 0, 1],
        [0, 0, 0, 0, 0, 0],
        [-FAR, -FAR + 3, 0, 2, -FAR, FAR / 2],
    ]
)
TARGETS = torch.tensor([0, 0, 3, 5, 1, 2, 4])
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def ask(dtype, names, backend="streamed"):
    """Statistics with the logits as hidden states and the identity as head, so that dz is the hidden gradient."""
    hidden = LOGITS.to(dtype).requires_grad_()
    weight = torch.eye(6, dtype=dtype, requires_grad=True)
    teacher = (LOGITS.flip(0).to(dtype), LMHead(torch.eye(6, dtype=dtype)))
    options = {"ids": torch.tensor([[0, 5, 0]]).expand(7, 3), "k": 4, "teacher": teacher, "jsd_beta": 0.3}
    values = vocab_statistics(hidden, LMHead(weight), TARGETS, names, backend=backend, **options)
    return values, hidden, weight


@pytest.mark.parametrize("columns", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STATISTICS)
def test_far_logits(name, dtype, columns):
    truth, *exact = ask(torch.float64, (name,), "dense")
    with tiles(3, columns):
        values, *leaves = ask(dtype, (name,))
        value = values[name]
        if name != "topk_ids":
            torch.testing.assert_close(value.double(), truth[name], **TOLERANCE)
        if name in DETACHED:
            return
        found = gradients(value.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in found)
    expected = gradients(truth[name].sum(), exact)
    if name == "topk_logp":
        # Equal logits may be picked in any order; the sum over a row of dz is zero in any case.
        assert found[0].sum(1).abs().max() < 1e-5
        return
    torch.testing.assert_close(found[0].double(), expected[0], **TOLERANCE)


def test_far_logits_in_a_loss():
    names = ("logp", "entropy", "surprisal_variance", "log_sum_sq_probs")
    hidden = LOGITS.clone().requires_grad_()
    weight = torch.eye(6, requires_grad=True)

    def phi(s):
        return s.logp.exp() + s.entropy * s.surprisal_variance - s.log_sum_sq_probs

    with tiles(2, 2):
        loss, _ = vocab_loss(hidden, LMHead(weight), TARGETS, names, phi, torch.ones(7))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(loss, [hidden, weight]))


def test_the_variance_of_nearly_equal_far_logits():
    """Two groups of logits 1e-3 apart at 1e4, where the difference of squares has no digit left."""
    hidden = torch.ones(1, 1)
    weight = torch.full((1000, 1), 16.0)
    weight[::2] += 2.0**-10
    with tiles(1, 64):
        found = vocab_statistics(hidden, LMHead(weight), torch.tensor([0]), ("surprisal_variance",))
    assert found["surprisal_variance"].item() == pytest.approx(2.0**-20 / 4, rel=1e-3)


def test_a_saturated_softcap():
    hidden = LOGITS.clone().requires_grad_()
    head = LMHead(torch.eye(6), softcap=30.0)
    with tiles(3, 2):
        values = vocab_statistics(hidden, head, TARGETS, ("logp", "mean_square_logit", "entropy"))
    total = sum(value.sum() for value in values.as_dict().values())
    assert total.isfinite() and gradients(total, [hidden])[0].isfinite().all()
