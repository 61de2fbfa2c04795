"""What every objective of two completions reports about their implicit rewards."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.checks import check_same_shape

Pairs = Float[Tensor, " pairs"]


def reward_metrics(chosen: Pairs, rejected: Pairs) -> dict[str, Pairs]:
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
