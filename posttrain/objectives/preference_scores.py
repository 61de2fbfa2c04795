"""Objectives that take a number per pair beside the pair itself: how much better the chosen completion is.

a and b are the log-ratios (log-probability minus the reference's, summed over the completion) of the chosen and the
rejected completion, Delta = a - b.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape
from posttrain.objectives.rewards import reward_metrics

FAMILY = "preference"

Pairs = Float[Tensor, " pairs"]


@declare(
    unit="pairs",
    formula="-p logsigmoid(beta Delta) - (1 - p) logsigmoid(-beta Delta), p = sigmoid(gamma score_margin)",
    paper="arXiv:2410.03145 (MMPO: margin-matching targets)",
)
def mmpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    score_margin: Pairs | None = None,
    preference_probability: Pairs | None = None,
    *,
    beta: float = 0.01,
    gamma: float = 2.2,
) -> Loss:
    """MMPO: Bradley-Terry cross-entropy against the probability that the scores give to the chosen completion.

    The loss is least where beta Delta = gamma * score_margin, so a pair of nearly equal scores is not driven apart;
    a very large margin is DPO. Gradient: dL/da = beta (sigmoid(beta Delta) - p), dL/db is its negative.

    Args:
        chosen_logratio: (pairs,) nats, a.
        rejected_logratio: (pairs,) nats, b.
        score_margin: (pairs,) chosen score minus rejected score, in the scores' unit; a negative one prefers the
            rejected completion.
        preference_probability: (pairs,) p itself, in [0, 1], in place of score_margin.
        beta: 1 / nats, > 0.
        gamma: 1 / the scores' unit, >= 0; unused with preference_probability. The authors take 2.2 or 0.3 for
            UltraFeedback's scores.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics` on beta a and beta b,
        target_probability = p, calibration_gap = sigmoid(beta Delta) - p.
    Raises:
        ValueError: shapes differ, not exactly one of score_margin and preference_probability is given, beta is not a
            finite number above 0, or gamma is negative or not finite.
    """
    check_same_shape(
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        score_margin=score_margin,
        preference_probability=preference_probability,
    )
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, gamma=gamma)
    p = _target(score_margin, preference_probability, gamma)
    logits = beta * (chosen_logratio - rejected_logratio)
    metrics = reward_metrics(beta * chosen_logratio, beta * rejected_logratio)
    metrics |= {"target_probability": p, "calibration_gap": torch.sigmoid(logits.detach()) - p}
    return Loss(F.binary_cross_entropy_with_logits(logits, p, reduction="none"), metrics)


def _target(score_margin: Tensor | None, preference_probability: Tensor | None, gamma: float) -> Tensor:
    if score_margin is not None and preference_probability is None:
        return torch.sigmoid(gamma * score_margin.detach())
    if preference_probability is None or score_margin is not None:
        found = "neither" if score_margin is None else "both"
        raise ValueError(
            f"mmpo found {found} of score_margin and preference_probability; give it exactly one, and leave the other "
            "out of the data."
        )
    return preference_probability.detach()


@declare(
    unit="pairs",
    formula="-w(h) logsigmoid(beta Delta), w(h) = sigmoid(c(|h|) h) / sigmoid(h) if h > -tau else 1, h = reward_margin",
    paper="arXiv:2510.05342 (MADPO)",
)
def madpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    reward_margin: Pairs,
    *,
    beta: float = 0.1,
    c_min: float = 0.5,
    c_max: float = 2.0,
    lam: float = 1.0,
    tau: float = 2.0,
) -> Loss:
    """MADPO: DPO, each pair weighted by what a reward model thinks of it.

    c(m) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(lam (m - tau))) falls from nearly c_max to
    c_min and is 1 at m = tau: it sharpens the margins of hard pairs and softens those of easy ones. Pairs that the
    reward model ranks the other way round get the smallest weights, down to h = -tau, from where on w is 1.

    The weights are constants of the data and are not normalised: the loss is their product's plain mean over pairs.
    w is formed from logarithms and finite at every margin, where the ratio of sigmoids is 0 / 0.
    Gradient: dL/da = -w beta sigmoid(-beta Delta), dL/db is its negative.

    Args:
        chosen_logratio: (pairs,) nats, a.
        rejected_logratio: (pairs,) nats, b.
        reward_margin: (pairs,) the reward model's reward of the chosen completion minus that of the rejected one.
        beta: 1 / nats, > 0.
        c_min: dimensionless, above 0 and below 1.
        c_max: dimensionless, above 1; the authors set c_min = 1 / c_max.
        lam: per unit of the margin, > 0, how steeply c falls at tau.
        tau: in the margin's unit, > 0; the authors' experiments have log(0.999 / 0.001) = 6.907.
    Returns:
        values (pairs,), unreduced, weights included; metrics (pairs,): those of `reward_metrics` on beta a and
        beta b, madpo_weight = w.
    Raises:
        ValueError: shapes differ, beta, lam or tau is not a finite number above 0, c_min is not between 0 and 1, or
            c_max is not above 1.
    """
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio, reward_margin=reward_margin)
    check_positive(beta=beta, c_min=c_min, c_max=c_max, lam=lam, tau=tau)
    if c_min >= 1 or c_max <= 1:
        raise ValueError(f"c_min is {c_min!r} and c_max is {c_max!r}; give c_min below 1 and c_max above 1.")
    weight = _margin_weight(reward_margin.detach(), c_min, c_max, lam, tau)
    metrics = reward_metrics(beta * chosen_logratio, beta * rejected_logratio)
    values = -weight * F.logsigmoid(beta * (chosen_logratio - rejected_logratio))
    return Loss(values, metrics | {"madpo_weight": weight})


def _margin_weight(margin: Tensor, c_min: float, c_max: float, lam: float, tau: float) -> Tensor:
    offset = math.log((c_max - 1) / (1 - c_min))
    c = c_min + (c_max - c_min) * torch.sigmoid(lam * (tau - margin.abs()) - offset)
    weight = torch.exp(F.logsigmoid(c * margin) - F.logsigmoid(margin))
    return torch.where(margin <= -tau, 1, weight)
