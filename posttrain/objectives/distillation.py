"""Learning from a teacher: from its stored top-k, or from a teacher model beside the policy.

t is the teacher's next-token distribution, s the policy's, z the policy's logits, e the target's one-hot vector.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_same_length, check_same_shape

Tokens = Float[Tensor, " tokens"]
TokensByK = Float[Tensor, "tokens k"]


@declare(
    unit="tokens",
    formula="alpha (-logp) + (1 - alpha) KL(T || s), T = the teacher's top-k renormalised",
    paper="arXiv:2505.24461",
    token_local=True,
)
def logits_finetuning(logp: Tokens, ids_logp: TokensByK, teacher_ids_logp: TokensByK, *, alpha: float = 0.9) -> Loss:
    """Logits-based fine-tuning: ground truth plus the teacher's k likeliest tokens, stored beside the data.

    Gradient with respect to the logits: alpha (s - e) + (1 - alpha)(s - T); none to the teacher. Not taken over from
    the authors' code: it skips each completion's first token in the KL and averages the KL per completion; here every
    target token counts once. Their token-frequency prior and progressive teacher, both off by default, are absent.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        ids_logp: (tokens, k) nats, the policy's log-probabilities at the token ids of the column ``teacher_ids``.
        teacher_ids_logp: (tokens, k) nats, a data column: the teacher's log-probabilities at the same ids. A slot of
            -inf is padding (its id is 0) and weighs nothing; a token with padding alone learns from its target only.
        alpha: weight of the ground truth, in [0, 1]; the rest is the teacher's.
    Returns:
        values (tokens,) in nats, unreduced; metrics (tokens,): nll and kl in nats, teacher_mass = the probability
        that the stored ids cover in the teacher, before renormalising.
    Raises:
        ValueError: shapes differ, or alpha lies outside [0, 1].
    """
    check_same_shape(ids_logp=ids_logp, teacher_ids_logp=teacher_ids_logp)
    check_same_length(logp=logp, ids_logp=ids_logp)
    check_in_range(0.0, 1.0, alpha=alpha)
    teacher = teacher_ids_logp.detach().to(ids_logp.dtype)
    filled = teacher > -torch.inf
    # a large finite number instead of -inf: softmax gives it 0 all the same, and a row of padding alone stays finite
    log_target = torch.log_softmax(torch.where(filled, teacher, -1e30), dim=1)
    target = torch.where(filled, log_target.exp(), 0)
    kl = (target * torch.where(filled, log_target - ids_logp, 0)).sum(1)
    values = alpha * -logp + (1 - alpha) * kl
    return Loss(values, {"nll": -logp.detach(), "kl": kl.detach(), "teacher_mass": teacher.exp().sum(1)})


@declare(unit="tokens", formula="sum_k t_k log(t_k / s_k)", paper="arXiv:1503.02531", token_local=True)
def forward_kl(forward_kl: Tokens) -> Loss:
    """KL(t || s), knowledge distillation over the whole vocabulary: the policy covers all that the teacher does.

    Gradient with respect to the logits: s - t. The paper's temperature is ``statistics: {temperature: ...}``, on both
    distributions; its factor T^2 is the term's weight.

    Args:
        forward_kl: (tokens,) nats.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(forward_kl)


@declare(
    unit="tokens", formula="sum_k s_k log(s_k / t_k)", paper="arXiv:2306.08543; arXiv:2306.13649", token_local=True
)
def reverse_kl(reverse_kl: Tokens) -> Loss:
    """KL(s || t), the divergence of MiniLLM: the policy keeps to what the teacher finds likely.

    On the data's tokens with the exact gradient over the vocabulary, not MiniLLM's policy gradient on samples.
    Gradient with respect to the logits: s_k (log(s_k / t_k) - KL(s || t)).

    Args:
        reverse_kl: (tokens,) nats.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(reverse_kl)


@declare(
    unit="tokens",
    formula="b KL(t || m) + (1 - b) KL(s || m), m = b t + (1 - b) s",
    paper="arXiv:2306.13649",
    token_local=True,
)
def jsd(jsd: Tokens) -> Loss:
    """The generalised Jensen-Shannon divergence of GKD, bounded where a KL is not.

    b is the kernel option ``statistics: {jsd_beta: 0.5}``; at 0 the kernel gives KL(t || s) and at 1 KL(s || t), which
    are conventions, not limits. Gradient with respect to the logits: (1 - b) s_k (log(s_k / m_k) - KL(s || m)).

    Args:
        jsd: (tokens,) nats.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(jsd)
