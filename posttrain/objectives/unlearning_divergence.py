"""FLAT: unlearning from the forget data alone, as an f-divergence between a template answer and the answer to forget.

D_f(P || Q) = sup_g E_P[g] - E_Q[f*(g)] with the conjugate f*(t) = sup_u (t u - f(u)). FLAT puts g(v) in the place of
the optimal g, v the mean probability of a completion's tokens and g the rising output activation of arXiv:1606.00709
that maps any number into the domain of f*.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_choice, check_same_shape

FAMILY = "unlearning"

Sequences = Float[Tensor, " sequences"]


def _jeffreys(t: Tensor) -> Tensor:
    """f*(t) of f(u) = (u - 1) log u, at the u with log u + 1 - 1/u = t.

    With w = 1/u that is w + log w = 1 - t, which Newton's method solves to the last bit for t in [0, 1]. u is held: by
    the envelope theorem the slope of t u - f(u) is that of the maximum.
    """
    goal = 1 - t.detach()
    w = torch.ones_like(goal)
    for _ in range(8):
        w = w * (1 + goal - w.log()) / (1 + w)
    u = 1 / w
    return t * u - (u - 1) * u.log()


# name -> (g, f* of g): closed forms, since the composition is exact where its parts would cancel
DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tv": (lambda v: torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "kl": (lambda v: v, lambda v: torch.exp(v - 1)),
    "reverse_kl": (lambda v: -torch.exp(-v), lambda v: v - 1),
    "jeffreys": (lambda v: v, _jeffreys),
    "squared_hellinger": (lambda v: -torch.expm1(-v), torch.expm1),
    "pearson": (lambda v: v, lambda v: v + v.square() / 4),
    "neyman": (lambda v: -torch.expm1(-v), lambda v: -2 * torch.expm1(-v / 2)),
    # log 2 - log(1 + e^-v), and -log(2 - e^g) of it
    "js": (lambda v: F.logsigmoid(v) + math.log(2), lambda v: -F.logsigmoid(-v) - math.log(2)),
}


@declare(
    unit="sequences",
    formula="-g(refusal_mean_probability) + f*(g(mean_probability))",
    paper="arXiv:2410.11143 (FLAT); g and f*: arXiv:1606.00709 Tables 1 and 2",
)
def flat(mean_probability: Sequences, refusal_mean_probability: Sequences, *, divergence: str = "tv") -> Loss:
    """FLAT: a template answer becomes likelier and the answer to forget less likely; no retain data, no reference.

    Not as in the authors' code: there reverse KL, squared Hellinger and Neyman use g(v) = -e^v or 1 - e^v, which fall
    in v, so that minimising unlearns the template and, but for Neyman, teaches the answer to forget; here g rises,
    -e^-v and 1 - e^-v. Neyman's f* is applied to v there, not to g(v). Its conjugate for Jeffreys is a Taylor
    polynomial, 1.4 % off at v = 1; here it is exact. v is a mean over one completion's own tokens; there prompt and
    padding count as probability 0, and g and f* are taken of the mean over the micro-batch.

    Gradient: dL/dmean_probability = d f*(g(v))/dv > 0, dL/drefusal_mean_probability = -g'(v) < 0; for ``tv`` they are
    (1 - tanh(v)^2) / 2 and its negative.

    Args:
        mean_probability: (sequences,) in [0, 1], mean over the tokens of the completion to forget.
        refusal_mean_probability: (sequences,) in [0, 1], likewise of the template answer (the refusal).
        divergence: ``tv``, ``kl``, ``reverse_kl``, ``jeffreys``, ``squared_hellinger``, ``pearson``, ``neyman`` or
            ``js``.
    Returns:
        values (sequences,), unreduced; metrics (sequences,): probability and refusal_probability.
    Raises:
        ValueError: shapes differ, or divergence is unknown.
    """
    check_same_shape(mean_probability=mean_probability, refusal_mean_probability=refusal_mean_probability)
    check_choice(DIVERGENCES, divergence=divergence)
    g, conjugate = DIVERGENCES[divergence]
    metrics = {
        "probability": mean_probability.detach(),
        "refusal_probability": refusal_mean_probability.detach(),
    }
    return Loss(conjugate(mean_probability) - g(refusal_mean_probability), metrics)
