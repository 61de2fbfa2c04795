"""Distillation against real logits and teachers, and padding that leaves no trace."""

import math

import pytest
import torch

from posttrain.objectives.distillation import forward_kl, jsd, logits_finetuning, reverse_kl
from tests.objectives.truth import DTYPES, Rows, gradient


def topk(rows: Rows, k: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of a random teacher over the same vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows.z.shape, generator=generator, dtype=torch.float64).mul(2).log_softmax(1)
    logp, ids = teacher.topk(k)
    return ids, logp


def test_logits_finetuning_by_hand():
    # policy (1/2, 1/4) at the two ids, teacher (0.6, 0.2) there, so T = (3/4, 1/4); target probability 1/2
    loss = logits_finetuning(
        torch.tensor([math.log(0.5)]),
        torch.tensor([[math.log(0.5), math.log(0.25)]]),
        torch.tensor([[math.log(0.6), math.log(0.2)]]),
        alpha=0.9,
    )
    # KL = 3/4 ln(3/2) + 1/4 ln 1 = 0.3040988; 0.9 ln 2 + 0.1 KL
    assert loss.metrics["kl"].item() == pytest.approx(0.30409883, rel=1e-6)
    assert loss.values.item() == pytest.approx(0.65424235, rel=1e-6)
    assert loss.metrics["teacher_mass"].item() == pytest.approx(0.8, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9, 1.0])
def test_logits_finetuning_s_logit_gradient(alpha):
    rows = Rows()
    ids, teacher = topk(rows, 4)

    def loss():
        return logits_finetuning(rows.logp, rows.z.log_softmax(1).gather(1, ids), teacher, alpha=alpha).values

    target = torch.zeros_like(rows.s).scatter(1, ids, teacher.exp() / teacher.exp().sum(1, keepdim=True))
    expected = alpha * (rows.s - rows.e) + (1 - alpha) * (rows.s - target)
    torch.testing.assert_close(rows.logits_gradient(loss), expected)


def test_with_all_of_the_vocabulary_it_is_the_plain_kl():
    rows = Rows()
    ids, teacher = topk(rows, rows.vocab)
    policy = rows.z.log_softmax(1).gather(1, ids)
    found = logits_finetuning(rows.logp, policy, teacher, alpha=0.0).values
    torch.testing.assert_close(found, (teacher.exp() * (teacher - policy)).sum(1))
    assert (found > 0).all()
    perfect = logits_finetuning(rows.logp, policy, policy, alpha=0.0).values
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), rtol=0, atol=1e-12)


def test_padding_slots_change_nothing():
    rows = Rows()
    ids, teacher = topk(rows, 3)
    padded_ids = torch.cat([ids, torch.zeros_like(ids[:, :2])], 1)
    padded = torch.cat([teacher, torch.full_like(teacher[:, :2], -math.inf)], 1)

    def loss(ids, teacher):
        return logits_finetuning(rows.logp, rows.z.log_softmax(1).gather(1, ids), teacher, alpha=0.5).values

    torch.testing.assert_close(loss(padded_ids, padded), loss(ids, teacher))
    found = rows.logits_gradient(lambda: loss(padded_ids, padded))
    torch.testing.assert_close(found, rows.logits_gradient(lambda: loss(ids, teacher)))


def test_a_token_without_any_teacher_learns_from_its_target():
    rows = Rows(tokens=3)
    ids = torch.zeros(3, 2, dtype=torch.long)
    nothing = torch.full((3, 2), -math.inf, dtype=torch.float64)

    def loss():
        return logits_finetuning(rows.logp, rows.z.log_softmax(1).gather(1, ids), nothing, alpha=0.9)

    torch.testing.assert_close(loss().values, -0.9 * rows.logp)
    torch.testing.assert_close(rows.logits_gradient(lambda: loss().values), 0.9 * (rows.s - rows.e))
    assert loss().metrics["teacher_mass"].tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_finetuning_at_the_extremes(dtype):
    logp = torch.tensor([0.0, -1e4], dtype=dtype, requires_grad=True)
    ids_logp = torch.tensor([[0.0, -1e4], [-1e4, -1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0], [-1e4, -2e4]], dtype=dtype)
    values = logits_finetuning(logp, ids_logp, teacher).values
    assert values.isfinite().all()
    assert gradient(values, logp).isfinite().all() and gradient(values, ids_logp).isfinite().all()


def test_the_teacher_is_a_constant():
    teacher = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    ids_logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    values = logits_finetuning(torch.tensor([-1.0]), ids_logp, teacher).values
    assert (gradient(values, teacher) == 0).all() and (gradient(values, ids_logp) != 0).all()


@pytest.mark.parametrize(
    ("shapes", "alpha", "message"),
    [
        (((2,), (2, 3), (2, 4)), 0.9, "teacher_ids_logp has"),
        (((3,), (2, 3), (2, 3)), 0.9, r"logp has \(3,\)"),
        (((2,), (2, 3), (2, 3)), 1.5, "alpha is 1.5"),
    ],
)
def test_contracts(shapes, alpha, message):
    with pytest.raises(ValueError, match=message):
        logits_finetuning(*(torch.full(shape, -1.0) for shape in shapes), alpha=alpha)


def divergences(rows: Rows, log_t: torch.Tensor, b: float) -> dict[str, torch.Tensor]:
    log_s = rows.z.log_softmax(1)
    log_m = (b * log_t.exp() + (1 - b) * log_s.exp()).log()
    to_m = b * (log_t.exp() * (log_t - log_m)).sum(1) + (1 - b) * (log_s.exp() * (log_s - log_m)).sum(1)
    return {
        "forward": (log_t.exp() * (log_t - log_s)).sum(1),
        "reverse": (log_s.exp() * (log_s - log_t)).sum(1),
        "jsd": to_m,
    }


def test_divergences_have_the_logit_gradients_that_their_docstrings_state():
    rows, b = Rows(), 0.3
    generator = torch.Generator().manual_seed(2)
    log_t = torch.randn(rows.z.shape, generator=generator, dtype=torch.float64).log_softmax(1)
    s, t = rows.s, log_t.exp()

    def found(objective, name):
        return rows.logits_gradient(lambda: objective(divergences(rows, log_t, b)[name]).values)

    def pulled(log_ratio):
        return s * (log_ratio - (s * log_ratio).sum(1, keepdim=True))

    torch.testing.assert_close(found(forward_kl, "forward"), s - t)
    torch.testing.assert_close(found(reverse_kl, "reverse"), pulled((s / t).log()))
    torch.testing.assert_close(found(jsd, "jsd"), (1 - b) * pulled((s / (b * t + (1 - b) * s)).log()))


def test_divergences_pass_their_statistic_through():
    values = torch.tensor([0.0, 0.6931, 1e4])
    for objective in (forward_kl, reverse_kl, jsd):
        assert torch.equal(objective(values).values, values)
