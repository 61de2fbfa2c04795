"""The Triton backend as callers meet it, through the same loops as the torch one, under the interpreter."""

from importlib.util import find_spec

import pytest
import torch

from posttrain.kernels import DETACHED, STATISTICS, triton, vocab_loss
from posttrain.kernels.backends import resolve_backend
from posttrain.kernels.projection import Projection
from tests.kernels.problems import gradients, mixed_loss, problem, tiles

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or triton.unavailable(torch.device("cpu")) is not None,
    reason="needs triton and its interpreter",
)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
HEADS = {"plain": {}, "everything": {"softcap": 8.0, "scale": 0.9, "temperature": 1.2, "bias": True, "rank": 2}}


def cases(name):
    """The problem in float32, and the same numbers in float64."""
    case = problem(5, 21, 6, dtype=torch.float32, **HEADS[name])
    return case, case.to(torch.float64)


@pytest.mark.parametrize("budget", [None, "auto"])
@pytest.mark.parametrize("name", HEADS)
def test_statistics_and_gradients(name, budget):
    case, exact = cases(name)
    truth = exact.statistics(*STATISTICS, backend="dense")
    with tiles(3, 8):
        found = case.statistics(*STATISTICS, backend="triton", budget=budget)
        grads = gradients(mixed_loss(found), case.leaves)
    for statistic, value in truth.as_dict().items():
        torch.testing.assert_close(found[statistic].to(value.dtype), value, msg=statistic, **CLOSE)
    for one, other in zip(grads, gradients(mixed_loss(truth), exact.leaves), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_logits_that_never_reach_memory(name, monkeypatch):
    monkeypatch.setattr(triton, "fused_forward_is_better", lambda *_: True)
    monkeypatch.setattr(Projection, "logits", lambda *_: pytest.fail("a tile of logits was formed"))
    case, exact = cases(name)
    names = tuple(n for n in STATISTICS if n not in ("ids_logp", "topk_logp", "topk_ids")[:3] and "teacher" not in n)
    names = tuple(n for n in names if n not in ("forward_kl", "reverse_kl", "jsd"))
    options = {"temperature": case.options["temperature"], "teacher": None}
    found = case.statistics(*names, backend="triton", **options)
    truth = exact.statistics(*names, backend="dense", **options)
    for statistic, value in truth.as_dict().items():
        torch.testing.assert_close(found[statistic].to(value.dtype), value, msg=statistic, **CLOSE)
    grads, expected = (gradients(mixed_loss(v), c.leaves) for v, c in ((found, case), (truth, exact)))
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_one_pass(name):
    case, exact = cases(name)
    names = ("logp", "entropy", "mean_logit", "jsd")
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])

    def phi(values):
        return values.logp.square() + values.entropy * values.mean_logit + values.jsd

    expected = (mask.double() * phi(exact.statistics(*names, backend="dense"))).sum()
    with tiles(3, 8):
        loss, _ = vocab_loss(case.hidden, case.head, case.targets, names, phi, mask, backend="triton", **case.options)
        found = gradients(loss, case.leaves)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    for one, other in zip(found, gradients(expected, exact.leaves), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def test_a_processor_takes_it_only_when_asked():
    assert resolve_backend("auto", torch.device("cpu")) == "streamed"
    assert {"topk_ids", "is_top1"} <= DETACHED
