"""DPO made less sensitive to the lengths of the two completions.

A log-ratio is the policy's log-probability of a completion minus the reference's, in nats, summed over its tokens; s is
the sigmoid, and x the argument of log s: where a loss is -log s(x), dL/dx = -s(-x).
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape
from posttrain.objectives.rewards import Pairs, implicit_rewards, reward_metrics

FAMILY = "preference"

Lengths = Float[Tensor, " pairs"] | Int[Tensor, " pairs"]


def _token_means(
    chosen_logratio: Pairs, rejected_logratio: Pairs, chosen_length: Lengths, rejected_length: Lengths
) -> tuple[Pairs, Pairs]:
    check_same_shape(
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    # a completion without tokens has the log-ratio 0, and its mean is taken for 0 too
    return chosen_logratio / chosen_length.clamp(min=1), rejected_logratio / rejected_length.clamp(min=1)


@declare(
    unit="pairs",
    formula="(chosen_logratio / chosen_length - rejected_logratio / rejected_length - 1 / (2 tau))^2",
    paper="arXiv:2310.12036 Eq. 17",
)
def ipo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    chosen_length: Lengths,
    rejected_length: Lengths,
    *,
    tau: float = 0.1,
) -> Loss:
    """Identity preference optimization: the margin is regressed on 1 / (2 tau) and does not grow without bound.

    Log-ratios are token means, as in the authors' experiments; the paper's equation does not say so.
    1 / (4 tau^2) where the policy is the reference. Gradient, with d the difference inside the square:
    dL/dchosen_logratio = 2 d / chosen_length, dL/drejected_logratio = -2 d / rejected_length.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_length: (pairs,) tokens of the completion.
        rejected_length: (pairs,) likewise.
        tau: strength of the pull to the reference, > 0.
    Returns:
        values (pairs,) in squared nats per token, unreduced; metrics (pairs,) of `reward_metrics`, rewards being tau
        times the token-mean log-ratio (the margin is drawn to 1/2).
    Raises:
        ValueError: shapes differ, or tau is not above 0.
    """
    check_positive(tau=tau)
    chosen, rejected = _token_means(chosen_logratio, rejected_logratio, chosen_length, rejected_length)
    return Loss((chosen - rejected - 1 / (2 * tau)).square(), reward_metrics(tau * chosen, tau * rejected))


@declare(
    unit="pairs",
    formula="-log s(beta (chosen_logratio / chosen_length - rejected_logratio / rejected_length))",
    paper="arXiv:2411.15124 (length-normalised DPO, Tülu 3)",
)
def length_normalized_dpo(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    chosen_length: Lengths,
    rejected_length: Lengths,
    *,
    beta: float = 5.0,
) -> Loss:
    """DPO on token-mean log-ratios, so that long completions do not make large margins by being long.

    ln 2 where the policy is the reference. Gradient: dL/dchosen_logratio = -beta s(-x) / chosen_length and
    dL/drejected_logratio = beta s(-x) / rejected_length.

    Args:
        chosen_logratio: (pairs,) nats, summed over the completion.
        rejected_logratio: (pairs,) likewise.
        chosen_length: (pairs,) tokens of the completion.
        rejected_length: (pairs,) likewise.
        beta: reward per nat of mean log-ratio, > 0; means are small, so it is 2 to 10 where `dpo` has 0.01 to 0.1.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    means = _token_means(chosen_logratio, rejected_logratio, chosen_length, rejected_length)
    chosen, rejected = implicit_rewards(*means, beta)
    return Loss(-F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected))


@declare(
    unit="pairs",
    formula="dpo of head log-ratios + alpha tail log-ratios, split at the shorter completion's length",
    paper="arXiv:2409.06411 (length-desensitised DPO)",
)
def ld_dpo(
    chosen_head_sum_logp: Pairs,
    chosen_tail_sum_logp: Pairs,
    rejected_head_sum_logp: Pairs,
    rejected_tail_sum_logp: Pairs,
    chosen_reference_head_sum_logp: Pairs,
    chosen_reference_tail_sum_logp: Pairs,
    rejected_reference_head_sum_logp: Pairs,
    rejected_reference_tail_sum_logp: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Loss:
    """DPO in which tokens beyond the shorter completion's length count alpha: verbosity makes less of a margin.

    ln 2 where the policy is the reference. Gradient: -beta s(-x) for the chosen head and beta s(-x) for the rejected
    one, alpha times that for the tails; the shorter completion has no tail.

    Args:
        chosen_head_sum_logp: (pairs,) nats, over the tokens up to the shorter completion's length.
        chosen_tail_sum_logp: (pairs,) nats, over the tokens after it; 0 where there are none.
        rejected_head_sum_logp: (pairs,) likewise.
        rejected_tail_sum_logp: (pairs,) likewise.
        chosen_reference_head_sum_logp: (pairs,) the same of the reference.
        chosen_reference_tail_sum_logp: (pairs,) the same of the reference.
        rejected_reference_head_sum_logp: (pairs,) the same of the reference.
        rejected_reference_tail_sum_logp: (pairs,) the same of the reference.
        beta: reward per nat of log-ratio, > 0.
        alpha: what a tail token counts, in [0, 1]; 1 is `dpo`.
    Returns:
        values (pairs,) in nats, unreduced; metrics (pairs,) of `reward_metrics`, with tails counted alpha.
    Raises:
        ValueError: shapes differ, beta is not above 0, or alpha lies outside [0, 1].
    """
    check_in_range(0.0, 1.0, alpha=alpha)
    check_same_shape(
        chosen_head_sum_logp=chosen_head_sum_logp,
        chosen_tail_sum_logp=chosen_tail_sum_logp,
        rejected_head_sum_logp=rejected_head_sum_logp,
        rejected_tail_sum_logp=rejected_tail_sum_logp,
        chosen_reference_head_sum_logp=chosen_reference_head_sum_logp,
        chosen_reference_tail_sum_logp=chosen_reference_tail_sum_logp,
        rejected_reference_head_sum_logp=rejected_reference_head_sum_logp,
        rejected_reference_tail_sum_logp=rejected_reference_tail_sum_logp,
    )
    chosen_head = chosen_head_sum_logp - chosen_reference_head_sum_logp
    chosen_tail = chosen_tail_sum_logp - chosen_reference_tail_sum_logp
    rejected_head = rejected_head_sum_logp - rejected_reference_head_sum_logp
    rejected_tail = rejected_tail_sum_logp - rejected_reference_tail_sum_logp
    chosen, rejected = implicit_rewards(chosen_head + alpha * chosen_tail, rejected_head + alpha * rejected_tail, beta)
    return Loss(-F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected))
