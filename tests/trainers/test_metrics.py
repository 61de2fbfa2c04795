"""What the trainer logs of the gradient tolerance."""

import pytest
import torch
from accelerate import Accelerator

from posttrain.kernels import Certificate
from posttrain.trainers import metrics
from tests import tiny
from tests.trainers.step import step


def certificate(rows, dropped, head_bound, hidden_bound):
    return Certificate(rows, torch.tensor(dropped), torch.tensor(head_bound), torch.tensor(hidden_bound))


def test_shares_by_counts_and_the_largest_bounds_since_the_last_log(monkeypatch):
    lists = iter([[certificate(90, 9, 0.25, 0.5)], [], [certificate(10, 6, 0.125, 0.75)]])

    class Recorder:
        def __enter__(self):
            return next(lists)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(metrics, "record_certificates", Recorder)
    bounds, accelerator = metrics.CertificateBounds(), Accelerator(cpu=True)
    for _ in range(3):
        with bounds.recorded():
            pass
    assert bounds.reduce(accelerator) == {
        "gradient_tolerance/dropped_share": 0.15,
        "gradient_tolerance/head_bound": 0.25,
        "gradient_tolerance/hidden_bound": 0.75,
    }
    assert bounds.reduce(accelerator) == {}


def test_a_step_s_error_lies_within_the_logged_bound():
    def run(tolerance):
        model = tiny.model(torch.float64, tie_word_embeddings=False)
        trainer, gradients, _ = step("nll", torch.float64, 8, 1, model=model, kernel={"gradient_tolerance": tolerance})
        return trainer.state.log_history[0], gradients["lm_head.weight"]

    (plain, exact), (logs, found) = run(0.0), run(0.9)
    assert not any(key.startswith("gradient_tolerance") for key in plain)
    error = ((found - exact).norm() / exact.norm()).item()
    assert 0 < error <= logs["gradient_tolerance/head_bound"] <= 0.9
    assert 0 < logs["gradient_tolerance/dropped_share"] < 1
    assert logs["loss"] == pytest.approx(plain["loss"], rel=1e-9)
