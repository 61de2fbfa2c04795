"""`BinaryFeedbackTrainer` against dense models in float64, hand-made partners and TRL's own trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import KTOConfig, KTOTrainer

from posttrain.objectives import Loss, declare
from tests import tiny
from tests.trainers import feedback_step
from tests.trainers.feedback_step import build, policy, reference, rows, step
from tests.trainers.test_gradients import relative_difference

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "kto": {"name": "kto", "beta": 0.3, "undesirable_weight": 1.5},
    "bco": {"name": "bco", "beta": 0.3},
    "apo_zero_unpaired": {"name": "apo_zero_unpaired", "beta": 0.3},
}


def sum_logp(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of the completion given the prompt, from the model's logits in full."""
    ids = torch.tensor([prompt + completion])
    logp = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    return logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def dense_kto(data, beta=0.3, desirable_weight=1.0, undesirable_weight=1.5):
    """Loss, baseline and the policy's gradients, with each row's partner the next one and the last row's the first."""
    model, frozen = policy(), reference()
    data = list(data)

    def logratio(row, completion):
        with torch.no_grad():
            there = sum_logp(frozen, row["prompt_ids"], completion)
        return sum_logp(model, row["prompt_ids"], completion) - there

    partners = data[1:] + data[:1]
    mismatched = [logratio(row, partner["completion_ids"]) for row, partner in zip(data, partners, strict=True)]
    baseline = torch.stack(mismatched).mean().detach().clamp(min=0)
    values = []
    for row in data:
        lead = beta * (logratio(row, row["completion_ids"]) - baseline)
        good = row["desirable"] == 1.0
        values.append(
            desirable_weight * (1 - torch.sigmoid(lead)) if good else undesirable_weight * (1 - torch.sigmoid(-lead))
        )
    loss = torch.stack(values).mean()
    loss.backward()
    return loss.item(), baseline.item(), {name: one.grad for name, one in model.named_parameters()}


def logged(trainer) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_kto_is_the_dense_loss_with_the_next_row_s_completion():
    trainer, found = step(OBJECTIVES["kto"], 8, 1)
    loss, baseline, expected = dense_kto(trainer.train_dataset)
    assert baseline > 0.5
    assert logged(trainer)["kto/kl_baseline"] == pytest.approx(baseline, rel=1e-12)
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-6)
    assert relative_difference(found, expected) < 1e-12


@pytest.mark.parametrize(("name", "order"), [*((name, "sequential") for name in OBJECTIVES), ("kto", "random")])
def test_accumulation_changes_nothing(name, order):
    options = {"train_sampling_strategy": order}
    whole_trainer, whole = step(OBJECTIVES[name], 8, 1, **options)
    for batch, accumulation in ((2, 4), (1, 8)):
        trainer, split = step(OBJECTIVES[name], batch, accumulation, **options)
        assert relative_difference(split, whole) < 1e-12
        for key in (key for key in logged(whole_trainer) if key.startswith(f"{name}/")):
            assert logged(trainer)[key] == pytest.approx(logged(whole_trainer)[key], rel=1e-12)


class Partners(TrainerCallback):
    """Notes which rows the micro-batches of a run hold and whose completions beside them."""

    def __init__(self, trainer) -> None:
        self.found: list[list[tuple[int, int]]] = []
        collate = trainer.data_collator.torch_call

        def noting(examples):
            texts = [trainer.processing_class.decode(row["completion_ids"]) for row in trainer.train_dataset]
            seen = [trainer.processing_class.decode(one["mismatched_completion_ids"]) for one in examples]
            self.found.append(
                [(one["row_number"], texts.index(text)) for one, text in zip(examples, seen, strict=True)]
            )
            return collate(examples)

        trainer.data_collator.torch_call = noting


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8), (3, 1)])
def test_each_micro_batch_holds_the_epoch_s_next_completions(tmp_path, batch, accumulation):
    data = [{**row, "completion": "0123456789abcdefghij"[i : 2 * i + 1]} for i, row in enumerate(rows(8))]
    trainer = build(
        tmp_path, "kto", Dataset.from_list(data), batch, accumulation, train_sampling_strategy="random",
        max_steps=-1, num_train_epochs=2, learning_rate=0.0,
    )  # fmt: skip
    notes = Partners(trainer)
    trainer.train()
    seen = [pair for micro_batch in notes.found for pair in micro_batch]
    orders = []
    for epoch in (seen[:8], seen[8:]):
        order = [row for row, _ in epoch]
        assert epoch == [(row, order[(place + 1) % 8]) for place, row in enumerate(order)]
        assert sorted(order) == list(range(8))
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_stream_takes_the_step_of_its_rows(tmp_path):
    _, expected = step(OBJECTIVES["kto"], 4, 2)
    _, found = step(OBJECTIVES["kto"], 2, 4, data=Dataset.from_list(rows()).to_iterable_dataset())
    assert relative_difference(found, expected) < 1e-12


@pytest.mark.parametrize("batch", [7, 3, 1])
def test_evaluation_pairs_the_rows_in_order(tmp_path, batch):
    trainer = build(tmp_path, OBJECTIVES["kto"], batch=2, train_sampling_strategy="random", reference="model",
                    per_device_eval_batch_size=batch, eval_dataset=Dataset.from_list(rows(7)))  # fmt: skip
    loss, baseline, _ = dense_kto(trainer.eval_dataset)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-9)
    assert found["eval_kto/kl_baseline"] == pytest.approx(baseline, rel=1e-12)
    given = trainer.evaluate(Dataset.from_list(rows(7)))
    assert given["eval_loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("objective", ["kto", "bco", {"name": "bco", "shift": "class_means", "decay": 0.5}], ids=str)
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, objective):
    """Three steps an epoch: the checkpoint of step 4 lies within the second."""
    options = {
        "data": Dataset.from_list(rows(12)), "batch": 2, "accumulation": 2, "learning_rate": 0.003, "max_steps": 6,
        "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 4,
        "eval_dataset": Dataset.from_list(rows(4)), "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    whole = build(tmp_path, objective, **options)
    whole.train()
    resumed = build(tmp_path, objective, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def entries(trainer, key):
        return {one["step"]: one[key] for one in trainer.state.log_history if key in one}

    name = "kto" if objective == "kto" else "bco"
    baseline = "kl_baseline" if name == "kto" else "reward_shift"
    for key in ("loss", "eval_loss", f"{name}/{baseline}"):
        assert entries(resumed, key) == pytest.approx(entries(whole, key), rel=1e-12)
    later = entries(whole, f"{name}/{baseline}")
    assert later[5] > 0 and later[5] != later[6] and len(set(entries(whole, "loss").values())) == 6


def test_rewards_of_either_class_and_their_difference_over_a_window(tmp_path):
    """Two steps a log; the first micro-batch has one class alone."""
    data = Dataset.from_list([{**row, "label": i >= 3} for i, row in enumerate(rows())])
    trainer = build(tmp_path, OBJECTIVES["bco"], data, 2, 2, max_steps=2, logging_steps=2, learning_rate=0.0)
    trainer.train()
    model, frozen = policy(), reference()
    with torch.no_grad():
        rewards = torch.stack(
            [
                0.3 * (sum_logp(model, *ids) - sum_logp(frozen, *ids))
                for ids in ((row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset)
            ]
        )
    found = logged(trainer)
    assert found["bco/desirable_reward"] == pytest.approx(rewards[3:].mean().item(), rel=1e-9)
    assert found["bco/undesirable_reward"] == pytest.approx(rewards[:3].mean().item(), rel=1e-9)
    assert found["bco/reward_margin"] == pytest.approx((rewards[3:].mean() - rewards[:3].mean()).item(), rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_class_alone_trains_with_a_warning(tmp_path, caplog, name):
    data = Dataset.from_list([{**row, "label": True} for row in rows()])
    trainer = build(tmp_path, OBJECTIVES[name], data, 4, 2)
    assert "All 8 rows of the train data are desirable: one class alone" in caplog.text
    trainer.train()
    found = logged(trainer)
    assert found["loss"] > 0 and f"{name}/reward_margin" not in found and f"{name}/undesirable_reward" not in found


def test_weights_out_of_balance_are_named_with_ranges_that_are_in_balance(tmp_path, caplog):
    """Five rows against three; TRL's own advice, on its own weights, keeps silent."""
    build(tmp_path, {"name": "kto", "desirable_weight": 2.0, "undesirable_weight": 1.0})
    assert (
        "desirable_weight 2 * 5 desirable rows is 3.33 times undesirable_weight 1 * 3 undesirable rows, and 1 to 1.33 "
        "times is advised; set desirable_weight to 0.6 to 0.8, or undesirable_weight to 2.5 to 3.33." in caplog.text
    )
    assert "we recommend" not in caplog.text
    caplog.clear()
    for weights in ({"desirable_weight": 0.6}, {"desirable_weight": 0.8}, {"undesirable_weight": 1.5}):
        build(tmp_path, {"name": "kto", **weights})
    build(tmp_path, "bco")
    assert "advised" not in caplog.text


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_trl_s_own_trainer_gives_the_same_loss(tmp_path, name):
    """With two rows in one micro-batch the next row is also the one before, which TRL takes as the partner."""
    data = Dataset.from_list(rows(2) if name == "kto" else rows())
    settings = {
        "per_device_train_batch_size": len(data), "max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "beta": 0.3,
    }  # fmt: skip
    theirs = KTOTrainer(
        policy().float(), reference().float(), KTOConfig(str(tmp_path), loss_type=name, **settings),
        train_dataset=data, processing_class=tiny.tokenizer(),
    )  # fmt: skip
    theirs.train()
    trainer, _ = step({"name": name, "beta": 0.3}, len(data), 1, data=data)
    assert logged(trainer)["loss"] == pytest.approx(logged(theirs)["loss"], rel=1e-5)


@declare(unit="sequences", formula="", paper="")
def reads_mismatched(logratio, mismatched_logratio):
    return Loss(logratio - mismatched_logratio)


def both(logratio, mismatched_logratio):
    return {"shift": logratio.mean() - mismatched_logratio.mean()}


@declare(unit="sequences", formula="", paper="", prepare=both)
def prepares_from_both(logratio, shift):
    return Loss(logratio - shift)


@declare(unit="sequences", formula="", paper="", prepare=lambda logratio: {"shift": logratio.mean()})
def prepares_plainly(logratio, shift):
    return Loss(logratio - shift)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 1}, "all 1; raise one of them"),
        ({"data": Dataset.from_list(rows(1))}, "one row, whose mismatched completion would be its own"),
        ({"train_sampling_strategy": "group_by_length"}, "set it to random or sequential"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is true"),
        ({"loss_type": "apo_zero_unpaired"}, "which `objective` replaces"),
        ({"desirable_weight": 2.0}, "`desirable_weight: 2.0` beside the objective's name"),
        ({"objective": reads_mismatched}, "'mismatched_logratio' in its loss or state"),
        ({"objective": {"name": "kto", "role": "mismatched"}}, "'role: mismatched' in its loss or state"),
        ({"objective": prepares_from_both}, "reads 'logratio' and that of 'prepares_from_both' mismatched"),
        ({"objective": ["kto", prepares_plainly]}, "'prepares_plainly' reads 'logratio' and that of 'kto' mismatched"),
        ({"reference": "cached"}, "mismatched_logratio"),
        ({"data": Dataset.from_list([{**row, "desirable": 1.0} for row in rows()])}, "both `label` and `desirable`"),
        ({"data": Dataset.from_list(tiny.rows())}, "no `label` among its columns"),
        ({"data": Dataset.from_list([{**row, "label": 2} for row in rows()])}, "row 0: label is 2; give true or false"),
        ({"data": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)}, "take them apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_at_the_start(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        build(tmp_path, **options)


def test_objectives_without_a_baseline_take_steps_of_one_row(tmp_path):
    trainer = build(tmp_path, "bco", Dataset.from_list(rows(1)), batch=1)
    trainer.train()
    assert logged(trainer)["loss"] > 0


def test_labels_may_be_numbers_and_streams_name_the_row(tmp_path):
    numbers = Dataset.from_list([{**row, "label": int(row["label"])} for row in rows()])
    assert build(tmp_path, "kto", numbers).train_dataset["desirable"][:3] == [1.0, 0.0, 0.0]
    wrong = [{**row, "label": None if i == 5 else row["label"]} for i, row in enumerate(rows())]
    with pytest.raises(ValueError, match="the train data, row 5: label is None"):
        build(tmp_path, "kto", Dataset.from_list(wrong).to_iterable_dataset()).train()


def launch(tmp_path, objective, batch, accumulation, **options):
    """Run feedback_step.py on two processes and read what it wrote."""
    out = tmp_path / "result.pt"
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "launch/accelerate/ddp2_cpu.yaml"), feedback_step.__file__,
        str(out), json.dumps(objective), str(batch), str(accumulation), json.dumps(options),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert out.exists(), result.stderr[-4000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_two_processes_take_the_step_of_one(tmp_path, name):
    options = {"train_sampling_strategy": "random"}
    found = launch(tmp_path, OBJECTIVES[name], 1, 4, **options)
    assert found["num_processes"] == 2
    trainer, expected = step(OBJECTIVES[name], 8, 1, eval_dataset=Dataset.from_list(rows(7)), **options)
    assert relative_difference(found["gradients"], expected) < 1e-12
    alone = trainer.evaluate()
    shared = [key for key in alone if key.startswith(("eval_loss", f"eval_{name}/"))]
    assert len(shared) >= 6
    for key in shared:
        assert found["evaluation"][key] == pytest.approx(alone[key], rel=1e-9)
    for key in (f"{name}/reward_margin", f"{name}/{'kl_baseline' if name == 'kto' else 'reward_shift'}"):
        assert found["logs"][key] == pytest.approx(logged(trainer)[key], rel=1e-12)
