"""Rows as training would see them: tokenised, truncated and masked by the trainer itself."""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config import RunConfig, trainer_config_class
from posttrain.data.collation import ROW_NUMBER


@dataclass(frozen=True, eq=False)
class PreparedRows:
    """Tokenised rows and the model that is to read them.

    Args:
        model: attached (see `posttrain.modeling.attach`), in eval mode, on the device that training would use.
        dataset: ``input_ids``, ``labels`` and the row's number in the data as given; one row each, not packed.
        collator: the trainer's.
        args: the trainer's arguments.
        device: of the model.
    """

    model: nn.Module
    dataset: Any
    collator: Any
    args: Any
    device: torch.device


def prepare_rows(
    config: RunConfig, model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> PreparedRows:
    """Let the configuration's trainer prepare rows, one sequence a row whatever it says of packing.

    Args:
        rows: as `posttrain.loading.load_rows` gives them.

    Raises:
        ValueError: what the trainer refuses.
    """
    from posttrain.trainers import SupervisedTrainer

    with tempfile.TemporaryDirectory() as folder:
        whole_rows = {"packing": False, "eval_packing": None, "padding_free": False}
        args = trainer_config_class(config.method)(
            **{**config.trainer, **whole_rows, "output_dir": folder, "report_to": "none", "push_to_hub": False}
        )
        trainer: Any = SupervisedTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    device = trainer.accelerator.device
    return PreparedRows(trainer.model.to(device).eval(), trainer.train_dataset, trainer.data_collator, args, device)


def given_rows(rows: Dataset, numbers: Iterable[int]) -> Dataset:
    """The rows as they were before preparation, in the order of their ``numbers``; some may have been skipped."""
    # rows numbered before some were skipped keep their numbers: a number is no position
    known = rows[ROW_NUMBER] if ROW_NUMBER in rows.column_names else range(len(rows))
    position = {number: index for index, number in enumerate(known)}
    return rows.select([position[number] for number in numbers])


def refuse_processes(command: str) -> None:
    """Raise a ValueError where several processes were launched, which would all write one file."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"{command} runs in {processes} processes, which would write one file; start it in one, with `python -m "
            f"posttrain {command}`."
        )
