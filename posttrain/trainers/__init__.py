"""Trainers: TRL's, with the loss replaced by objectives over named statistics."""

from posttrain.trainers.base import ObjectiveMixin
from posttrain.trainers.binary_feedback import BinaryFeedbackTrainer
from posttrain.trainers.finite import NonFiniteLossError
from posttrain.trainers.preference import PreferenceTrainer
from posttrain.trainers.supervised import SupervisedTrainer

__all__ = ["BinaryFeedbackTrainer", "NonFiniteLossError", "ObjectiveMixin", "PreferenceTrainer", "SupervisedTrainer"]
