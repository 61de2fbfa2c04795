"""Losses that pull each completion's own log-ratio somewhere, and not their difference alone.

A log-ratio is the policy's log-probability of a completion minus the reference's, in nats, summed over its tokens.
u = beta chosen_logratio and v = beta rejected_logratio are the implicit rewards, s is the sigmoid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_choice, check_in_range, check_same_shape
from posttrain.objectives.rewards import Pairs, implicit_rewards, reward_metrics

FAMILY = "preference"


@declare(unit="pairs", formula="-log s(u) - log s(-u) / 2 - log s(-v) / 2", paper="arXiv:2402.05369 Sec. 4.1")
def nca(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1) -> Loss:
    """Noise contrastive alignment of a pair: each completion is told from the reference's own by a classifier.

    Unlike a loss of the margin it draws the chosen reward to log 2, so that the chosen completion's likelihood does not
    sink with the rejected one's. 2 ln 2 where the policy is the reference.
    Gradient: dL/du = (3 s(u) - 2) / 2, dL/dv = s(v) / 2.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0; the paper's is 0.01.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    u, v = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    values = -F.logsigmoid(u) - (F.logsigmoid(-u) + F.logsigmoid(-v)) / 2
    return Loss(values, reward_metrics(u, v))


@declare(unit="pairs", formula="-log s(u) - log s(-v)", paper="arXiv:2404.04656 (without the reward shift)")
def bco_pair(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1) -> Loss:
    """Binary classification of the two completions by their rewards, with no reward shift (as TRL has it).

    The shift is part of `bco`, on single completions. 2 ln 2 where the policy is the reference.
    Gradient: dL/du = -s(-u), dL/dv = s(v).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0; the paper's is 0.01.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    u, v = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return Loss(-F.logsigmoid(u) - F.logsigmoid(-v), reward_metrics(u, v))


def _squared_distances(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float) -> Tensor:
    """From the log-ratios at which the rewards are 1/2 and -1/2."""
    target = 1 / (2 * beta)
    return (chosen_logratio - target).square() + (rejected_logratio + target).square()


@declare(
    unit="pairs",
    formula="(chosen_logratio - (P_c - 1/2) / beta)^2 + (rejected_logratio - (P_r - 1/2) / beta)^2; hard: P_c 1, P_r 0",
    paper="arXiv:2405.00675 Eq. 4.7",
)
def sppo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    chosen_win_probability: Pairs | None = None,
    rejected_win_probability: Pairs | None = None,
    *,
    beta: float = 0.001,
    form: str = "hard",
) -> Loss:
    """Self-play preference optimization: each log-ratio is regressed on the completion's win rate over the policy.

    The sum of the two squares in both forms; the authors' code halves it. Hard: 1 / (2 beta^2) where the policy is the
    reference. Gradient: twice the difference inside each square.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_win_probability: (pairs,) data column, the probability P_c that the completion beats one of the policy's,
            in [0, 1]; needed for form ``soft`` and passed over by ``hard``.
        rejected_win_probability: (pairs,) P_r, likewise.
        beta: reward per nat of log-ratio, > 0; the targets are at most 1 / (2 beta) nats from 0.
        form: ``hard`` takes 1 and 0 for the two probabilities, ``soft`` the columns.
    Returns:
        values (pairs,) in squared nats, unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, beta is not above 0, form is unknown, or a column is missing for form ``soft``.
    """
    check_choice(("hard", "soft"), form=form)
    metrics = reward_metrics(*implicit_rewards(chosen_logratio, rejected_logratio, beta))
    if form == "hard":
        return Loss(_squared_distances(chosen_logratio, rejected_logratio, beta), metrics)
    if chosen_win_probability is None or rejected_win_probability is None:
        raise ValueError(
            "form is 'soft' but chosen_win_probability or rejected_win_probability is missing; "
            "give both as columns of the data, or set form to 'hard'."
        )
    check_same_shape(
        chosen_logratio=chosen_logratio,
        chosen_win_probability=chosen_win_probability,
        rejected_win_probability=rejected_win_probability,
    )
    chosen = chosen_logratio - (chosen_win_probability - 0.5) / beta
    rejected = rejected_logratio - (rejected_win_probability - 0.5) / beta
    return Loss(chosen.square() + rejected.square(), metrics)


@declare(unit="pairs", formula="1 - s(u) + s(v)", paper="arXiv:2408.06266 Eq. 7")
def apo_zero(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimization, up for chosen and down for rejected completions.

    For data whose chosen completions are better than the policy's own. 1 where the policy is the reference.
    Gradient: dL/du = -s(u) s(-u), dL/dv = s(v) s(-v).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
    Returns:
        values (pairs,) in [0, 2], unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    u, v = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return Loss(torch.sigmoid(-u) + torch.sigmoid(v), reward_metrics(u, v))


@declare(unit="pairs", formula="s(u) + 1 - s(u - v)", paper="arXiv:2408.06266 Eq. 8")
def apo_down(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimization, down for chosen and further down for rejected completions.

    For data whose chosen completions are worse than the policy's own. 1 where the policy is the reference.
    Gradient, with x = u - v: dL/du = s(u) s(-u) - s(x) s(-x), dL/dv = s(x) s(-x).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
    Returns:
        values (pairs,) in [0, 2], unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    u, v = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return Loss(torch.sigmoid(u) + torch.sigmoid(v - u), reward_metrics(u, v))


@declare(
    unit="pairs",
    formula="-log s(d) + alpha ((chosen_logratio - 1 / (2 beta))^2 + (rejected_logratio + 1 / (2 beta))^2), "
    "d = chosen_logratio - rejected_logratio",
    paper="arXiv:2412.14516 (Cal-DPO)",
)
def cal_dpo(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1, alpha: float = 1.0) -> Loss:
    """Calibrated DPO: DPO's loss, and each reward drawn to the scale of the labels, 1/2 and -1/2.

    Inside the sigmoid there is no beta; it sets the targets alone. A small beta makes the squares huge.
    ln 2 + alpha / (2 beta^2) where the policy is the reference. Gradient: dL/dchosen_logratio = -s(-d) + 2 alpha
    (chosen_logratio - 1 / (2 beta)), dL/drejected_logratio = s(-d) + 2 alpha (rejected_logratio + 1 / (2 beta)).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
        alpha: weight of the squares, >= 0; the authors' programs have 1 and 0.5.
    Returns:
        values (pairs,), unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, beta is not above 0, or alpha is negative.
    """
    check_in_range(0.0, math.inf, alpha=alpha)
    metrics = reward_metrics(*implicit_rewards(chosen_logratio, rejected_logratio, beta))
    calibration = _squared_distances(chosen_logratio, rejected_logratio, beta)
    return Loss(-F.logsigmoid(chosen_logratio - rejected_logratio) + alpha * calibration, metrics)
