"""Unlearning by the shape of the next-token distribution: towards uniform, a runner-up, a refusal or the reference.

s = softmax(z) is the policy's distribution over V tokens, y the token to forget, e its one-hot vector, p = s_y; r is
the distribution of the reference, the model before unlearning.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape

FAMILY = "unlearning"

Tokens = Float[Tensor, " tokens"]
TokensByIds = Float[Tensor, "tokens ids"]


@declare(
    unit="tokens",
    formula="cross-entropy with softmax(reference logits - beta e)",
    paper="arXiv:2402.10052 (UNDIAL)",
    token_local=True,
)
def undial(
    logp: Tokens, teacher_logp: Tokens, forward_kl: Tokens, teacher_entropy: Tokens, *, beta: float = 10.0
) -> Loss:
    """Self-distillation from the reference with the logit of the token to forget lowered by beta.

    With c = 1 - e^-beta the adjusted teacher is t_y = (1 - c) r_y / (1 - c r_y) and t_k = r_k / (1 - c r_y) elsewhere,
    so the cross-entropy is (forward_kl + teacher_entropy + c r_y logp) / (1 - c r_y), and no row of logits is held.
    Gradient with respect to the logits: s - t. Where the reference is certain (1 - r_y below e^-beta) the two sums
    cancel: float32 values then carry an error of up to 1e-7 e^beta relative to the sums, and the logits' gradient one
    of some 1e-7 e^beta (0.01 at beta 10) beside entries of at most 1. Prompt and padding positions do not count, unlike
    in open-unlearning. ``teacher_logp`` is the reference's logp from the pass that the other two need anyway.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        teacher_logp: (tokens,) nats, the same of the reference, log r_y.
        forward_kl: (tokens,) nats, KL(r || s).
        teacher_entropy: (tokens,) nats, of r.
        beta: logit units, > 0.
    Returns:
        values (tokens,) in nats, unreduced, >= 0; metrics (tokens,): nll in nats, probability, both of the token to
        forget.
    Raises:
        ValueError: shapes differ, or beta is not above 0.
    """
    check_same_shape(logp=logp, teacher_logp=teacher_logp, forward_kl=forward_kl, teacher_entropy=teacher_entropy)
    check_positive(beta=beta)
    r = teacher_logp.exp()
    # 1 - c r without the cancellation of 1 - r
    rest = maths.one_minus_p(teacher_logp) + math.exp(-beta) * r
    values = (forward_kl + teacher_entropy - math.expm1(-beta) * r * logp) / rest
    return Loss(values, {"nll": -logp.detach(), "probability": logp.detach().exp()})


@declare(
    unit="tokens",
    formula="(max_logit - mean_logit)^2",
    paper="arXiv:2506.05314 (PDU: constrained entropic unlearning)",
    token_local=True,
)
def margin_flattening(max_logit: Tokens, mean_logit: Tokens) -> Loss:
    """PDU's forget loss: the logits of every answer position are drawn towards a uniform distribution.

    Zero for the uniform distribution alone. It does not look at the target, and it needs no softmax. Gradient with
    respect to the logits: 2 (max_logit - mean_logit) (e_argmax - 1/V). The published method minimises it under a
    constraint on the retain loss: preset pdu.

    Args:
        max_logit: (tokens,) the largest logit.
        mean_logit: (tokens,) mean of the logits over the vocabulary.
    Returns:
        values (tokens,), squared logit units, unreduced, >= 0; metrics (tokens,): margin = max_logit - mean_logit.
    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(max_logit=max_logit, mean_logit=mean_logit)
    margin = max_logit - mean_logit
    return Loss(margin.square(), {"margin": margin.detach()})


@declare(
    unit="tokens",
    formula="logsumexp - mean_logit = KL(uniform || s) + log V",
    paper="arXiv:2410.08109 (ME, maximising entropy)",
    token_local=True,
)
def uniform_kl(logsumexp: Tokens, mean_logit: Tokens) -> Loss:
    """KL from the uniform distribution over the vocabulary to the policy, plus the constant log V.

    The statistics do not know the size V of the vocabulary, so the value is the cross-entropy with the uniform
    distribution: log V, not 0, where the policy is uniform. The constant changes no gradient; the bound of a constraint
    has to count it in. Gradient with respect to the logits: s - 1/V. The authors' code adds 1e-12 to s, which stops the
    gradient of tokens rarer than that; this has no such floor.

    Args:
        logsumexp: (tokens,) log sum exp of the logits.
        mean_logit: (tokens,) mean of the logits over the vocabulary.
    Returns:
        values (tokens,) in nats, unreduced, >= log V.
    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logsumexp=logsumexp, mean_logit=mean_logit)
    return Loss(logsumexp - mean_logit)


@declare(
    unit="tokens",
    formula="max(0, margin + p - max_(v != y) s_v)",
    paper="arXiv:2408.06621 (IHL, inverted hinge)",
    token_local=True,
)
def inverted_hinge(logp: Tokens, logsumexp: Tokens, max_nontarget_logit: Tokens, *, margin: float = 1.0) -> Loss:
    """The token to forget falls below the likeliest other token, and only these two probabilities matter.

    Gradient with respect to the logits, where the hinge is open: p (e - s) - s_v (e_v - s), v the likeliest other
    token. At margin 1 the hinge never closes.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        logsumexp: (tokens,) log sum exp of the logits.
        max_nontarget_logit: (tokens,) the largest logit other than the target's.
        margin: probability by which the other token has to lead, in (0, 1].
    Returns:
        values (tokens,), unreduced, in [0, 1 + margin]; metrics (tokens,): nll in nats, probability, both of the token
        to forget, and runner_up, the probability of the other.
    Raises:
        ValueError: shapes differ, or margin lies outside (0, 1].
    """
    check_same_shape(logp=logp, logsumexp=logsumexp, max_nontarget_logit=max_nontarget_logit)
    check_positive(margin=margin)
    check_in_range(0.0, 1.0, margin=margin)
    p, other = logp.exp(), torch.exp(max_nontarget_logit - logsumexp)
    metrics = {"nll": -logp.detach(), "probability": p.detach(), "runner_up": other.detach()}
    return Loss(torch.relu(margin + p - other), metrics)


@declare(
    unit="tokens",
    formula="log 2 + (t log t - (1 + t) log(1 + t)) / 2 = JSD(s, one-hot of the refusal's token), t = its probability",
    paper="arXiv:2509.02820 (JensUn)",
    token_local=True,
)
def jensen_refusal(ids_logp: TokensByIds) -> Loss:
    """Jensen-Shannon divergence to a fixed refusal, written over the positions of the answer to forget.

    The refusal's tokens repeat in a cycle over the answer's positions (``data.refusal_template``, "No idea" in the
    paper). The divergence to a one-hot vector depends on t alone, and is bounded by log 2. Gradient:
    dL/dids_logp = t log(t / (1 + t)) / 2; -ln 2 / 2 at t = 1, and it fades as t falls to 0.

    Args:
        ids_logp: (tokens, 1) nats, log-probability of the refusal's token at each position, whose id is in the column
            ``teacher_ids``; of several ids, the first counts.
    Returns:
        values (tokens,) in nats, unreduced, in [0, log 2]; metrics (tokens,): refusal_probability = t.
    """
    logp = ids_logp[:, 0]
    t = logp.exp()
    values = math.log(2) + (t * logp - (1 + t) * torch.log1p(t)) / 2
    return Loss(values, {"refusal_probability": t.detach()})


@declare(
    unit="tokens",
    formula="KL(r || s), r = the model before unlearning",
    paper="arXiv:2401.06121 (KL minimisation)",
    token_local=True,
)
def kl(forward_kl: Tokens) -> Loss:
    """KL from the model before unlearning, for what is to stay.

    On answer positions alone: prompt and padding do not count, unlike in open-unlearning and TOFU's code. Gradient with
    respect to the logits: s - r.

    Args:
        forward_kl: (tokens,) nats, KL(r || s).
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(forward_kl)
