"""beta-DPO: a loss that remembers the margins of earlier steps.

a and b are the log-ratios (log-probability minus the reference's, summed over the completion) of the chosen and the
rejected completion, Delta = a - b.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_below_one, check_in_range, check_integer, check_positive, check_same_shape
from posttrain.objectives.rewards import reward_metrics

FAMILY = "preference"

Pairs = Float[Tensor, " pairs"]
Scalar = Float[Tensor, ""]

SMALLEST_DEVIATION = 1e-6
SMALLEST_BETA = 1e-3


class MarginAverage:
    """Moving averages of the mean and the deviation of Delta over the pairs of a step: `beta_dpo`'s state.

    The first step initialises them; averages that start at 0 would take many steps to reach the data.

    Args:
        decay: share of the old average that is kept in each step, in [0, 1).
    Raises:
        ValueError: decay lies outside [0, 1).
    """

    def __init__(self, *, decay: float) -> None:
        check_below_one(decay=decay)
        self._decay = decay
        self._mean = 0.0
        self._deviation = 0.0
        self._steps = 0

    def tensors(self) -> dict[str, Scalar]:
        """margin_mean and margin_deviation in nats, and margin_steps, the updates so far; 0-d float64."""
        values = {"margin_mean": self._mean, "margin_deviation": self._deviation, "margin_steps": float(self._steps)}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def update(self, chosen_logratio: Pairs, rejected_logratio: Pairs) -> None:
        """Take in one step's (pairs,) log-ratios; the deviation is that of the population, 0 for one pair."""
        if chosen_logratio.shape[0] == 0:
            return
        margin = (chosen_logratio - rejected_logratio).detach().cpu().double()
        decay = self._decay if self._steps else 0.0
        self._mean = decay * self._mean + (1 - decay) * margin.mean().item()
        self._deviation = decay * self._deviation + (1 - decay) * margin.std(correction=0).item()
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates."""
        return {"mean": self._mean, "deviation": self._deviation, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._mean, self._deviation, self._steps = state["mean"], state["deviation"], state["steps"]


def batch_beta_and_kept_pairs(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    margin_mean: Scalar,
    margin_deviation: Scalar,
    margin_steps: Scalar,
    *,
    beta: float,
    alpha: float,
    rho: float,
    seed: int,
) -> dict[str, Tensor]:
    """Which pairs of a step are kept, and the beta that they share: `beta_dpo`'s ``prepare``.

    Pairs are drawn without replacement, in proportion to exp(-((Delta - mean) / deviation)^2 / 2), by random numbers
    that depend on the seed and on margin_steps alone and so are the same on every rank. They are dealt out in the order
    of Delta, so the order of the pairs matters among equals only. Before the first update all pairs weigh alike and
    beta stays as it is.

    Args:
        chosen_logratio: (pairs,) nats, of every pair of the step.
        rejected_logratio: (pairs,) nats.
        margin_mean: 0-d nats, moving average of the mean of Delta.
        margin_deviation: 0-d nats, moving average of its deviation.
        margin_steps: 0-d, updates of the two so far.
        beta: 1 / nats.
        alpha: 1 / nats.
        rho: share of pairs to leave out.
        seed: of the draw.
    Returns:
        beta_batch, 0-d in 1 / nats, and keep, (pairs,), 1 or 0.
    """
    device, pairs = chosen_logratio.device, chosen_logratio.shape[0]
    if pairs == 0:
        return {"beta_batch": chosen_logratio.new_tensor(beta), "keep": chosen_logratio.new_zeros(0)}
    margin = (chosen_logratio - rejected_logratio).cpu().double()
    steps = int(margin_steps.item())
    # the generator reads the lower 32 bits of its seed alone
    generator = torch.Generator().manual_seed((seed * 1_000_003 + steps) % 2**32)
    uniform = torch.rand(pairs, generator=generator, dtype=torch.float64)
    # the largest of log-weight plus Gumbel noise are a draw without replacement, also where every weight underflows
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    # dealt out by rank: the pairs' order, which changes with the number of processes, chooses among equals alone
    order = gumbel[margin.argsort(stable=True).argsort()]
    shift = torch.zeros_like(margin)
    if steps:
        shift = margin - margin_mean.item()
        order = order - (shift / max(margin_deviation.item(), SMALLEST_DEVIATION)).square() / 2
    kept = order.topk(max(1, math.floor(pairs * (1 - rho) + 1e-9))).indices
    batch = (beta * (1 + alpha * shift[kept].mean())).clamp(min=SMALLEST_BETA)
    keep = torch.zeros_like(margin).index_fill(0, kept, 1.0)
    return {"beta_batch": batch.to(device, chosen_logratio.dtype), "keep": keep.to(device, chosen_logratio.dtype)}


@declare(
    unit="pairs",
    formula="-logsigmoid(beta_b Delta) of kept pairs, beta_b = max(beta (1 + alpha (mean_kept(Delta) - mean)), 0.001)",
    paper="arXiv:2407.08639 (batch-level beta, beta-guided filtering)",
    model_weight=True,
    prepare=batch_beta_and_kept_pairs,
    state=MarginAverage,
)
def beta_dpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    beta_batch: Scalar,
    keep: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    rho: float = 0.2,
    decay: float = 0.9,
    seed: int = 0,
) -> Loss:
    """beta-DPO: DPO whose beta follows the batch's margins, on the pairs whose margin is nearest the usual.

    The mean and the deviation of Delta are moving averages as they stood before the step; the authors' code updates
    them first, starts them at 0 (where 0 / 0 picks the pairs of the first step) and takes them in evaluation too.
    The batch is the optimizer step over all ranks. Gradient, beta_b and the choice held constant:
    dL/da = -beta_b sigmoid(-beta_b Delta), dL/db is its negative; pairs left out have weight 0.

    Args:
        chosen_logratio: (pairs,) nats, a.
        rejected_logratio: (pairs,) nats, b.
        beta_batch: 0-d, 1 / nats; prepared.
        keep: (pairs,) 1 where the pair is kept, else 0; prepared.
        beta: 1 / nats, > 0, the beta of a batch with the usual margin.
        alpha: 1 / nats, >= 0, how far beta follows the batch's mean margin.
        rho: share of the step's pairs left out, in [0, 1); at least one pair stays.
        decay: share of the moving averages kept in each step, in [0, 1).
        seed: whole number >= 0, of the draw.
    Returns:
        values (pairs,), unreduced; weight (pairs,) = keep; metrics: those of `reward_metrics` on beta a and beta b
        (pairs,), kept (pairs,), beta_batch (0-d).
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, alpha is negative, rho or decay lies outside
            [0, 1), or seed is no whole number of at least 0.
    """
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio, keep=keep)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, alpha=alpha)
    check_integer(0, seed=seed)
    check_below_one(rho=rho, decay=decay)
    weight, beta_batch = keep.detach(), beta_batch.detach()
    metrics = reward_metrics(beta * chosen_logratio, beta * rejected_logratio)
    values = -F.logsigmoid(beta_batch * (chosen_logratio - rejected_logratio))
    return Loss(values, metrics | {"kept": weight, "beta_batch": beta_batch}, weight)
