"""One optimizer step of a tiny model under any launcher; writes the gradients that the optimizer would see.

Run as a script by test_distributed.py: ``step.py OUT OBJECTIVE_JSON DTYPE BATCH ACCUMULATION [OPTIONS_JSON]``.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from posttrain import SupervisedTrainer
from tests import tiny


class Gradients(TrainerCallback):
    """Keeps a copy of the gradients just before the optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        from accelerate.utils import is_deepspeed_available

        if is_deepspeed_available() and hasattr(next(model.parameters()), "ds_id"):
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                self.found[name.removeprefix("module.")] = gradient.detach().clone()


def config(output: str, batch: int, accumulation: int, **options: object) -> SFTConfig:
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
    return SFTConfig(output, **settings)


def step(objective, dtype: torch.dtype, batch: int, accumulation: int, rows=None, model=None, kernel=None, **options):
    """Train one step and return the trainer and its gradients."""
    model = model or tiny.model(dtype)
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as output:
        trainer = SupervisedTrainer(
            model,
            config(output, batch, accumulation, **options),
            objective=objective,
            kernel=kernel,
            train_dataset=Dataset.from_list(rows or tiny.rows()),
            processing_class=tiny.tokenizer(),
            callbacks=[gradients],
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer.train()
    return trainer, gradients.found, before


def without_compiling() -> None:
    """DeepSpeed would compile a shared-memory collective at its first launch on a CPU, a minute a machine."""
    from accelerate.utils import is_deepspeed_available

    if is_deepspeed_available():
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Entry of the launched processes."""
    without_compiling()
    out, objective, dtype, batch, accumulation = sys.argv[1:6]
    options = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    trainer, gradients, before = step(
        json.loads(objective), getattr(torch, dtype), int(batch), int(accumulation), **options
    )
    accelerator = trainer.accelerator
    # plain SGD at rate 1: the step itself is the gradient, where the engine keeps gradients to itself
    state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        moved = {name: before[name] - state[name].cpu() for name in before}
        torch.save(
            {
                "gradients": gradients or moved,
                "moved": moved,
                "distributed_type": str(accelerator.distributed_type),
                "num_processes": accelerator.num_processes,
                "logs": next(entry for entry in trainer.state.log_history if "loss" in entry),
                "loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
            },
            Path(out),
        )
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
