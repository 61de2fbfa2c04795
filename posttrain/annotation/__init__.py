"""Columns written beside a data set once, so that training reads them instead of running another model."""

from posttrain.annotation.density_weights import annotate_density_weights, density_weights
from posttrain.annotation.reward_margins import annotate_reward_margins
from posttrain.annotation.step_rewards import annotate_step_rewards
from posttrain.annotation.topk import annotate_teacher_topk, teacher_topk
from posttrain.annotation.writing import check_output, write

__all__ = [
    "annotate_density_weights",
    "annotate_reward_margins",
    "annotate_step_rewards",
    "annotate_teacher_topk",
    "check_output",
    "density_weights",
    "teacher_topk",
    "write",
]
