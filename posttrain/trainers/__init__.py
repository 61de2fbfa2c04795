"""Trainers: TRL's, with the loss replaced by objectives over named statistics."""

from posttrain.trainers.base import ObjectiveMixin
from posttrain.trainers.binary_feedback import BinaryFeedbackTrainer
from posttrain.trainers.finite import NonFiniteLossError
from posttrain.trainers.logit_difference import LogitDifferenceTrainer
from posttrain.trainers.preference import PreferenceTrainer
from posttrain.trainers.supervised import SupervisedTrainer
from posttrain.trainers.unlearning import UnlearningTrainer

__all__ = [
    "BinaryFeedbackTrainer",
    "LogitDifferenceTrainer",
    "NonFiniteLossError",
    "ObjectiveMixin",
    "PreferenceTrainer",
    "SupervisedTrainer",
    "UnlearningTrainer",
]
