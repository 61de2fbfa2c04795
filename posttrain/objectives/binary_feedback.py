"""Objectives of single completions, each with a label: desirable or not.

r is the log-ratio: the completion's log-probability minus the reference's, both summed over the completion.
beta * r is the implicit reward. A label above 0.5 is desirable.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import (
    check_below_one,
    check_choice,
    check_in_range,
    check_positive,
    check_same_shape,
)

Sequences = Float[Tensor, " sequences"]
Scalar = Float[Tensor, ""]

SHIFTS = ("running_mean", "class_means")


def kl_baseline(mismatched_logratio: Sequences) -> dict[str, Scalar]:
    """How far the policy has moved from the reference on completions of other prompts: `kto`'s ``prepare``.

    Args:
        mismatched_logratio: (sequences,) nats, of every mismatched completion of the step.
    Returns:
        ``kl_baseline``, 0-d nats: their mean, at least 0, as a divergence is; 0 where there is none.
    """
    total = mismatched_logratio.detach().sum()
    return {"kl_baseline": (total / max(1, mismatched_logratio.shape[0])).clamp(min=0)}


@declare(
    unit="sequences",
    formula="desirable_weight sigmoid(-beta (r - z)) if desirable else undesirable_weight sigmoid(beta (r - z))",
    paper="arXiv:2402.01306 Eq. 7",
    prepare=kl_baseline,
)
def kto(
    logratio: Sequences,
    desirable: Sequences,
    kl_baseline: Scalar,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """KTO: each completion is judged by the sign of its reward against a baseline, not against another completion.

    The baseline z is one number for the whole optimizer step, held constant; TRL forms one per micro-batch. The paper
    advises weights with desirable_weight * desirable examples between 1 and 4/3 of undesirable_weight * the others.
    Gradient: with x = beta (r - z) and s = sigmoid(x) sigmoid(-x), dL/dr = -desirable_weight beta s if desirable, else
    undesirable_weight beta s: completions far from the baseline on either side hardly pull.

    Args:
        logratio: (sequences,) nats, r.
        desirable: (sequences,) 1 or 0.
        kl_baseline: 0-d nats, z; prepared.
        beta: 1 / nats, > 0.
        desirable_weight: dimensionless, >= 0.
        undesirable_weight: dimensionless, >= 0.
    Returns:
        values (sequences,), from 0 to the weight, unreduced; the mean runs over sequences, whatever their weights.
        Metrics: reward = beta r and reward_accuracy (1 where r - z has the label's sign), (sequences,); kl_baseline.
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or a weight is negative or not finite.
    """
    check_same_shape(logratio=logratio, desirable=desirable)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    kl_baseline = kl_baseline.detach()
    lead = beta * (logratio - kl_baseline)
    values = torch.where(
        desirable > 0.5, desirable_weight * torch.sigmoid(-lead), undesirable_weight * torch.sigmoid(lead)
    )
    return Loss(values, _metrics(beta * logratio, lead, desirable) | {"kl_baseline": kl_baseline})


@declare(
    unit="sequences",
    formula="desirable_weight sigmoid(-beta r) if desirable else undesirable_weight sigmoid(beta r)",
    paper="arXiv:2408.06266 Eq. 7, its two halves on completions without partners",
)
def apo_zero_unpaired(
    logratio: Sequences,
    desirable: Sequences,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """APO-zero without pairs: `kto` with a baseline of 0, which spares it the mismatched completions.

    Gradient: with s = sigmoid(beta r) sigmoid(-beta r), dL/dr = -desirable_weight beta s if desirable, else
    undesirable_weight beta s.

    Args:
        logratio: (sequences,) nats, r.
        desirable: (sequences,) 1 or 0.
        beta: 1 / nats, > 0.
        desirable_weight: dimensionless, >= 0.
        undesirable_weight: dimensionless, >= 0.
    Returns:
        values (sequences,), from 0 to the weight, unreduced; metrics (sequences,): reward = beta r, reward_accuracy
        (1 where r has the label's sign).
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or a weight is negative or not finite.
    """
    check_same_shape(logratio=logratio, desirable=desirable)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    reward = beta * logratio
    values = torch.where(
        desirable > 0.5, desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward)
    )
    return Loss(values, _metrics(reward, reward, desirable))


class RewardShift:
    """Where rewards lie on the whole, from the steps so far: `bco`'s state.

    With shift ``running_mean`` it is the mean of all rewards seen. With ``class_means`` it is half the sum of the two
    classes' mean rewards, each a moving average over the steps in which its class occurs and begun by the first of
    them; a class that has not occurred counts as 0.

    Args:
        beta: 1 / nats, of the rewards.
        shift: ``running_mean`` or ``class_means``.
        decay: share of the old class mean kept in each step, in [0, 1).
    Raises:
        ValueError: shift is unknown, beta is not a finite number above 0, or decay lies outside [0, 1).
    """

    def __init__(self, *, beta: float, shift: str, decay: float) -> None:
        _check_shift(beta, shift, decay)
        self._beta, self._shift, self._decay = beta, shift, decay
        self._count = 0
        self._mean = 0.0
        self._class_means: dict[str, float] = {}

    def tensors(self) -> dict[str, Scalar]:
        """``reward_shift``, 0-d float64; 0 before the first update."""
        value = self._mean if self._shift == "running_mean" else sum(self._class_means.values()) / 2
        return {"reward_shift": torch.tensor(value, dtype=torch.float64)}

    def update(self, logratio: Sequences, desirable: Sequences) -> None:
        """Take in one step's (sequences,) log-ratios and labels; there may be none of a class, or none at all."""
        rewards, desirable = self._beta * logratio.detach().cpu().double(), desirable.detach().cpu()
        if self._shift == "running_mean":
            if rewards.shape[0] > 0:
                self._count += rewards.shape[0]
                self._mean += (rewards.mean().item() - self._mean) * rewards.shape[0] / self._count
            return
        for name, members in (("desirable", desirable > 0.5), ("undesirable", desirable <= 0.5)):
            if members.any():
                mean = rewards[members].mean().item()
                old = self._class_means.get(name, mean)
                self._class_means[name] = self._decay * old + (1 - self._decay) * mean

    def state_dict(self) -> dict[str, Any]:
        """The kind of shift, and what it is formed from."""
        return {
            "shift": self._shift,
            "count": self._count,
            "mean": self._mean,
            "class_means": dict(self._class_means),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: it belongs to another kind of shift.
        """
        if state["shift"] != self._shift:
            raise ValueError(
                f"the checkpoint's reward shift is {state['shift']!r} and shift is {self._shift!r}; "
                "resume with the checkpoint's setting."
            )
        self._count, self._mean = state["count"], state["mean"]
        self._class_means = dict(state["class_means"])


@declare(
    unit="sequences",
    formula="-logsigmoid(beta r - shift) if desirable else -density_weight logsigmoid(shift - beta r)",
    paper="arXiv:2404.04656 (BCO: reward shift, underlying distribution matching)",
    state=RewardShift,
)
def bco(
    logratio: Sequences,
    desirable: Sequences,
    reward_shift: Scalar,
    density_weight: Sequences | None = None,
    *,
    beta: float = 0.1,
    shift: str = "running_mean",
    decay: float = 0.9,
) -> Loss:
    """BCO: a binary classifier whose logit is the implicit reward, shifted to lie between the two classes.

    The shift is a constant of the optimizer step, formed from the steps before it; TRL's former trainer updates it
    before each micro-batch's loss. ``running_mean`` is that trainer's shift, ``class_means`` the paper's; they differ
    where one label is more frequent. Gradient: with x = beta r - shift, dL/dr = -beta sigmoid(-x) if desirable, else
    density_weight beta sigmoid(x).

    Args:
        logratio: (sequences,) nats, r.
        desirable: (sequences,) 1 or 0.
        reward_shift: 0-d, in units of beta r; from the state.
        density_weight: (sequences,) >= 0, how much likelier the prompt is among desirable than among undesirable
            examples; it multiplies the values of undesirable examples alone. None is 1.
        beta: 1 / nats, > 0.
        shift: ``running_mean``, the mean of all rewards so far, or ``class_means``, half the sum of both classes'
            moving averages.
        decay: share of a class mean kept in each step, in [0, 1); unused with ``running_mean``.
    Returns:
        values (sequences,) in nats, unreduced; the mean runs over sequences, whatever their weights. Metrics:
        reward = beta r and reward_accuracy (1 where beta r - shift has the label's sign), (sequences,); reward_shift.
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, shift is unknown, or decay lies outside [0, 1).
    """
    check_same_shape(logratio=logratio, desirable=desirable, density_weight=density_weight)
    _check_shift(beta, shift, decay)
    reward_shift = reward_shift.detach().to(logratio.dtype)
    lead = beta * logratio - reward_shift
    undesirable = -F.logsigmoid(-lead)
    if density_weight is not None:
        undesirable = density_weight.detach() * undesirable
    values = torch.where(desirable > 0.5, -F.logsigmoid(lead), undesirable)
    return Loss(values, _metrics(beta * logratio, lead, desirable) | {"reward_shift": reward_shift})


def _check_shift(beta: float, shift: str, decay: float) -> None:
    check_positive(beta=beta)
    check_choice(SHIFTS, shift=shift)
    check_below_one(decay=decay)


@declare(
    unit="sequences",
    formula="-logsigmoid(beta r) if desirable else -logsigmoid(-beta r)",
    paper="arXiv:2412.01981 (implicit process reward model, cross-entropy)",
)
def implicit_reward_ce(logratio: Sequences, desirable: Sequences, *, beta: float = 0.05) -> Loss:
    """Cross-entropy of the implicit reward as a logit: outcome labels teach a reward model that also scores steps.

    A step's reward is beta times the sum of its tokens' log-ratios. It is `bco` without shift and density weights.
    Gradient: dL/dr = -beta sigmoid(-beta r) if desirable, else beta sigmoid(beta r).

    Args:
        logratio: (sequences,) nats, r.
        desirable: (sequences,) 1 where the outcome is right, else 0.
        beta: 1 / nats, > 0.
    Returns:
        values (sequences,) in nats, unreduced; metrics (sequences,): reward = beta r, reward_accuracy (1 where r has
        the label's sign).
    Raises:
        ValueError: shapes differ, or beta is not a finite number above 0.
    """
    check_same_shape(logratio=logratio, desirable=desirable)
    check_positive(beta=beta)
    reward = beta * logratio
    values = -F.logsigmoid(torch.where(desirable > 0.5, reward, -reward))
    return Loss(values, _metrics(reward, reward, desirable))


def _metrics(reward: Tensor, lead: Tensor, desirable: Tensor) -> dict[str, Tensor]:
    """The rewards, and 1 where the lead has the label's sign, 0.5 where it is 0."""
    signed = torch.where(desirable > 0.5, lead, -lead)
    return {"reward": reward.detach(), "reward_accuracy": torch.sign(signed.detach()) / 2 + 0.5}
