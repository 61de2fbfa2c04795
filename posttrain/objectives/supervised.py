"""Supervised fine-tuning: alternatives to the negative log-likelihood, and terms to add to it.

p is the policy's probability of the target token, logp its logarithm in nats, z the logits, s = softmax(z), e the
target's one-hot vector. A loss of logp alone has the logit gradient ``w * (s - e)`` with w = -dL/dlogp.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_choice, check_in_range, check_same_shape

Tokens = Float[Tensor, " tokens"]


def _with_nll(values: Tensor, logp: Tensor) -> Loss:
    """The negative log-likelihood beside another loss makes runs of different objectives comparable."""
    return Loss(values, {"nll": -logp.detach()})


@declare(unit="tokens", formula="-logp", paper="maximum likelihood; no single paper", token_local=True)
def nll(logp: Tokens) -> Loss:
    """Negative log-likelihood (cross-entropy with the target token): the usual supervised fine-tuning.

    Gradient: dL/dlogp = -1.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(-logp)


@declare(unit="tokens", formula="1 - p", paper="arXiv:2510.00526 (the objective -p)", token_local=True)
def probability(logp: Tokens) -> Loss:
    """One minus the target's probability: tokens the policy finds unlikely hardly pull.

    It is `probability_power` at alpha = 1. The paper writes -p; the constant 1 makes the value the probability of
    any other token and changes no gradient. Gradient: dL/dlogp = -p.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
    Returns:
        values (tokens,) in [0, 1], unreduced; metrics (tokens,): nll in nats.
    """
    return _with_nll(maths.one_minus_p(logp), logp)


@declare(
    unit="tokens",
    formula="(1 - p^alpha) / alpha; -logp at alpha = 0",
    paper="arXiv:2510.00526 (the family f_alpha); arXiv:1805.07836 (generalised cross-entropy, alpha in (0, 1])",
    token_local=True,
)
def probability_power(logp: Tokens, *, alpha: float = 1.0) -> Loss:
    """The family between and beyond the negative log-likelihood (alpha = 0) and the probability (alpha = 1).

    Gradient: dL/dlogp = -p^alpha. It is held at -e^30 where alpha < 0 and p^alpha is larger (the value goes on as a
    straight line there), so that tokens of vanishing probability do not overflow.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        alpha: dimensionless, any finite number. Above 0 it favours tokens that are already likely, 10 very strongly;
            below 0 it favours unlikely ones more than the likelihood does.
    Returns:
        values (tokens,), unreduced, in [0, 1/alpha] for alpha > 0; metrics (tokens,): nll in nats.
    Raises:
        ValueError: alpha is not a finite number.
    """
    check_in_range(-math.inf, math.inf, alpha=alpha)
    return _with_nll(maths.one_minus_power(logp, alpha), logp)


def probability_quantile(logp: Tokens, *, quantile: float) -> dict[str, Float[Tensor, ""]]:
    """The quantile of p over the target tokens of a whole step and all ranks: `probability_threshold`'s ``prepare``.

    Args:
        logp: (tokens,) nats, of every target token of the step.
        quantile: share of tokens, in [0, 1].
    Returns:
        ``probability_quantile``, a 0-d tensor in [0, 1], linear between neighbouring values; 0 where there is no token.
    Raises:
        ValueError: quantile lies outside [0, 1].
    """
    check_in_range(0.0, 1.0, quantile=quantile)
    return {"probability_quantile": maths.quantile(logp.detach().exp(), quantile)}


@declare(
    unit="tokens",
    formula="[p >= q] f or [p <= q] f, f = -logp or 1 - p, averaged over the tokens kept",
    paper="arXiv:2510.00526 (hard thresholding)",
    model_weight=True,
    prepare=probability_quantile,
    prepare_if=lambda hyperparameters: hyperparameters["quantile"] is not None,
)
def probability_threshold(
    logp: Tokens,
    probability_quantile: Float[Tensor, ""] | None = None,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    keep: str = "above",
    inner: str = "nll",
) -> Loss:
    """Train only tokens whose probability lies above (or below) q; the mean runs over the tokens that are left.

    q is an absolute threshold or a quantile over the whole step. The choice of tokens carries no gradient: dropped
    tokens have value and gradient 0, kept ones dL/dlogp = -1 (nll) or -p (probability). Bounds are inclusive.
    The authors' code knows the absolute threshold alone; their quantile is taken per batch, here over the optimizer
    step and all ranks, so that it does not depend on how the step is split.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        probability_quantile: 0-d, in [0, 1]; prepared by the trainer where ``quantile`` is set.
        threshold: q itself, a probability in [0, 1]; the paper's main setting is 0.2 with keep above and inner nll.
        quantile: the share of tokens whose probability lies below q, in [0, 1].
        keep: ``above`` trains tokens with p >= q, ``below`` those with p <= q.
        inner: the loss of a kept token: ``nll`` (nats) or ``probability`` (1 - p).
    Returns:
        values (tokens,), 0 where dropped; weight (tokens,), 1 for kept and 0 for dropped tokens; metrics: kept
        (tokens,), the share of tokens trained; nll (tokens,) in nats; probability_quantile (0-d) where one is used.
    Raises:
        ValueError: not exactly one of threshold and quantile is set, one lies outside [0, 1], a quantile was set and
            probability_quantile is missing, or keep or inner is unknown.
    """
    check_choice(("above", "below"), keep=keep)
    check_choice(("nll", "probability"), inner=inner)
    bound = _bound(threshold, quantile, probability_quantile)
    p = logp.detach().exp()
    kept = p >= bound if keep == "above" else p <= bound
    losses = -logp if inner == "nll" else maths.one_minus_p(logp)
    weight = kept.to(logp.dtype)
    metrics = {"kept": weight, "nll": -logp.detach()}
    if isinstance(bound, Tensor):
        metrics["probability_quantile"] = bound
    return Loss(torch.where(kept, losses, 0), metrics, weight)


def _bound(threshold: float | None, quantile: float | None, probability_quantile: Tensor | None) -> float | Tensor:
    if threshold is not None and quantile is None:
        check_in_range(0.0, 1.0, threshold=threshold)
        return threshold
    if quantile is None or threshold is not None:
        raise ValueError(f"threshold is {threshold!r} and quantile is {quantile!r}; set exactly one of the two.")
    check_in_range(0.0, 1.0, quantile=quantile)
    if probability_quantile is None:
        raise ValueError(
            f"quantile is {quantile!r} but probability_quantile is missing; "
            "pass what the declaration's prepare(logp, quantile=...) returns."
        )
    return probability_quantile.detach()


@declare(unit="tokens", formula="-sg(p) logp", paper="arXiv:2508.05629", token_local=True)
def dft(logp: Tokens) -> Loss:
    """Dynamic fine-tuning: the negative log-likelihood scaled by the target's own probability, held constant (sg).

    Gradient: dL/dlogp = -p, that of `probability`; only the value differs.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
    Returns:
        values (tokens,) in nats, unreduced; metrics (tokens,): nll in nats.
    """
    return _with_nll(-logp.detach().exp() * logp, logp)


@declare(unit="tokens", formula="-(1 - p)^gamma logp", paper="arXiv:1708.02002 Eq. 4", token_local=True)
def focal(logp: Tokens, *, gamma: float = 2.0) -> Loss:
    """Focal loss: tokens the policy already predicts weigh less.

    Without the class weights of the paper's Eq. 5. Gradient: -dL/dlogp = (1-p)^gamma - gamma p (1-p)^(gamma-1) logp.
    As p -> 1 it behaves like (1 + gamma)(1-p)^gamma: it exists and is 0 there for every gamma > 0, also below 1 where
    the factor (1-p)^(gamma-1) alone does not, and it is 1 for gamma = 0. At p = 1 the code takes the smallest normal
    number for 1 - p, which leaves tiny^gamma (5e-20 at gamma = 0.5 in float32).

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        gamma: dimensionless, >= 0; 0 is `nll`.
    Returns:
        values (tokens,) in nats, unreduced; metrics (tokens,): nll in nats.
    Raises:
        ValueError: gamma is negative or not finite.
    """
    check_in_range(0.0, math.inf, gamma=gamma)
    return _with_nll(-torch.exp(gamma * maths.log1mexp(logp)) * logp, logp)


@declare(unit="tokens", formula="-logp + epsilon (1 - p)", paper="arXiv:2204.12511 (Poly-1)", token_local=True)
def poly1(logp: Tokens, *, epsilon: float = 1.0) -> Loss:
    """Poly-1: the cross-entropy's expansion in powers of 1 - p with its first coefficient raised by epsilon.

    Gradient: dL/dlogp = -(1 + epsilon p).

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        epsilon: dimensionless, >= -1 (at -1 the first-order term is gone); 0 is `nll`.
    Returns:
        values (tokens,) in nats, unreduced; metrics (tokens,): nll in nats.
    Raises:
        ValueError: epsilon is below -1 or not finite.
    """
    check_in_range(-1.0, math.inf, epsilon=epsilon)
    return _with_nll(-logp + epsilon * maths.one_minus_p(logp), logp)


@declare(
    unit="tokens",
    formula="(1 - epsilon)(-logp) + epsilon (logsumexp - mean_logit)",
    paper="arXiv:1512.00567 Sec. 7",
    token_local=True,
)
def label_smoothing(logp: Tokens, logsumexp: Tokens, mean_logit: Tokens, *, epsilon: float = 0.1) -> Loss:
    """Cross-entropy against the target mixed with the uniform distribution over all V tokens, the target included.

    fairseq spreads epsilon over the V - 1 other tokens instead; that is this loss at epsilon * V / (V - 1).
    Gradient with respect to the logits: s - (1 - epsilon) e - epsilon / V.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        logsumexp: (tokens,) log sum exp of the logits.
        mean_logit: (tokens,) mean of the logits over the vocabulary; logsumexp - mean_logit is the cross-entropy with
            the uniform distribution.
        epsilon: share of the uniform distribution, in [0, 1]; 0 is `nll`.
    Returns:
        values (tokens,) in nats, unreduced; metrics (tokens,): nll in nats.
    Raises:
        ValueError: shapes differ, or epsilon lies outside [0, 1].
    """
    check_same_shape(logp=logp, logsumexp=logsumexp, mean_logit=mean_logit)
    check_in_range(0.0, 1.0, epsilon=epsilon)
    return _with_nll(-(1 - epsilon) * logp + epsilon * (logsumexp - mean_logit), logp)


@declare(unit="tokens", formula="logsumexp^2", paper="arXiv:2204.02311 Sec. 5", token_local=True)
def z_loss(logsumexp: Tokens) -> Loss:
    """PaLM's auxiliary loss, which keeps the softmax's normaliser near 1. A term to add: its weight is the coefficient.

    The paper's coefficient is 1e-4. Gradient with respect to the logits: 2 logsumexp s.

    Args:
        logsumexp: (tokens,) log sum exp of the logits.
    Returns:
        values (tokens,), squared logit units, unreduced; metrics (tokens,): logsumexp.
    """
    return Loss(logsumexp.square(), {"logsumexp": logsumexp.detach()})


@declare(
    unit="tokens",
    formula="-sum_k s_k log s_k",
    paper="arXiv:2505.20282 (positive weight, entropy minimisation); arXiv:1701.06548 (negative, confidence penalty)",
    token_local=True,
)
def entropy(entropy: Tokens) -> Loss:
    """Entropy of the policy's next-token distribution. A term to add, with either sign of its weight.

    A positive weight sharpens the policy, a negative one keeps it spread out. One-shot entropy minimisation takes it
    on the policy's own samples at temperature 0.5 (``statistics: {temperature: 0.5}``); here the tokens are the data's.
    Gradient with respect to the logits: -s_k (log s_k + entropy).

    Args:
        entropy: (tokens,) nats, at each position that predicts a target token.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(entropy)
