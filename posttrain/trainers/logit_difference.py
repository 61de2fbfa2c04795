"""Unlearning from logit difference (arXiv:2406.08607): train an assistant, ship the model with it."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.modeling import standalone_copy
from posttrain.modeling.logit_difference import LogitDifferenceModel, check_difference, first_layers
from posttrain.trainers import trl_adapter
from posttrain.trainers.supervised import sft_config
from posttrain.trainers.unlearning import UnlearningTrainer

# Engines that hold a part of the assistant's weights each.
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


class LogitDifferenceTrainer(UnlearningTrainer):
    """`UnlearningTrainer` of an assistant, which begins as the first layers of a model that itself stays as it is.

    The assistant is to know what is to be forgotten and nothing of what is to stay, so the objective's two sides change
    places: ``{forget: nll, retain: uniform_kl}``. With `peft_config` it has its layers frozen and adapters trained, as
    published. `save_model` saves a `posttrain.modeling.logit_difference.LogitDifferenceModel`; checkpoints hold the
    assistant alone.

    Args:
        model: that is to forget.
        layers: of the model, that the assistant begins as.
        alpha, filter: see `posttrain.modeling.logit_difference.logit_difference`.
        args, ...: as of `UnlearningTrainer`.

    Raises:
        ValueError: as `UnlearningTrainer`; more layers than there are, or a number out of range; an engine that shards
            the assistant.
    """

    _name = "posttrain-logit-difference"
    _trains_assistant = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: Any = None,
        *,
        layers: int = 8,
        alpha: float = 0.8,
        filter: float = 0.01,
        **kwargs: Any,
    ) -> None:
        check_difference(alpha, filter)
        if isinstance(model, PeftModel):
            raise ValueError("the model has an adapter, whose layers the assistant would share; merge it first.")
        args = sft_config(args, model)
        named = isinstance(model, str)
        base = trl_adapter.loaded(model, args, kwargs)
        trl_adapter.refuse_unwrapped_adapter(base)
        with trl_adapter.without_init_kwargs(args, named):
            super().__init__(first_layers(base, layers), args, **kwargs)
        if self.accelerator.distributed_type.value in SHARDED:
            raise ValueError(
                f"{self.accelerator.distributed_type.value} keeps the assistant in parts, and it is saved as one with "
                "the model; launch on one process or DDP."
            )
        self.base = base.eval().requires_grad_(False)
        self._difference = {"alpha": alpha, "filter": filter}

    def deployed_model(self) -> Any:
        """The model with its assistant; before the first step the model alone."""
        base = self.base.to(self.accelerator.device)
        if not self.state.global_step:
            return base
        assistant = standalone_copy(super().deployed_model())
        if isinstance(assistant, PeftModel):
            assistant = assistant.merge_and_unload()
        return LogitDifferenceModel.of(base, assistant.eval(), **self._difference)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model with its assistant and the tokenizer; a checkpoint's assistant as it is."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            self.deployed_model().save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
