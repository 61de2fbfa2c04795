"""Direct preference optimization and the losses that differ from it in the shape of the function of one margin.

A log-ratio is the policy's log-probability of a completion minus the reference's, in nats, summed over its tokens.
x = beta (chosen_logratio - rejected_logratio) is the implicit reward margin, s the sigmoid. A loss f(x) has the
gradients dL/dchosen_logratio = beta f'(x) and dL/drejected_logratio = -beta f'(x).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape
from posttrain.objectives.rewards import Pairs, implicit_rewards, reward_metrics

FAMILY = "preference"


@declare(
    unit="pairs",
    formula="-(1 - e) log s(x) - e log s(-x), x = beta (chosen_logratio - rejected_logratio), e = label_smoothing",
    paper="arXiv:2305.18290 Eq. 7; label smoothing: arXiv:2403.00409 (conservative DPO)",
)
def dpo(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Direct preference optimization: logistic regression on the implicit reward margin.

    With label smoothing (conservative DPO) a share of the labels is taken to be wrong, and the margin is drawn to
    log((1 - e) / e) instead of infinity; TRL's ``sigmoid`` loss passes its label smoothing over in silence. ln 2 where
    the policy is the reference. Gradient: dL/dx = s(x) - 1 + e, that is -(1 - e) s(-x) + e s(x).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
        label_smoothing: the share e of flipped labels, in [0, 0.5].
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, beta is not above 0, or label_smoothing lies outside [0, 0.5].
    """
    check_in_range(0.0, 0.5, label_smoothing=label_smoothing)
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    x = chosen - rejected
    values = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    return Loss(values, reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="(-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e), e = label_smoothing",
    paper="arXiv:2403.00409 Sec. 3.1",
)
def robust_dpo(
    chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Loss:
    """DPO made unbiased under flipped labels: its mean over flips at the rate e is the loss of the true labels.

    Not bounded below: a pair pushed far the wrong way is paid for it. ln 2 where the policy is the reference.
    Gradient: dL/dx = -((1 - e) s(-x) + e s(x)) / (1 - 2 e).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
        label_smoothing: the share e of flipped labels, in [0, 0.5); 0 is `dpo`, 0.1 the paper's setting.
    Returns:
        values (pairs,) in nats, unreduced, of either sign; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, beta is not above 0, or label_smoothing lies outside [0, 0.5).
    """
    check_in_range(0.0, 0.5, label_smoothing=label_smoothing)
    if label_smoothing == 0.5:
        raise ValueError("label_smoothing is 0.5, where labels say nothing; give a number from 0 to below 0.5.")
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    x = chosen - rejected
    both = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return Loss(both / (1 - 2 * label_smoothing), reward_metrics(chosen, rejected))


@declare(unit="pairs", formula="max(0, 1 - x)", paper="arXiv:2309.06657 (hinge on normalised likelihoods)")
def hinge(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1) -> Loss:
    """RSO's hinge on the margin: pairs with a margin of 1 or more rest. 1 where the policy is the reference.

    Gradient: dL/dx = -1 below a margin of 1, else 0.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
    Returns:
        values (pairs,), unreduced, >= 0; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return Loss(torch.relu(1 - (chosen - rejected)), reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="s(x) log(s(x) / (1 - e)) + s(-x) log(s(-x) / e), e = label_smoothing",
    paper="arXiv:2402.00856 Eq. 16",
)
def exo(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Loss:
    """Exact optimization from preferences: KL from the policy's choice (s(x), s(-x)) to the labels' (1 - e, e).

    The reverse of smoothed DPO's KL, up to a constant: it seeks one mode. Where the policy is the reference it is
    -ln 2 - log(e (1 - e)) / 2. Gradient: dL/dx = s(x) s(-x) (x - log((1 - e) / e)), which vanishes at both ends, so a
    pair that is wrong by far hardly pulls.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
        label_smoothing: the labels' share e on the rejected completion, in (0, 0.5]; at 0 the KL is infinite.
    Returns:
        values (pairs,) in nats, unreduced, >= 0; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, beta is not above 0, or label_smoothing lies outside (0, 0.5].
    """
    check_positive(label_smoothing=label_smoothing)
    check_in_range(0.0, 0.5, label_smoothing=label_smoothing)
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    x = chosen - rejected
    chosen_part = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    rejected_part = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(label_smoothing))
    return Loss(chosen_part + rejected_part, reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="(1 - m)(-log s(x)) + m exp(-x), m = s(x / tau)",
    paper="arXiv:2406.08414 Eq. 5",
)
def discopop(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.05, tau: float = 0.05) -> Loss:
    """DiscoPOP: the logistic loss where the margin is negative, the exponential one where it is positive.

    m exp(-x) is formed as one exponential, exp(log s(x / tau) - x), which for tau <= 1 is small on both sides; as
    a product it is 0 times infinity below x = -88 in float32, which is NaN. For tau > 1 it grows to the left: it is
    held at e^30 and goes on as a straight line. (1 + ln 2) / 2 where the policy is the reference.
    Gradient: dL/dx = -(1 - m) s(-x) + m (1 - m) log s(x) / tau + m exp(-x) ((1 - m) / tau - 1).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0; 0.05 is the paper's.
        tau: margin over which one loss blends into the other, > 0.
    Returns:
        values (pairs,), unreduced, > 0; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta or tau is not above 0.
    """
    check_positive(tau=tau)
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    x = chosen - rejected
    logistic = torch.sigmoid(-x / tau) * -F.logsigmoid(x)
    exponential = maths.power(F.logsigmoid(x / tau) - x, 1.0)
    return Loss(logistic + exponential, reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="-log s(x - beta lam max(0, -chosen_logratio))",
    paper="arXiv:2402.13228 (DPO-Positive, Smaug)",
)
def dpop(chosen_logratio: Pairs, rejected_logratio: Pairs, *, beta: float = 0.1, lam: float = 50.0) -> Loss:
    """DPO-Positive: the margin pays lam times for a chosen completion that is less likely than under the reference.

    ln 2 where the policy is the reference. Gradient, with y the penalised margin: dL/dchosen_logratio =
    -beta s(-y) (1 + lam [chosen_logratio < 0]), dL/drejected_logratio = beta s(-y).

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        beta: reward per nat of log-ratio, > 0.
        lam: strength of the penalty, >= 0; 0 is `dpo`.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`, whose rewards are without the penalty.
    Raises:
        ValueError: shapes differ, beta is not above 0, or lam is negative.
    """
    check_in_range(0.0, math.inf, lam=lam)
    chosen, rejected = implicit_rewards(chosen_logratio, rejected_logratio, beta)
    y = chosen - rejected - lam * torch.relu(-chosen)
    return Loss(-F.logsigmoid(y), reward_metrics(chosen, rejected))


@declare(unit="pairs", formula="-chosen_mean_logp", paper="arXiv:2404.19733 Eq. 1 (the likelihood term)")
def chosen_nll(chosen_mean_logp: Pairs) -> Loss:
    """Negative log-likelihood per token of the chosen completion: a term to add to a loss of margins.

    Each pair counts alike whatever its length; TRL's ``sft`` term averages over the tokens of a micro-batch, so
    that long completions weigh more and the value depends on the split. Gradient: -1.

    Args:
        chosen_mean_logp: (pairs,) nats, log-probability of the chosen completion averaged over its tokens.
    Returns:
        values (pairs,) in nats per token, unreduced.
    """
    return Loss(-chosen_mean_logp)


@declare(unit="pairs", formula="dpo + alpha (-chosen_mean_logp)", paper="arXiv:2404.19733 Eq. 1")
def iterative_rpo(
    chosen_logratio: Pairs, rejected_logratio: Pairs, chosen_mean_logp: Pairs, *, beta: float = 0.1, alpha: float = 1.0
) -> Loss:
    """The loss of iterative reasoning preference optimization: `dpo` plus alpha times `chosen_nll`.

    The same as the two terms in a list, the second with the weight alpha. Gradient: that of `dpo`, and
    dL/dchosen_mean_logp = -alpha.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_mean_logp: (pairs,) nats, log-probability of the chosen completion averaged over its tokens.
        beta: reward per nat of log-ratio, > 0.
        alpha: weight of the likelihood term, >= 0.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,): those of `reward_metrics`, and chosen_nll.
    Raises:
        ValueError: shapes differ, beta is not above 0, or alpha is negative.
    """
    check_in_range(0.0, math.inf, alpha=alpha)
    check_same_shape(chosen_logratio=chosen_logratio, chosen_mean_logp=chosen_mean_logp)
    margin = dpo(chosen_logratio, rejected_logratio, beta=beta)
    likelihood = chosen_nll(chosen_mean_logp).values
    metrics: dict[str, Tensor] = {**margin.metrics, "chosen_nll": likelihood.detach()}
    return Loss(margin.values + alpha * likelihood, metrics)
