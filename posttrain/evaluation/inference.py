"""What generation and likelihood ask of a model: evaluation mode and its number of positions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

CausalLM = PreTrainedModel | PeftModel


@contextmanager
def evaluation_mode(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets back the mode it had, also where modes were mixed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def max_positions(model: CausalLM) -> int | None:
    """Longest sequence that the model has positions for, in tokens; None where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
