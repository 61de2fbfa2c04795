"""PreferenceTrainer: one gradient however the pairs are split, what it trains on, and what it refuses."""

import json
import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.trainers.preference_step import build, logged, rows, step
from tests.trainers.test_gradients import TOLERANCE, relative_difference

OBJECTIVES = {
    "dpo": "dpo",
    "token_mean": "ipo",
    "parts": "ld_dpo",
    "vocabulary": "tdpo",
    "sorted": "aot",
    "quantile_and_state": {"name": "beta_dpo", "rho": 0.6},
    "weighted": "wpo",
    "no_reference": "simpo",
    "scores": "mmpo",
    "sum": [
        {"name": "dpo", "beta": 0.3},
        {"name": "nll", "role": "chosen", "weight": 0.2},
        {"name": "probability_threshold", "role": "rejected", "quantile": 0.4, "weight": -0.1},
    ],
}


def first(objective, dtype, batch, accumulation, **options):
    options.setdefault("ref_model", tiny.model(dtype, seed=1))
    trainer, found, _ = step(objective, dtype, batch, accumulation, **options)
    assert trainer.state.global_step == 1
    return found, logged(trainer)[0]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_accumulation_changes_nothing(kind):
    whole, loss = first(OBJECTIVES[kind], torch.float64, 8, 1)
    split, same = first(OBJECTIVES[kind], torch.float64, 2, 4)
    assert relative_difference(split, whole) < TOLERANCE[torch.float64]
    assert same == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "parts", "sorted"])
def test_accumulation_changes_nothing_in_single_precision(kind):
    whole, _ = first(OBJECTIVES[kind], torch.float32, 8, 1)
    split, _ = first(OBJECTIVES[kind], torch.float32, 1, 8)
    assert relative_difference(split, whole) < TOLERANCE[torch.float32]


def test_the_gradient_is_the_paper_s():
    """DPO by hand: dense logits, one sequence at a time, the mean over pairs."""
    found, loss = first({"name": "dpo", "beta": 0.3}, torch.float64, 2, 4, shared_prefix=False)
    policy, reference = tiny.model(torch.float64), tiny.model(torch.float64, seed=1)
    trainer = build("unused", dtype=torch.float64, reference="model")

    def ratio(row, role):
        ids = torch.tensor(row["prompt_ids"] + row[f"{role}_ids"])
        logp = [
            torch.log_softmax(m(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None]) for m in (policy, reference)
        ]
        return (logp[0] - logp[1].detach())[len(row["prompt_ids"]) - 1 :].sum()

    pairs = list(trainer.train_dataset)
    margins = torch.stack([ratio(row, "chosen") - ratio(row, "rejected") for row in pairs])
    expected = -torch.nn.functional.logsigmoid(0.3 * margins).mean()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert relative_difference(found, gradients) < 1e-12
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_short_last_window_and_other_padding_change_nothing():
    train = Dataset.from_list(rows(5))
    whole, _ = first("dpo", torch.float64, 5, 1, train=train)
    split, _ = first("dpo", torch.float64, 2, 4, train=train, pad_to_multiple_of=16)
    assert relative_difference(split, whole) < 1e-12


def test_a_supervised_term_trains_the_chosen_completions_alone(tmp_path):
    """Against the mean over the chosen tokens, from the model's own logits."""
    trainer = build(tmp_path, {"name": "nll", "role": "chosen"}, torch.float64)
    assert trainer.reference == "none"
    total, tokens = 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
        logp = torch.log_softmax(trainer.model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])
        own = logp[len(row["prompt_ids"]) - 1 :]
        total, tokens = total - own.sum().item(), tokens + len(own)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(total / tokens, rel=1e-6)


def test_evaluation_is_over_the_whole_set_whatever_the_batches(tmp_path):
    objective = [{"name": "beta_dpo", "rho": 0.6}, {"name": "nll", "role": "chosen", "weight": 0.2}]
    found = []
    for batch in (7, 2):
        options = {"eval_dataset": Dataset.from_list(rows(7, shift=3)), "ref_model": tiny.model(torch.float64, seed=1)}
        # the gradients' entanglement is told of single batches
        options["diagnostics"] = {"entanglement_batches": 0}
        found.append(build(tmp_path, objective, torch.float64, batch, **options).evaluate())
    names = [name for name in found[0] if "runtime" not in name and "second" not in name]
    assert {"eval_loss", "eval_beta_dpo/reward_accuracy", "eval_nll/loss"} <= set(names)
    for name in names:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-9), name


def test_completions_cut_to_nothing_are_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level("WARNING", "posttrain"):
        trainer = build(tmp_path, max_length=3)
    assert "Skipped 5 of 8 rows of the train data" in caplog.text and "rows 1, 2, 4, 5, 7." in caplog.text
    assert len(trainer.train_dataset) == 3 and trainer.reference == "cached"
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="has no row left"):
        build(tmp_path, max_length=2)


def scored(value):
    return Dataset.from_list([{**row, "score_margin": value if i == 3 else 0.5} for i, row in enumerate(rows())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.3}, "trainer.beta is 0.3.*beside the objective's name"),
        ({"loss_type": ["ipo"]}, "trainer.loss_type is .*objective"),
        ({"label_smoothing": 0.2}, "trainer.label_smoothing is 0.2"),
        ({"use_weighting": True}, "objective: wpo"),
        ({"precompute_ref_log_probs": True}, "reference: cached"),
        ({"f_divergence_type": "js_divergence"}, "f_dpo"),
        ({"data_collator": object()}, "data_collator"),
        ({"objective": "mmpo", "train": scored(math.nan)}, "'score_margin' of the train data holds nan.*rows 3"),
        ({"objective": "mmpo", "train": scored(None)}, "'score_margin' of the train data holds None.*rows 3"),
        ({"objective": "mmpo", "train": scored(0.5).remove_columns("score_margin")}, "score_margin"),
        ({"objective": "mmpo", "eval_dataset": scored(0.5).remove_columns("score_margin")}, "the eval data lacks"),
        ({"objective": "nll"}, "set `role:` beside"),
        ({"objective": "kto"}, "completions have roles"),
        ({"reference": "none"}, "no reference model"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)


def test_the_saved_state_is_json(tmp_path):
    """beta_dpo's running quantities go into the checkpoint and come back."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "batch": 4}
    trainer = build(tmp_path, "beta_dpo", **options)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-1" / "objective_state.json").read_text())
    again = build(tmp_path, "beta_dpo", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert saved != trainer.states.state_dict() == again.states.state_dict()
