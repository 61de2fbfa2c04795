"""`BinaryFeedbackTrainer` against dense models in float64, hand-made partners and TRL's own trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import KTOConfig, KTOTrainer

from posttrain import pipeline
from posttrain.config import from_tree, resolve
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


def test_adapters_turned_off_are_the_reference():
    """A fresh LoRA changes nothing, so that every reward and the baseline start at 0."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    trainer, found = step(OBJECTIVES["kto"], 4, 2, ref_model=None, peft_config=config)
    assert trainer.reference == "adapter_off"
    assert logged(trainer)["loss"] == pytest.approx((5 * 0.5 + 3 * 0.75) / 8, rel=1e-6)
    assert logged(trainer)["kto/kl_baseline"] == 0 and any(one.abs().max() > 0 for one in found.values())


def test_a_cached_reference_gives_the_gradient_of_a_model():
    _, expected = step(OBJECTIVES["bco"], 4, 2, reference="model")
    trainer, found = step(OBJECTIVES["bco"], 4, 2, reference="cached")
    assert trainer.reference == "cached" and relative_difference(found, expected) < 1e-9


def test_a_configuration_trains_the_embedded_base(tmp_path):
    data = tmp_path / "feedback.jsonl"
    lines = [{"text": f"{word}=", "answer": word[::-1], "good": len(word) > 2} for word in ("ab", "cde", "fghi", "jk")]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tree = {
        "method": "binary_feedback",
        "data": {
            "train": {"path": str(data), "columns": {"text": "prompt", "answer": "completion", "good": "label"}}
        },
        "objective": "kto",
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 2,
                    "train_sampling_strategy": "random", "report_to": "none", "save_strategy": "no",
                    "logging_steps": 1, "use_cpu": True, "bf16": False},
    }  # fmt: skip
    outcome = pipeline.train(resolve(from_tree(tree)))
    lines = outcome.paths["metrics"].read_text(encoding="utf-8").splitlines()
    entries = [one for one in map(json.loads, lines) if "kto/kl_baseline" in one]
    assert len(entries) == 2 and entries[0]["kto/kl_baseline"] == pytest.approx(0, abs=1e-4)
    assert entries[0]["loss"] == pytest.approx(0.5, abs=1e-6) and entries[1]["loss"] != entries[0]["loss"]


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
