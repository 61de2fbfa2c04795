"""DPO with another divergence from the reference, with divergences per token, and with pairs weighted by the policy.

A log-ratio is the policy's log-probability of a completion minus the reference's, in nats, summed over its tokens; s is
the sigmoid. Where a loss is -log s(x), dL/dx = -s(-x).
"""

import math

import torch
import torch.nn.functional as F

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_choice, check_in_range, check_same_shape
from posttrain.objectives.rewards import Pairs, implicit_rewards, reward_metrics

FAMILY = "preference"

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


@declare(
    unit="pairs",
    formula="-log s(beta (f'(r_chosen) - f'(r_rejected))), r = exp(logratio), f the divergence's generator",
    paper="arXiv:2309.16240 (f-DPO)",
)
def f_dpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Loss:
    """DPO for a pull to the reference by another f-divergence; a constant in f' cancels.

    f'(r): reverse_kl log r; forward_kl 1 - 1/r; js log(2 r / (1 + r)); alpha (r^(alpha - 1) - 1) / (alpha - 1), which
    is forward_kl at alpha 0 and reverse_kl at 1. The paper writes 1 - alpha for this alpha; at 0.5 they agree.
    ln 2 where the policy is the reference. Gradient, with x the argument of log s: -beta s(-x) g(chosen_logratio) and
    beta s(-x) g(rejected_logratio), g(u) being 1, exp(-u), s(-u) and exp((alpha - 1) u).

    Where an exponential passes e^30 its value goes on as a straight line and its slope is held, so that a completion
    the policy has lost (a log-ratio below -30 / (1 - alpha)) is still pulled back. TRL cuts the exponent of alpha off
    at 80 instead, beyond which the gradient is 0, and leaves that of forward_kl to overflow.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per unit of f', > 0.
        divergence: ``reverse_kl`` (which is `dpo`), ``forward_kl``, ``js`` or ``alpha``.
        alpha: any finite number; read by divergence ``alpha`` only.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`, rewards being beta f'(r).
    Raises:
        ValueError: shapes differ, beta is not above 0, alpha is not finite, or divergence is unknown.
    """
    check_choice(DIVERGENCES, divergence=divergence)
    check_in_range(-math.inf, math.inf, alpha=alpha)
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    if divergence == "js":
        slopes = F.logsigmoid(chosen_logratio) + math.log(2), F.logsigmoid(rejected_logratio) + math.log(2)
    else:
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[divergence]
        slopes = -maths.one_minus_power(chosen_logratio, power), -maths.one_minus_power(rejected_logratio, power)
    chosen, rejected = implicit_rewards(*slopes, beta)
    return Loss(-F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="-log s(x - beta (K_r - K_c)) or -log s(x - beta alpha (K_r - sg(K_c))), K = sum KL(reference || policy)",
    paper="arXiv:2404.11999 (TDPO1 and TDPO2)",
)
def tdpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    chosen_sum_forward_kl: Pairs,
    rejected_sum_forward_kl: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    form: str = "tdpo2",
) -> Loss:
    """Token-level DPO: the margin pays for the drift of the rejected completion beyond the chosen one's.

    x is DPO's margin. ln 2 where the policy is the reference. Gradient, with y the margin of the formula:
    -beta s(-y) and beta s(-y) for the log-ratios; tdpo1 -beta s(-y) for the chosen K and beta s(-y) for the rejected
    one; tdpo2 alpha beta s(-y) for the rejected K alone, the chosen one being held constant (sg).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_sum_forward_kl: (pairs,) nats, KL(reference || policy) at each token, summed over the completion.
        rejected_sum_forward_kl: (pairs,) likewise.
        beta: reward per nat, > 0.
        alpha: what the difference of the sums counts, >= 0; read by form ``tdpo2`` only.
        form: ``tdpo1`` or ``tdpo2``.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics`, whose rewards are without K,
        and chosen_kl and rejected_kl in nats.
    Raises:
        ValueError: shapes differ, beta is not above 0, alpha is negative, or form is unknown.
    """
    check_choice(("tdpo1", "tdpo2"), form=form)
    check_in_range(0.0, math.inf, alpha=alpha)
    check_same_shape(
        chosen_logratio=chosen_logratio,
        chosen_sum_forward_kl=chosen_sum_forward_kl,
        rejected_sum_forward_kl=rejected_sum_forward_kl,
    )
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    if form == "tdpo1":
        drift = rejected_sum_forward_kl - chosen_sum_forward_kl
    else:
        drift = alpha * (rejected_sum_forward_kl - chosen_sum_forward_kl.detach())
    metrics = reward_metrics(chosen, rejected)
    metrics |= {"chosen_kl": chosen_sum_forward_kl.detach(), "rejected_kl": rejected_sum_forward_kl.detach()}
    return Loss(-F.logsigmoid(chosen - rejected - beta * drift), metrics)


@declare(
    unit="pairs",
    formula="-sg(w) log s(x), w = min(1, exp(v_chosen + v_rejected)), v = mean_logp - mean_log_sum_sq_probs",
    paper="arXiv:2406.11827 Eq. 2",
)
def wpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    chosen_mean_logp: Pairs,
    chosen_mean_log_sum_sq_probs: Pairs,
    rejected_mean_logp: Pairs,
    rejected_mean_log_sum_sq_probs: Pairs,
    *,
    beta: float = 0.1,
) -> Loss:
    """DPO weighted by how likely the policy itself is to write the pair; off-policy pairs count less.

    Each token's probability is set against the policy's expected one, sum_k p_k^2, so that own samples weigh about 1.
    The weight is held constant (sg) and multiplies the value: the mean runs over all pairs, weights are not
    normalised to 1. It is cut off at 1 as in the authors' code, which TRL 1.16 leaves out.
    w ln 2 where the policy is the reference. Gradient: dL/dx = -w s(-x).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_mean_logp: (pairs,) nats, log-probability averaged over the completion's tokens.
        chosen_mean_log_sum_sq_probs: (pairs,) log sum_k p_k^2 at each token, averaged likewise.
        rejected_mean_logp: (pairs,) likewise.
        rejected_mean_log_sum_sq_probs: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics`, and pair_weight = w.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    check_same_shape(
        chosen_logratio=chosen_logratio,
        chosen_mean_logp=chosen_mean_logp,
        chosen_mean_log_sum_sq_probs=chosen_mean_log_sum_sq_probs,
        rejected_mean_logp=rejected_mean_logp,
        rejected_mean_log_sum_sq_probs=rejected_mean_log_sum_sq_probs,
    )
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    chosen_likeness = chosen_mean_logp.detach() - chosen_mean_log_sum_sq_probs.detach()
    rejected_likeness = rejected_mean_logp.detach() - rejected_mean_log_sum_sq_probs.detach()
    weight = torch.exp((chosen_likeness + rejected_likeness).clamp(max=0))
    metrics = reward_metrics(chosen, rejected) | {"pair_weight": weight}
    return Loss(-weight * F.logsigmoid(chosen - rejected), metrics)
