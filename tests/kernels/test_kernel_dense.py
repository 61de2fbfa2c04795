"""The truth checked against other truths: numbers by hand, scipy, torch.distributions."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy
from torch.distributions import Categorical, kl_divergence

from posttrain.kernels import LMHead, vocab_statistics
from posttrain.kernels.table import STATISTICS
from tests.kernels.problems import problem

# p = (1/4, 3/4) and, for the teacher, t = (1/2, 1/2), with logits (0, ln 3) + 5.
BY_HAND = {
    "logp": math.log(3 / 4),
    "logsumexp": 5 + math.log(4),
    "entropy": 2 * math.log(2) - 0.75 * math.log(3),
    "mean_logit": 5 + math.log(3) / 2,
    "mean_square_logit": (25 + (5 + math.log(3)) ** 2) / 2,
    "log_sum_sq_probs": math.log(10 / 16),
    "max_logit": 5 + math.log(3),
    "max_nontarget_logit": 5.0,
    "surprisal_variance": 3 / 16 * math.log(3) ** 2,
    "is_top1": 1.0,
    "forward_kl": math.log(2) - 0.5 * math.log(3),
    "reverse_kl": 0.75 * math.log(3) - math.log(2),
    "teacher_logp": -math.log(2),
    "teacher_entropy": math.log(2),
}


def two_token_vocabulary(backend, *names, **options):
    teacher = (torch.ones(1, 1, dtype=torch.float64), LMHead(torch.zeros(2, 1, dtype=torch.float64)))
    weight = torch.tensor([[5.0], [5.0 + math.log(3)]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    options = {"teacher": teacher, "ids": torch.tensor([[1, 0, 1]]), "k": 2} | options
    return vocab_statistics(hidden, LMHead(weight), torch.tensor([1]), names, backend=backend, **options)


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize("name", BY_HAND)
def test_two_tokens_by_hand(name, backend):
    assert two_token_vocabulary(backend, name)[name].item() == pytest.approx(BY_HAND[name], rel=1e-14)


@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_picks_by_hand(backend):
    values = two_token_vocabulary(backend, "ids_logp", "topk_logp", "topk_ids")
    large, small = math.log(3 / 4), math.log(1 / 4)
    torch.testing.assert_close(values["ids_logp"], torch.tensor([[large, small, large]], dtype=torch.float64))
    torch.testing.assert_close(values["topk_logp"], torch.tensor([[large, small]], dtype=torch.float64))
    assert values["topk_ids"].tolist() == [[1, 0]] and values["topk_ids"].dtype == torch.int64


@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_jsd_by_hand(backend):
    # m = t/4 + 3p/4 = (5/16, 11/16)
    to_teacher = 0.5 * math.log(0.5 / (5 / 16)) + 0.5 * math.log(0.5 / (11 / 16))
    to_student = 0.25 * math.log(0.25 / (5 / 16)) + 0.75 * math.log(0.75 / (11 / 16))
    value = two_token_vocabulary(backend, "jsd", jsd_beta=0.25)["jsd"].item()
    assert value == pytest.approx(0.25 * to_teacher + 0.75 * to_student, rel=1e-13)
    assert two_token_vocabulary(backend, "jsd", jsd_beta=0.0)["jsd"].item() == pytest.approx(BY_HAND["forward_kl"])
    assert two_token_vocabulary(backend, "jsd", jsd_beta=1.0)["jsd"].item() == pytest.approx(BY_HAND["reverse_kl"])


def logits_by_numpy(case, hidden=None, head=None):
    """z with one token at a time and no matrix product."""
    hidden = case.hidden if hidden is None else hidden
    head = case.head if head is None else head
    rows = []
    for n in range(hidden.shape[0]):
        row = (head.weight.detach().numpy() * hidden[n].detach().numpy()).sum(1)
        if head.bias is not None:
            row = row + head.bias.detach().numpy()
        if head.low_rank is not None:
            row = row + (head.low_rank[1] * head.low_rank[0][n]).sum(1).detach().numpy()
        row = row * head.scale
        if head.softcap is not None:
            row = np.tanh(row / head.softcap) * head.softcap
        rows.append(row / case.options["temperature"])
    return np.stack(rows)


def truth_by_scipy(case):
    z = logits_by_numpy(case)
    u = logits_by_numpy(case, *case.options["teacher"])
    y, ids, beta = case.targets.numpy(), case.options["ids"].numpy(), case.options["jsd_beta"]
    tokens = np.arange(len(y))
    logp, logt = log_softmax(z, 1), log_softmax(u, 1)
    p, t = np.exp(logp), np.exp(logt)
    student, teacher = Categorical(torch.from_numpy(p)), Categorical(torch.from_numpy(t))
    m = beta * t + (1 - beta) * p
    order = np.argsort(-z, 1)[:, : case.options["k"]]
    others = [np.delete(row, target).max() for row, target in zip(z, y, strict=True)]
    return {
        "logp": student.log_prob(case.targets).numpy(),
        "logsumexp": logsumexp(z, 1),
        "entropy": entropy(p, axis=1),
        "mean_logit": z.mean(1),
        "mean_square_logit": (z**2).mean(1),
        "log_sum_sq_probs": np.log((p**2).sum(1)),
        "max_logit": z.max(1),
        "max_nontarget_logit": np.array(others),
        "ids_logp": logp[tokens[:, None], ids],
        "topk_logp": np.take_along_axis(logp, order, 1),
        "topk_ids": order,
        "surprisal_variance": np.array([np.cov(lp, aweights=w, ddof=0) for lp, w in zip(logp, p, strict=True)]),
        "is_top1": (z.argmax(1) == y).astype(float),
        "forward_kl": kl_divergence(teacher, student).numpy(),
        "reverse_kl": kl_divergence(student, teacher).numpy(),
        "jsd": beta * entropy(t, m, axis=1) + (1 - beta) * entropy(p, m, axis=1),
        "teacher_logp": logt[tokens, y],
        "teacher_entropy": entropy(t, axis=1),
    }


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_statistic_against_scipy(softcap):
    case = problem(tokens=9, scale=1.4, softcap=softcap, bias=True, rank=2, temperature=0.7, size=2.0)
    truth = truth_by_scipy(case)
    assert set(truth) == set(STATISTICS)
    values = case.statistics(*STATISTICS, backend="dense").as_dict()
    for name, expected in truth.items():
        np.testing.assert_allclose(values[name].detach().numpy(), expected, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_jsd_at_one_half_is_the_jensen_shannon_divergence(backend):
    case = problem()
    p = np.exp(log_softmax(logits_by_numpy(case), 1))
    t = np.exp(log_softmax(logits_by_numpy(case, *case.options["teacher"]), 1))
    value = case.statistics("jsd", jsd_beta=0.5, backend=backend)["jsd"]
    np.testing.assert_allclose(value.detach().numpy(), jensenshannon(p, t, axis=1) ** 2, rtol=1e-10)


def test_the_dense_gradient_of_logp_is_the_indicator_less_p():
    case = problem()
    weight = torch.eye(4, dtype=torch.float64)
    hidden = case.hidden.detach().requires_grad_()
    vocab_statistics(hidden, LMHead(weight), case.targets % 4, ("logp",), backend="dense")["logp"].sum().backward()
    p = hidden.detach().softmax(1)
    torch.testing.assert_close(hidden.grad, torch.nn.functional.one_hot(case.targets % 4, 4) - p)
