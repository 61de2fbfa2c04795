"""Predictions worked out by hand from round numbers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from posttrain.diagnosis import cost
from posttrain.diagnosis.silence import candidates
from posttrain.kernels import LMHead, vocab_loss, vocab_statistics
from tests.kernels.live_bytes import LiveBytes

CPU = torch.device("cpu")
SHAPES = cost.Shapes(
    target_tokens=10.0,
    padded_tokens=20.0,
    micro_batches=2,
    width=4,
    vocab=100,
    layers=3,
    parameters=1000,
    trainable=400,
    parameter_bytes=2,
    checkpointing=False,
    head_trains=True,
)
UNIT = {"dense": 1e-6, "two-pass": 2e-6, "one-pass": 3e-6}
SAMPLE = SimpleNamespace(backbone_seconds=0.01)


def predicted(label, **changes):
    candidate = next(one for one in candidates() if one.label == label)
    shapes = dataclasses.replace(SHAPES, **changes)
    return {one.path: one for one in cost.predict(candidate, SAMPLE, shapes, UNIT, CPU)}


def test_time_is_units_of_work_and_three_forwards():
    found = predicted("nll")
    work, backbone = 10 * 4 * 100, 3 * 0.01 * 20
    assert found["dense"].seconds == pytest.approx(2 * (6 * work * 1e-6 + backbone))
    assert found["two-pass"].seconds == pytest.approx(2 * (8 * work * 2e-6 + backbone))
    assert found["one-pass"].seconds == pytest.approx(2 * (6 * work * 3e-6 + backbone))
    checkpointed = predicted("nll", checkpointing=True)["dense"].seconds
    assert checkpointed == pytest.approx(found["dense"].seconds + 2 * 0.01 * 20)


def test_an_objective_that_counts_first_reads_the_step_twice():
    found = predicted("probability_threshold(threshold=0.2)")
    work = 10 * 4 * 100
    assert set(found) == {"dense", "two-pass"}
    assert found["two-pass"].seconds == pytest.approx(2 * (10 * work * 2e-6 + 4 * 0.01 * 20))
    alone = predicted("probability_threshold(threshold=0.2)", micro_batches=1)
    assert alone["two-pass"].seconds == pytest.approx(8 * work * 2e-6 + 3 * 0.01 * 20)


def test_memory_follows_from_shapes():
    weights = 1000 * 2 + 3 * 400 * 2
    activations = 20 * 3 * 17 * 4 * 2
    assert cost.model_bytes(SHAPES) == weights + activations
    assert cost.head_bytes("dense", SHAPES, CPU) == 3 * 4 * 10 * 100 + 4 * 10 * 4
    frozen = dataclasses.replace(SHAPES, head_trains=False)
    one_pass = cost.head_bytes("one-pass", SHAPES, CPU)
    assert one_pass - cost.head_bytes("one-pass", frozen, CPU) == 4 * 100 * 4
    large = dataclasses.replace(SHAPES, vocab=150_000, target_tokens=8192.0, width=896)
    assert cost.head_bytes("two-pass", large, CPU) < 0.02 * cost.head_bytes("dense", large, CPU)


def test_the_heads_memory_is_about_what_the_kernels_hold():
    tokens, width, vocab = 256, 32, 3000
    hidden, weight = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocab))
    targets, ones = torch.arange(tokens), torch.ones(tokens)
    shapes = dataclasses.replace(SHAPES, target_tokens=float(tokens), width=width, vocab=vocab, head_trains=False)

    def two_pass(backend):
        vocab_statistics(hidden, LMHead(weight), targets, ("logp",), backend=backend)["logp"].sum().backward()

    def one_pass():
        vocab_loss(hidden, LMHead(weight), targets, ("logp",), lambda found: -found["logp"], ones)[0].backward()

    runs = {"dense": lambda: two_pass("dense"), "two-pass": lambda: two_pass("auto"), "one-pass": one_pass}
    for path, run in runs.items():
        hidden.grad = weight.grad = None
        live = LiveBytes()
        live.ignore(hidden, weight, targets, ones)
        with live:
            run()
        assert 0.5 < cost.head_bytes(path, shapes, CPU) / live.peak < 2.5, path


def test_a_few_tokens_are_timed_on_every_path():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (6, 50))
    found = cost.seconds_per_unit(hidden, LMHead(weight), torch.arange(6))
    assert set(found) == set(cost.UNITS) and all(0 < value < 1 for value in found.values())
    assert weight.grad is None
