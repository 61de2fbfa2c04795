"""Objectives of preference pairs that need no reference model.

A completion's log-probability is written l where it is summed over the completion's tokens and lbar where it is their
mean, p = exp(lbar); w is the chosen completion, l the rejected one. Prompts are never trained.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape
from posttrain.objectives.rewards import reward_metrics

FAMILY = "preference"

Pairs = Float[Tensor, " pairs"]


@declare(
    unit="pairs",
    formula="relu(delta - l_w + l_l) - lam l_w, l = sequence_logp",
    paper="arXiv:2305.10425 (SLiC-HF: calibration plus regularisation, the chosen completion as its target)",
)
def slic(chosen_sequence_logp: Pairs, rejected_sequence_logp: Pairs, *, delta: float = 1.0, lam: float = 0.1) -> Loss:
    """SLiC: a hinge on the difference of two log-probabilities, and the likelihood of the chosen completion.

    The regulariser counts once per pair. HALOs adds it per token to a loss per pair, which is another weight for
    every length. Gradient: with h = 1 where l_w - l_l < delta and 0 elsewhere, dL/dl_w = -h - lam and dL/dl_l = h.

    Args:
        chosen_sequence_logp: (pairs,) nats, summed over the chosen completion.
        rejected_sequence_logp: (pairs,) nats, summed over the rejected completion.
        delta: nats, >= 0, the difference from which on the hinge rests.
        lam: dimensionless, >= 0, the weight of the chosen completion's negative log-likelihood.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics` on l itself, nll of the chosen
        completion in nats.
    Raises:
        ValueError: shapes differ, or delta or lam is negative or not finite.
    """
    check_same_shape(chosen_sequence_logp=chosen_sequence_logp, rejected_sequence_logp=rejected_sequence_logp)
    check_in_range(0.0, math.inf, delta=delta, lam=lam)
    values = F.relu(delta - chosen_sequence_logp + rejected_sequence_logp) - lam * chosen_sequence_logp
    metrics = reward_metrics(chosen_sequence_logp, rejected_sequence_logp)
    return Loss(values, metrics | {"nll": -chosen_sequence_logp.detach()})


@declare(
    unit="pairs",
    formula="-logsigmoid(beta (lbar_w - lbar_l) - gamma), lbar = mean_logp",
    paper="arXiv:2405.14734 Eq. 6",
)
def simpo(chosen_mean_logp: Pairs, rejected_mean_logp: Pairs, *, beta: float = 2.0, gamma: float = 0.5) -> Loss:
    """SimPO: the mean log-probability is the reward, and it has to lead by a margin.

    gamma is the margin of the rewards beta * lbar, as in the paper's equation. The authors' settings and TRL's formula
    give gamma / beta, the margin of the mean log-probabilities; the defaults are that ratio's 0.25.
    Gradient: with s = sigmoid(gamma - beta (lbar_w - lbar_l)), dL/dlbar_w = -beta s and dL/dlbar_l = beta s.

    Args:
        chosen_mean_logp: (pairs,) nats, mean over the chosen completion's tokens.
        rejected_mean_logp: (pairs,) nats, mean over the rejected completion's tokens.
        beta: 1 / nats, > 0; 2 to 10 in the paper, as means are small.
        gamma: dimensionless, >= 0, the target of the difference of rewards.
    Returns:
        values (pairs,), unreduced; metrics (pairs,): those of `reward_metrics` on beta * lbar.
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or gamma is negative or not finite.
    """
    check_same_shape(chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, gamma=gamma)
    return _with_margin(beta * chosen_mean_logp, beta * rejected_mean_logp, gamma)


@declare(
    unit="pairs",
    formula="-logsigmoid(beta (r_w - r_l) - gamma), r = (1 - p^-alpha) / alpha; lbar at alpha = 0",
    paper="arXiv:2501.03884 (the AlphaPO reward in SimPO's loss)",
)
def alpha_po(
    chosen_mean_logp: Pairs,
    rejected_mean_logp: Pairs,
    *,
    alpha: float = 0.25,
    beta: float = 2.5,
    gamma: float = 0.25,
) -> Loss:
    """AlphaPO: SimPO with the logarithm in its reward bent by a power of the mean probability.

    gamma is the margin of the rewards, as in `simpo`. The reward is formed from lbar, without p. Where alpha is above
    0 it falls as p^-alpha for unlikely completions: past e^30 it goes on as a straight line, so that it stays finite.
    Gradient: with s = sigmoid(gamma - beta (r_w - r_l)), dL/dlbar_w = -beta s p_w^-alpha and dL/dlbar_l =
    beta s p_l^-alpha, the powers held at e^30.

    Args:
        chosen_mean_logp: (pairs,) nats, mean over the chosen completion's tokens.
        rejected_mean_logp: (pairs,) nats, mean over the rejected completion's tokens.
        alpha: dimensionless, any finite number; 0 is `simpo`, above 0 unlikely completions pull more, below 0 less.
        beta: 1 / nats, > 0.
        gamma: dimensionless, >= 0, the target of the difference of rewards.
    Returns:
        values (pairs,), unreduced; metrics (pairs,): those of `reward_metrics` on beta * r.
    Raises:
        ValueError: shapes differ, alpha is not finite, beta is not a finite number above 0, or gamma is negative or
            not finite.
    """
    check_same_shape(chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    check_in_range(-math.inf, math.inf, alpha=alpha)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, gamma=gamma)
    chosen, rejected = (-beta * maths.one_minus_power(x, -alpha) for x in (chosen_mean_logp, rejected_mean_logp))
    return _with_margin(chosen, rejected, gamma)


def _with_margin(chosen_reward: Tensor, rejected_reward: Tensor, gamma: float) -> Loss:
    values = -F.logsigmoid(chosen_reward - rejected_reward - gamma)
    return Loss(values, reward_metrics(chosen_reward, rejected_reward))


@declare(
    unit="pairs",
    formula="-logsigmoid(beta (l_w - l_l)) - alpha lbar_w",
    paper="arXiv:2401.08417 Eq. 3 plus its negative log-likelihood",
)
def cpo(
    chosen_sequence_logp: Pairs,
    rejected_sequence_logp: Pairs,
    chosen_mean_logp: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Loss:
    """CPO: DPO with a uniform reference, held back by the likelihood of the chosen completion.

    The likelihood is each completion's token mean, so that a pair's loss does not depend on its neighbours; TRL takes
    one mean over all chosen tokens of a micro-batch, which weighs long completions more and depends on the split.
    Gradient: with s = sigmoid(-beta (l_w - l_l)), dL/dl_w = -beta s, dL/dl_l = beta s and dL/dlbar_w = -alpha.

    Args:
        chosen_sequence_logp: (pairs,) nats, summed over the chosen completion.
        rejected_sequence_logp: (pairs,) nats, summed over the rejected completion.
        chosen_mean_logp: (pairs,) nats, mean over the chosen completion's tokens.
        beta: 1 / nats, > 0.
        alpha: dimensionless, >= 0, the weight of the chosen completion's negative log-likelihood.
    Returns:
        values (pairs,), unreduced; metrics (pairs,): those of `reward_metrics` on beta * l, nll in nats per token of
        the chosen completion.
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or alpha is negative or not finite.
    """
    check_same_shape(
        chosen_sequence_logp=chosen_sequence_logp,
        rejected_sequence_logp=rejected_sequence_logp,
        chosen_mean_logp=chosen_mean_logp,
    )
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, alpha=alpha)
    values = -F.logsigmoid(beta * (chosen_sequence_logp - rejected_sequence_logp)) - alpha * chosen_mean_logp
    metrics = reward_metrics(beta * chosen_sequence_logp, beta * rejected_sequence_logp)
    return Loss(values, metrics | {"nll": -chosen_mean_logp.detach()})


@declare(
    unit="pairs",
    formula="-lbar_w - lam logsigmoid(logodds_w - logodds_l), logodds = lbar - log(1 - exp(lbar))",
    paper="arXiv:2403.07691 Eqs. 4, 6 and 7",
)
def orpo(chosen_mean_logp: Pairs, rejected_mean_logp: Pairs, *, lam: float = 0.1) -> Loss:
    """ORPO: supervised fine-tuning on the chosen completion, and the odds of the two completions apart.

    The likelihood covers the completion alone, as its mean; TRL's covers the prompt as well, and averages over the
    tokens of a micro-batch. The odds are formed from lbar without p, exact where p is near 1.
    Gradient: with s = sigmoid(logodds_l - logodds_w), dL/dlbar_w = -1 - lam s / (1 - p_w) and
    dL/dlbar_l = lam s / (1 - p_l). At p = 1 in floating point the odds are held at those of the largest p below 1,
    with the slope 1 / (1 - p) replaced by 1.

    Args:
        chosen_mean_logp: (pairs,) nats, mean over the chosen completion's tokens.
        rejected_mean_logp: (pairs,) nats, mean over the rejected completion's tokens.
        lam: dimensionless, >= 0, the weight of the odds ratio.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics` on the log-odds, nll in nats
        per token of the chosen completion.
    Raises:
        ValueError: shapes differ, or lam is negative or not finite.
    """
    check_same_shape(chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    check_in_range(0.0, math.inf, lam=lam)
    chosen, rejected = (x - maths.log1mexp(x) for x in (chosen_mean_logp, rejected_mean_logp))
    values = -chosen_mean_logp - lam * F.logsigmoid(chosen - rejected)
    return Loss(values, reward_metrics(chosen, rejected) | {"nll": -chosen_mean_logp.detach()})
