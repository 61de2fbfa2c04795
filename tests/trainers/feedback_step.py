"""One optimizer step of `BinaryFeedbackTrainer` under any launcher; writes the gradients that the optimizer would see.

Run as a script by test_binary_feedback.py: ``feedback_step.py OUT OBJECTIVE_JSON BATCH ACCUMULATION [OPTIONS_JSON]``.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from trl import KTOConfig

from posttrain import BinaryFeedbackTrainer
from tests import tiny
from tests.trainers.step import Gradients


def rows(count: int = 8) -> list[dict[str, object]]:
    """Prompts and completions of ragged lengths; three in eight are undesirable."""
    return [
        {
            "prompt": "hgfedcba"[i % 8] + "abc"[: i % 3] + "=",
            "completion": "0123456789"[: 1 + (3 * i) % 7],
            "label": i % 8 not in (1, 2, 6),
        }
        for i in range(count)
    ]


def policy():
    """Likelier than the reference to give the completions of other prompts, so that a baseline is above 0."""
    return tiny.model(torch.float64, seed=1)


def reference():
    """With weights of its own."""
    return tiny.model(torch.float64, seed=0)


def build(output: str, objective="kto", data=None, batch=8, accumulation=1, callbacks=(), **given):
    """A trainer of a tiny policy in float64 against a reference with other weights.

    Args:
        given: arguments of `BinaryFeedbackTrainer`, and settings of KTOConfig.
    """
    names = ("reference", "eval_dataset", "peft_config", "kernel")
    own = {name: given.pop(name) for name in names if name in given}
    settings = {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **given,
    }
    model = settings.pop("model", None) or policy()
    ref_model = settings.pop("ref_model", reference())
    return BinaryFeedbackTrainer(
        model,
        ref_model,
        KTOConfig(output, **settings),
        objective=objective,
        train_dataset=data if data is not None else Dataset.from_list(rows()),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        **own,
    )


def step(objective, batch: int, accumulation: int, **options):
    """Train one step and return the trainer and its gradients."""
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as output:
        trainer = build(output, objective, batch=batch, accumulation=accumulation, callbacks=[gradients], **options)
        trainer.train()
    return trainer, gradients.found


def main() -> None:
    """Entry of the launched processes."""
    out, objective, batch, accumulation = sys.argv[1:5]
    options = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    options["eval_dataset"] = Dataset.from_list(rows(7))
    trainer, gradients = step(json.loads(objective), int(batch), int(accumulation), **options)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
        torch.save(
            {
                "gradients": gradients,
                "num_processes": trainer.accelerator.num_processes,
                "logs": logs,
                "evaluation": metrics,
            },
            Path(out),
        )
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
