"""Filling in what a configuration leaves to the machine it runs on."""

import copy
import dataclasses
import logging
import os

from posttrain.config.inputs import DataSource, EvaluationSource
from posttrain.config.schema import RunConfig

logger = logging.getLogger(__name__)


def resolve(config: RunConfig, *, name: str = "run") -> RunConfig:
    """A copy with the settings that depend on the machine or on other settings filled in.

    Args:
        config: as loaded.
        name: of the run; its output folder is ``runs/<name>`` where the configuration names none.
    """
    resolved = copy.deepcopy(config)
    resolved.trainer.setdefault("output_dir", f"runs/{name}")
    if resolved.evaluation.data is None and resolved.data.eval is not None:
        resolved.evaluation.data = [as_evaluation_source(resolved.data.eval)]
    if resolved.evaluation.metrics is None:
        pairs = [] if resolved.method == "supervised" else ["preference"]
        resolved.evaluation.metrics = ["generation", "likelihood", *pairs]
    _fit_to_device(resolved)
    return resolved


def as_evaluation_source(source: DataSource) -> EvaluationSource:
    """A plain data source as one to evaluate on, with the automatic verifier."""
    return EvaluationSource(**{item.name: getattr(source, item.name) for item in dataclasses.fields(source)})


def on_cpu() -> bool:
    """Whether training will run on the CPU: there is no accelerator, or accelerate was told not to use it."""
    import torch

    return (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
    )


def _fit_to_device(config: RunConfig) -> None:
    """TRL turns bf16 on unless told otherwise, and refuses it where there is no accelerator."""
    if not (config.trainer.get("use_cpu") or on_cpu()):
        return
    added = {"use_cpu": True, "bf16": False}
    added = {name: value for name, value in added.items() if config.trainer.get(name) is None}
    if added:
        config.trainer.update(added)
        settings = ", ".join(f"trainer.{name}={str(value).lower()}" for name, value in added.items())
        logger.info("Training on the CPU: %s.", settings)
