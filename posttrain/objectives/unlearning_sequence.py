"""Unlearning by whole completions: preference losses with nothing, or a refusal, in the place of the chosen one.

A log-ratio is the policy's log-probability of a completion minus the reference's (the model before unlearning), in
nats, summed over its tokens. sigma is the logistic function.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape

FAMILY = "unlearning"

Sequences = Float[Tensor, " sequences"]


@declare(
    unit="sequences",
    formula="-(2 / beta) log sigma(-beta logratio)",
    paper="arXiv:2404.05868 Eq. 3 (NPO)",
)
def npo(logratio: Sequences, *, beta: float = 0.1) -> Loss:
    """Negative preference optimization: DPO with the rejected completion alone; it lets go once that has become rare.

    (2 / beta) ln 2 where the policy is the reference. For beta -> 0 it is gradient ascent on the sum (not the mean)
    over the completion's tokens. Gradient: dL/dlogratio = 2 sigma(beta logratio).

    Args:
        logratio: (sequences,) nats, summed over the completion to forget.
        beta: 1 / nats, > 0; how fast a completion lets go.
    Returns:
        values (sequences,) in nats, unreduced, >= 0; metrics (sequences,): logratio in nats, gradient_weight.
    Raises:
        ValueError: beta is not above 0.
    """
    check_positive(beta=beta)
    held = logratio.detach()
    metrics = {"logratio": held, "gradient_weight": 2 * torch.sigmoid(beta * held)}
    return Loss(-F.logsigmoid(-beta * logratio) * (2 / beta), metrics)


@declare(
    unit="sequences",
    formula="-(2 / beta) log sigma(-beta (mean_logp + delta))",
    paper="arXiv:2410.07163 (SimNPO)",
)
def simnpo(mean_logp: Sequences, *, beta: float = 4.5, delta: float = 0.0) -> Loss:
    """NPO without a reference, on the mean log-probability of a token: long completions weigh no more than short ones.

    Gradient: dL/dmean_logp = 2 sigma(beta (mean_logp + delta)).

    Args:
        mean_logp: (sequences,) nats a token, over the completion to forget.
        beta: tokens / nats, > 0; 4.5 in open-unlearning, 2.5 by the authors on TOFU.
        delta: nats a token, the negative log-likelihood at which a completion has half let go; >= 0.
    Returns:
        values (sequences,) in nats a token, unreduced, >= 0; metrics (sequences,): nll in nats a token,
        gradient_weight.
    Raises:
        ValueError: beta is not above 0, or delta is negative or not finite.
    """
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, delta=delta)
    x = beta * (mean_logp + delta)
    metrics = {"nll": -mean_logp.detach(), "gradient_weight": 2 * torch.sigmoid(x.detach())}
    return Loss(-F.logsigmoid(-x) * (2 / beta), metrics)


@declare(
    unit="sequences",
    formula="-(2 / beta) log sigma(beta (refusal_logratio - logratio))",
    paper="arXiv:2401.06121 (preference optimization); arXiv:2305.18290 Eq. 7",
)
def preference_refusal(logratio: Sequences, refusal_logratio: Sequences, *, beta: float = 0.1) -> Loss:
    """DPO with a refusal as the chosen and the completion to forget as the rejected one.

    The factor 2 / beta is TOFU's; `npo` has it too. (2 / beta) ln 2 where the policy is the reference. Gradient:
    dL/dlogratio = 2 sigma(-x), dL/drefusal_logratio = -2 sigma(-x), x = beta (refusal_logratio - logratio).

    Args:
        logratio: (sequences,) nats, summed over the completion to forget.
        refusal_logratio: (sequences,) likewise, of the refusal to the same prompt.
        beta: 1 / nats, > 0.
    Returns:
        values (sequences,) in nats, unreduced, >= 0; metrics (sequences,): logratio, refusal_logratio in nats and
        gradient_weight.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    check_same_shape(logratio=logratio, refusal_logratio=refusal_logratio)
    check_positive(beta=beta)
    x = beta * (refusal_logratio - logratio)
    metrics = {
        "logratio": logratio.detach(),
        "refusal_logratio": refusal_logratio.detach(),
        "gradient_weight": 2 * torch.sigmoid(-x.detach()),
    }
    return Loss(-F.logsigmoid(x) * (2 / beta), metrics)


@declare(
    unit="sequences",
    formula="-(1 / beta) log sigma(beta (sequence_logp - retain_refusal_sequence_logp))",
    paper="arXiv:2410.08109 (AP, answer preservation)",
)
def preference_retention(
    sequence_logp: Sequences, retain_refusal_sequence_logp: Sequences, *, beta: float = 0.1
) -> Loss:
    """Answer preservation: what is to stay remains likelier than a refusal to the same question.

    The complement of `refusal_nll`, whose refusals spread to retained questions. Without a reference. Gradient:
    dL/dsequence_logp = -sigma(-x), dL/dretain_refusal_sequence_logp = sigma(-x), x = beta (sequence_logp -
    retain_refusal_sequence_logp).

    Args:
        sequence_logp: (sequences,) nats, of the answer to retain, summed over its tokens.
        retain_refusal_sequence_logp: (sequences,) likewise, of a refusal to the same prompt.
        beta: 1 / nats, > 0.
    Returns:
        values (sequences,) in nats, unreduced, >= 0; metrics (sequences,): preference_accuracy, 1.0 where the answer is
        the likelier one.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    check_same_shape(sequence_logp=sequence_logp, retain_refusal_sequence_logp=retain_refusal_sequence_logp)
    check_positive(beta=beta)
    margin = sequence_logp - retain_refusal_sequence_logp
    accuracy = torch.sign(margin.detach()) / 2 + 0.5
    return Loss(-F.logsigmoid(beta * margin) / beta, {"preference_accuracy": accuracy})
