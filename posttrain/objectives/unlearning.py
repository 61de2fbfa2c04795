"""Unlearning by the likelihood of the tokens to forget: gradient ascent and the weights that tame it.

p is the policy's probability of the target token, logp its logarithm in nats, r the probability under the reference
(the model before unlearning), sg stops the gradient. A loss of logp alone has the logit gradient ``w * (e - s)`` with
w = dL/dlogp, s the policy's distribution and e the target's one-hot vector. Minimising lowers p.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives import maths
from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_in_range, check_positive, check_same_shape

FAMILY = "unlearning"

Tokens = Float[Tensor, " tokens"]


def _watched(logp: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """What shows how far forgetting has come, whatever the loss."""
    logp = logp.detach()
    weights = {} if weight is None else {"gradient_weight": weight.detach()}
    return {"nll": -logp, "probability": logp.exp(), **weights}


@declare(unit="tokens", formula="logp", paper="arXiv:2401.06121 (gradient ascent)", token_local=True)
def gradient_ascent(logp: Tokens) -> Loss:
    """Gradient ascent on the negative log-likelihood: unbounded, and it never lets go of what is forgotten already.

    Gradient: dL/dlogp = 1.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
    Returns:
        values (tokens,) in nats, unreduced, <= 0; metrics (tokens,): nll in nats, probability.
    """
    return Loss(logp, _watched(logp))


@declare(unit="tokens", formula="sg(p^beta) logp", paper="arXiv:2502.19301 (WGA)", token_local=True)
def weighted_gradient_ascent(logp: Tokens, *, beta: float = 1.0) -> Loss:
    """Gradient ascent that lets go of what is forgotten: tokens weigh by a power of their own probability.

    Gradient: dL/dlogp = p^beta, that of p^beta / beta; only the value differs. Without the reference model that
    open-unlearning loads for it and never reads.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        beta: dimensionless, >= 0; 0 is `gradient_ascent`, 1 minimises the probability itself. The authors' code falls
            back to 5.
    Returns:
        values (tokens,) in nats, unreduced, <= 0; metrics (tokens,): nll in nats, probability, gradient_weight.
    Raises:
        ValueError: beta is negative or not finite.
    """
    check_in_range(0.0, math.inf, beta=beta)
    weight = maths.power(logp.detach(), beta)
    return Loss(weight * logp, _watched(logp, weight))


@declare(
    unit="tokens",
    formula="sg(p^beta1 (1 - p)^beta2) logp",
    paper="arXiv:2505.11953 (SatImp: saturation times importance)",
    token_local=True,
)
def satimp(logp: Tokens, *, beta1: float = 5.0, beta2: float = 1.0) -> Loss:
    """Gradient ascent weighted by saturation (it fades as p falls) times importance (it fades as p nears 1).

    Gradient: dL/dlogp = p^beta1 (1 - p)^beta2, that of the incomplete Beta function B(p; beta1, beta2 + 1); only the
    value differs. It is all but zero for tokens of which the model is certain, so a model that has memorised moves
    slowly at first unless beta2 is small. Published settings disagree: see the presets satimp_yaml, satimp_readme and
    satimp_author.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        beta1: of the saturation p^beta1, >= 0; 0 leaves it out.
        beta2: of the importance (1 - p)^beta2, >= 0; 0 leaves `weighted_gradient_ascent`. 1 in open-unlearning, 0.1
            recommended by the authors.
    Returns:
        values (tokens,) in nats, unreduced, <= 0; metrics (tokens,): nll in nats, probability, gradient_weight.
    Raises:
        ValueError: beta1 or beta2 is negative or not finite.
    """
    check_in_range(0.0, math.inf, beta1=beta1, beta2=beta2)
    held = logp.detach()
    weight = maths.power(held, beta1) * torch.exp(beta2 * maths.log1mexp(held))
    return Loss(weight * logp, _watched(logp, weight))


@declare(
    unit="tokens",
    formula="sg(p^alpha) (2 / beta) log(1 + (p / r)^beta)",
    paper="arXiv:2502.19301 (TNPO, WTNPO at alpha > 0)",
    token_local=True,
)
def token_npo(logp: Tokens, reference_logp: Tokens, *, beta: float = 4.0, alpha: float = 0.0) -> Loss:
    """Negative preference optimization of every token by itself: a token lets go once it lies far below the reference.

    (2 / beta) ln 2 where the policy is the reference and alpha is 0. Gradient: dL/dlogp =
    2 p^alpha p^beta / (p^beta + r^beta). The authors' code adds 1e-5 to that denominator, by which at beta = 4 tokens
    with p and r below 0.05 are not unlearned at all; it is not taken over.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
        reference_logp: (tokens,) nats, the same of the model before unlearning.
        beta: dimensionless, > 0; how fast a token lets go.
        alpha: >= 0; above 0 tokens also weigh by p^alpha (WTNPO, 1.5 in the authors' code).
    Returns:
        values (tokens,) in nats, unreduced, >= 0; metrics (tokens,): nll in nats, probability, gradient_weight.
    Raises:
        ValueError: shapes differ, beta is not above 0, or alpha is negative or not finite.
    """
    check_same_shape(logp=logp, reference_logp=reference_logp)
    check_positive(beta=beta)
    check_in_range(0.0, math.inf, alpha=alpha)
    importance = maths.power(logp.detach(), alpha)
    x = beta * (logp - reference_logp)
    weight = 2 * importance * torch.sigmoid(x.detach())
    return Loss(-importance * F.logsigmoid(-x) * (2 / beta), _watched(logp, weight))


@declare(
    unit="tokens",
    formula="-log(1 - p)",
    paper="arXiv:1908.04319 (unlikelihood); arXiv:2503.01224 (CE-U, whose gradient is this)",
    token_local=True,
)
def unlikelihood(logp: Tokens) -> Loss:
    """Unlikelihood: the strongest pull is on what the model is certain of, and none on what is forgotten.

    Gradient: dL/dlogp = p / (1 - p), so that the logits' gradient stays bounded: p for the target's, -p q_k for the
    others, q the policy without the target. That is the gradient of CE-U, cross-entropy with sg(q); its code leaves out
    each answer's first token, which counts here. 1 - p counts as no less than the rounding of 1 (1.2e-7 in float32,
    where the value is 16): a logp of 0 tells no more. The pull on the other logits fades below it, and does not stop.

    Args:
        logp: (tokens,) nats, log-probability of each target token.
    Returns:
        values (tokens,) in nats, unreduced, >= 0; metrics (tokens,): nll in nats, probability.
    """
    # subtracted, not clamped: the gradient at a logp of 0 is that of the least 1 - p, for what is known best moves too
    held = logp - torch.relu(logp.detach() + torch.finfo(logp.dtype).eps)
    return Loss(-maths.log1mexp(held), _watched(logp))


@declare(
    unit="tokens", formula="-logp of the refusal", paper="arXiv:2401.06121 (IDK)", token_local=True, role="refusal"
)
def refusal_nll(logp: Tokens) -> Loss:
    """Negative log-likelihood of a refusal ("I don't know") in place of the answer to forget.

    Gradient: dL/dlogp = -1, of the refusal's tokens; the answer itself is not touched. TOFU's code takes one mean over
    refusal and retained tokens together, so that long answers drown short refusals; here each term has its own count.

    Args:
        logp: (tokens,) nats, log-probability of each token of the refusal.
    Returns:
        values (tokens,) in nats, unreduced.
    """
    return Loss(-logp)
