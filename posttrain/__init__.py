"""posttrain: LLM post-training objectives as pure functions over streamed vocabulary statistics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.objectives import Loss, declare
    from posttrain.trainers import (
        BinaryFeedbackTrainer,
        LogitDifferenceTrainer,
        PreferenceTrainer,
        SupervisedTrainer,
        UnlearningTrainer,
    )

__version__ = "0.1.0"

__all__ = [
    "BinaryFeedbackTrainer",
    "LogitDifferenceTrainer",
    "Loss",
    "PreferenceTrainer",
    "SupervisedTrainer",
    "UnlearningTrainer",
    "declare",
]

_HOMES = {
    "BinaryFeedbackTrainer": "posttrain.trainers",
    "LogitDifferenceTrainer": "posttrain.trainers",
    "PreferenceTrainer": "posttrain.trainers",
    "SupervisedTrainer": "posttrain.trainers",
    "UnlearningTrainer": "posttrain.trainers",
    "Loss": "posttrain.objectives",
    "declare": "posttrain.objectives",
}


def __getattr__(name: str) -> Any:
    # transformers and trl take seconds to import: `posttrain list` and pure functions should not wait for them
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
