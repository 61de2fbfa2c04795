"""Equal global batches give equal gradients, however they are split."""

import pytest
import torch

from posttrain.objectives import Loss
from tests import tiny
from tests.trainers.step import step

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

OBJECTIVES = {
    "token": {"name": "probability_power", "alpha": 0.5},
    "sequence": {"name": "direct_coverage", "n": 8},
    "quantile": {"name": "probability_threshold", "quantile": 0.4},
    "absolute": {"name": "probability_threshold", "threshold": 0.05, "inner": "probability"},
    "sum": [
        {"name": "nll", "weight": 0.5},
        {"name": "entropy", "weight": -0.1, "statistics": {"temperature": 2.0}},
        {"name": "probability_threshold", "quantile": 0.7, "keep": "below"},
    ],
}


def relative_difference(found, expected):
    """Largest difference of the whole gradient in units of its norm."""
    assert found.keys() == expected.keys() and expected
    difference = torch.sqrt(sum(((found[name] - expected[name]) ** 2).sum() for name in expected))
    return (difference / torch.sqrt(sum((gradient**2).sum() for gradient in expected.values()))).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_accumulation_changes_nothing(kind, dtype):
    _, whole, _ = step(OBJECTIVES[kind], dtype, batch=8, accumulation=1)
    trainer, split, _ = step(OBJECTIVES[kind], dtype, batch=2, accumulation=4)
    assert trainer.state.global_step == 1
    assert relative_difference(split, whole) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["token", "sequence", "quantile"])
def test_a_short_last_window_and_an_all_masked_micro_batch(kind):
    """Six rows in windows of eight; prepared data goes in as it is, so that rows without a target come through."""
    rows = [
        {"input_ids": [3 + i, 4, 5 + i, 6, 7 + i], "labels": [-100, -100, 5 + i, 6, -100] if i < 4 else [-100] * 5}
        for i in range(6)
    ]
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "rows": rows}
    _, whole, _ = step(OBJECTIVES[kind], torch.float64, batch=6, accumulation=1, **options)
    _, split, _ = step(OBJECTIVES[kind], torch.float64, batch=1, accumulation=8, **options)
    assert relative_difference(split, whole) < 1e-12


def test_activation_checkpointing_changes_nothing():
    _, plain, _ = step(OBJECTIVES["quantile"], torch.float64, batch=2, accumulation=4)
    _, saved, _ = step(OBJECTIVES["quantile"], torch.float64, batch=2, accumulation=4, activation_checkpointing=True)
    assert relative_difference(saved, plain) < 1e-12


@pytest.mark.parametrize("kind", ["token", "sequence", "quantile"])
def test_packing_changes_nothing(kind):
    _, padded, _ = step(OBJECTIVES[kind], torch.float64, batch=8, accumulation=1)
    _, packed, _ = step(
        OBJECTIVES[kind], torch.float64, batch=2, accumulation=4, packing=True, max_length=16, num_train_epochs=1
    )
    assert relative_difference(packed, padded) < 1e-12


def test_nll_is_the_model_s_own_loss():
    """Against transformers' dense cross-entropy on the same tokens, one row at a time."""
    trainer, found, _ = step("nll", torch.float64, batch=4, accumulation=2)
    model = tiny.model(torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for row in trainer.train_dataset:
        labels = torch.tensor([row["labels"]])
        logits = model(torch.tensor([row["input_ids"]])).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        tokens += int((labels[:, 1:] != -100).sum())
    (total / tokens).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(found, expected) < 1e-12
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx((total / tokens).item(), rel=1e-6)


def test_columns_weigh_what_they_name():
    """A per-example column against the dense truth: sum of w * nll over sum of w, w repeated over the tokens."""

    def weighted(logp, score):
        return Loss(-logp, weight=score)

    trainer, found, _ = step(weighted, torch.float64, batch=2, accumulation=4)
    _, packed, _ = step(weighted, torch.float64, batch=4, accumulation=2, packing=True, max_length=16)
    model = tiny.model(torch.float64)
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for row in trainer.train_dataset:
        labels = torch.tensor(row["labels"])[1:]
        logp = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0, :-1], -1)
        kept = labels != -100
        numerator = numerator - row["score"] * logp[kept].gather(1, labels[kept][:, None]).sum()
        denominator += row["score"] * int(kept.sum())
    (numerator / denominator).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(found, expected) < 1e-12
    assert relative_difference(packed, expected) < 1e-12


def test_the_counting_pass_draws_the_same_dropout_masks():
    """The threshold is taken on exactly the probabilities that are then trained on."""
    seen: list[torch.Tensor] = []

    def recording(logp, *, quantile=0.5):
        seen.append(logp.detach().clone())
        return Loss(-logp, weight=(logp > -3.0).to(logp.dtype).detach())

    model = tiny.model(torch.float64, attention_dropout=0.5)
    step(recording, torch.float64, batch=2, accumulation=4, model=model)
    trial, counted, trained = seen[0], seen[1:5], seen[5:9]
    assert trial.shape == (6,) and len(seen) == 9
    for first, second in zip(counted, trained, strict=True):
        assert torch.equal(first, second)
    plain = tiny.model(torch.float64)
    assert not torch.equal(
        model(torch.ones(1, 9, dtype=torch.long)).logits, plain(torch.ones(1, 9, dtype=torch.long)).logits
    )
