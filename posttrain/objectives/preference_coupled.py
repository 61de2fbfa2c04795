"""Objectives of preference pairs that compare sorted pairs: each pair is matched with others of the optimizer step.

a and b are the log-ratios (log-probability minus the reference's, summed over the completion) of the chosen and the
rejected completion. Matches are prepared from the whole step and all ranks, so that neither value nor gradient depends
on how the step is split.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape
from posttrain.objectives.rewards import reward_metrics

FAMILY = "preference"

Pairs = Float[Tensor, " pairs"]


def matched_reference_margin(
    chosen_sequence_logp: Pairs,
    rejected_sequence_logp: Pairs,
    chosen_reference_sequence_logp: Pairs,
    rejected_reference_sequence_logp: Pairs,
) -> dict[str, Pairs]:
    """The reference's margin of the same rank as each pair's own: `aot`'s ``prepare``.

    Args:
        chosen_sequence_logp: (pairs,) nats, of every pair of the step.
        rejected_sequence_logp: (pairs,) nats.
        chosen_reference_sequence_logp: (pairs,) nats.
        rejected_reference_sequence_logp: (pairs,) nats.
    Returns:
        matched_reference_margin, (pairs,) nats.
    """
    margin = chosen_sequence_logp - rejected_sequence_logp
    reference = chosen_reference_sequence_logp - rejected_reference_sequence_logp
    return {"matched_reference_margin": _of_same_rank(margin, reference)}


@declare(
    unit="pairs",
    formula="logistic(beta (m_i - m_ref of the same rank)), m = l_w - l_l, l = sequence_logp",
    paper="arXiv:2406.05882 (AOT, paired)",
    prepare=matched_reference_margin,
)
def aot(
    chosen_sequence_logp: Pairs,
    rejected_sequence_logp: Pairs,
    matched_reference_margin: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """AOT: the policy's margins as a distribution are to dominate the reference's, rank by rank.

    Both are sorted over the whole optimizer step; TRL sorts each rank's micro-batch, so its loss changes with the
    split. The reference is constant, and a pair's margin stays in its own value, so the gradient of the sorted loss
    is that of these values: with x = beta (m - matched), dL/dl_w = -beta ((1 - label_smoothing) sigmoid(-x) -
    label_smoothing sigmoid(x)), dL/dl_l is its negative.

    Args:
        chosen_sequence_logp: (pairs,) nats, summed over the chosen completion.
        rejected_sequence_logp: (pairs,) nats, summed over the rejected completion.
        matched_reference_margin: (pairs,) nats, the reference's margin of the same rank; prepared.
        beta: 1 / nats, > 0.
        label_smoothing: share of the loss with the sign turned round, in [0, 0.5].
    Returns:
        values (pairs,), unreduced; metrics (pairs,): matched_margin = beta (m - matched_reference_margin).
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or label_smoothing lies outside [0, 0.5].
    """
    check_same_shape(
        chosen_sequence_logp=chosen_sequence_logp,
        rejected_sequence_logp=rejected_sequence_logp,
        matched_reference_margin=matched_reference_margin,
    )
    check_positive(beta=beta)
    check_in_range(0.0, 0.5, label_smoothing=label_smoothing)
    lead = beta * (chosen_sequence_logp - rejected_sequence_logp - matched_reference_margin.detach())
    return Loss(_logistic(lead, label_smoothing), {"matched_margin": lead.detach()})


def matched_logratios(chosen_logratio: Pairs, rejected_logratio: Pairs) -> dict[str, Pairs]:
    """For each a the b of the same rank, and for each b the a: `aot_unpaired`'s ``prepare``.

    Args:
        chosen_logratio: (pairs,) nats, of every pair of the step.
        rejected_logratio: (pairs,) nats.
    Returns:
        matched_rejected_logratio and matched_chosen_logratio, (pairs,) nats.
    """
    return {
        "matched_rejected_logratio": _of_same_rank(chosen_logratio, rejected_logratio),
        "matched_chosen_logratio": _of_same_rank(rejected_logratio, chosen_logratio),
    }


@declare(
    unit="pairs",
    formula="logistic(beta (a_i - b of the same rank))",
    paper="arXiv:2406.05882 (AOT, unpaired)",
    prepare=matched_logratios,
)
def aot_unpaired(
    chosen_logratio: Pairs,
    rejected_logratio: Pairs,
    matched_rejected_logratio: Pairs,
    matched_chosen_logratio: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """AOT without pairing: the log-ratios of chosen completions are to dominate those of rejected ones, rank by rank.

    Sorted over the whole optimizer step, where TRL sorts each rank's micro-batch. Pair i's value is that of a_i with
    the b of its rank. b_i itself stands in another pair's value, so pair i carries b_i's gradient by a term of value
    0: summed over the step, value and gradient are those of the sorted loss. Gradient: with
    g(x) = (1 - label_smoothing) sigmoid(-beta x) - label_smoothing sigmoid(beta x), dL/da_i = -beta g(a_i - matched b)
    and dL/db_i = beta g(matched a - b_i).

    Args:
        chosen_logratio: (pairs,) nats, a.
        rejected_logratio: (pairs,) nats, b.
        matched_rejected_logratio: (pairs,) nats, the step's b of the same rank as this pair's a; prepared.
        matched_chosen_logratio: (pairs,) nats, the step's a of the same rank as this pair's b; prepared.
        beta: 1 / nats, > 0.
        label_smoothing: share of the loss with the sign turned round, in [0, 0.5].
    Returns:
        values (pairs,), unreduced; metrics (pairs,): those of `reward_metrics` on beta a and beta b of the pair itself,
        matched_margin = beta (a_i - matched_rejected_logratio).
    Raises:
        ValueError: shapes differ, beta is not a finite number above 0, or label_smoothing lies outside [0, 0.5].
    """
    check_same_shape(
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        matched_rejected_logratio=matched_rejected_logratio,
        matched_chosen_logratio=matched_chosen_logratio,
    )
    check_positive(beta=beta)
    check_in_range(0.0, 0.5, label_smoothing=label_smoothing)
    lead = beta * (chosen_logratio - matched_rejected_logratio.detach())
    elsewhere = _logistic(beta * (matched_chosen_logratio.detach() - rejected_logratio), label_smoothing)
    metrics = reward_metrics(beta * chosen_logratio, beta * rejected_logratio)
    values = _logistic(lead, label_smoothing) + (elsewhere - elsewhere.detach())
    return Loss(values, metrics | {"matched_margin": lead.detach()})


def _logistic(x: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    # stable, so that equals are matched alike on every device
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]
