"""One optimizer step of PreferenceTrainer under any launcher; writes the gradients that the optimizer would see.

Run as a script: ``preference_step.py OUT OBJECTIVE_JSON DTYPE BATCH ACCUMULATION [OPTIONS_JSON]``. Options are as for
`build`; ``lora: [modules]`` trains an adapter, ``ref_seed`` gives a reference model of that seed.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig

from posttrain import PreferenceTrainer
from tests import tiny
from tests.trainers.step import Gradients, without_compiling

OWN = (
    "ref_model", "reference", "reference_cache", "eval_dataset", "peft_config", "kernel", "callbacks", "diagnostics",
    "shared_prefix", "data_collator",
)  # fmt: skip


def rows(count: int = 8, shift: int = 0) -> list[dict[str, object]]:
    """Pairs of ragged lengths, with a score margin of either sign."""
    return [
        {
            "prompt": "hgfedcba"[(i + shift) % 8] + "abc"[: i % 3] + "=",
            "chosen": "0123456789"[: 1 + (3 * i + shift) % 7],
            "rejected": "9876543210"[: 1 + (5 * i) % 6],
            "score_margin": i / 4 - 0.6,
        }
        for i in range(count)
    ]


def config(output: str, batch: int, accumulation: int, **options: object) -> DPOConfig:
    """One step on a CPU without clipping, decay or warm-up."""
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
        "activation_checkpointing": False,
        **options,
    }
    return DPOConfig(output, **settings)


def lora(*modules: str, **options: object) -> LoraConfig:
    """An adapter that changes something from the start, as a trained one would, where ``trained`` is set."""
    return LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM", **options)


def build(output, objective="dpo", dtype=torch.float32, batch=8, accumulation=1, *, model=None, train=None, **options):
    """A trainer; options that are the trainer's own go to it, the rest to DPOConfig."""
    own = {name: options.pop(name) for name in OWN if name in options}
    return PreferenceTrainer(
        model if model is not None else tiny.model(dtype),
        args=config(str(output), batch, accumulation, **options),
        objective=objective,
        train_dataset=train if train is not None else Dataset.from_list(rows()),
        processing_class=tiny.tokenizer(),
        **own,
    )


def step(objective, dtype, batch, accumulation, **options):
    """Train one step and return the trainer, its gradients and the weights before."""
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as output:
        trainer = build(output, objective, dtype, batch, accumulation, callbacks=[gradients], **options)
        before = {
            name: parameter.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        trainer.train()
    return trainer, gradients.found, before


def logged(trainer, name="loss"):
    """Every logged value of a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def main() -> None:
    """Entry of the launched processes."""
    without_compiling()
    out, objective, dtype, batch, accumulation = sys.argv[1:6]
    options = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    kind = getattr(torch, dtype)
    if "lora" in options:
        options["peft_config"] = lora(*options.pop("lora"), init_lora_weights="gaussian")
    if "ref_seed" in options:
        options["ref_model"] = tiny.model(kind, seed=options.pop("ref_seed"))
    if options.pop("evaluated", False):
        options["eval_dataset"] = Dataset.from_list(rows(7, shift=3))
    model = tiny.model(kind)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer, gradients, _ = step(json.loads(objective), kind, int(batch), int(accumulation), model=model, **options)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    accelerator = trainer.accelerator
    # plain SGD at rate 1: the step itself is the gradient, where the engine keeps gradients to itself
    state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        moved = {name: first[name] - state[name].cpu() for name in first if name in state}
        columns = [name for name in trainer.train_dataset.column_names if "reference" in name]
        torch.save(
            {
                "gradients": gradients or moved,
                "moved": moved,
                "distributed_type": str(accelerator.distributed_type),
                "num_processes": accelerator.num_processes,
                "reference": trainer.reference,
                "columns": {name: list(trainer.train_dataset[name]) for name in columns},
                "metrics": metrics,
                "loss": logged(trainer)[0],
            },
            Path(out),
        )
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
