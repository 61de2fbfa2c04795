"""Implicit rewards of a pair, and what every objective of two completions reports about them."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.checks import check_positive, check_same_shape

Pairs = Float[Tensor, " pairs"]


def implicit_rewards(chosen_logratio: Pairs, rejected_logratio: Pairs, beta: float) -> tuple[Pairs, Pairs]:
    """``beta * chosen_logratio`` and ``beta * rejected_logratio``, with gradient, after a check of all three.

    Raises:
        ValueError: shapes differ, or beta is not a finite number above 0.
    """
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    check_positive(beta=beta)
    return beta * chosen_logratio, beta * rejected_logratio


def reward_metrics(chosen: Pairs, rejected: Pairs) -> dict[str, Tensor]:
    """The metrics of a pair, detached.

    Args:
        chosen, rejected: (pairs,) implicit rewards of the two completions, as the objective defines them.
    Returns:
        chosen_reward, rejected_reward, implicit_margin (their difference) and reward_accuracy (1.0 where the chosen
        completion's reward is larger, 0.5 where the two are equal), each (pairs,).
    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "implicit_margin": margin,
        "reward_accuracy": torch.sign(margin) / 2 + 0.5,
    }
