"""Objectives that limit confidence so that repeated sampling keeps paying off."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_choice, check_integer, check_same_shape
from posttrain.objectives.maths import log1mexp

Sequences = Float[Tensor, " sequences"]

# Below this logarithm of n * x the first two terms of the series are exact to the last bit of float64.
SERIES_BELOW = -16.0


@declare(
    unit="sequences",
    formula="-log(1 - (1 - x)^n), x = exp(sequence_logp)",
    paper="arXiv:2502.07154 (direct coverage optimization)",
)
def direct_coverage(
    sequence_logp: Sequences, mean_logp: Sequences | None = None, *, n: int, gradient: str = "sum"
) -> Loss:
    """Minus the log-probability that at least one of n samples is the completion: the likelihood, fitted to pass@n.

    Gradient: dL/dsequence_logp = -f with f = n (1-x)^(n-1) x / (1 - (1-x)^n), which falls from 1 for unlikely
    completions to 0 for sure ones: what n samples will find anyway is not pushed further.

    With gradient ``mean`` the value stays the exact loss and its gradient is f times that of the completion's mean
    negative log-likelihood, as in the authors' training code: long completions then weigh no more than short ones.

    Args:
        sequence_logp: (sequences,) nats, log-probability of each completion, summed over its tokens.
        mean_logp: (sequences,) nats, the same averaged over its tokens; needed for gradient ``mean`` only.
        n: samples of pass@n, >= 1; 1 is the negative log-likelihood of the whole completion. Where nearly all
            completions are far less likely than 1/n, f is 1 and n makes no difference.
        gradient: ``sum``, the exact gradient, or ``mean``, the per-token mean scaled by f.
    Returns:
        values (sequences,) in nats, unreduced; metrics (sequences,): coverage = 1 - (1-x)^n, the probability that n
        samples contain the completion, and factor = f.
    Raises:
        ValueError: n is no whole number of at least 1, gradient is unknown, mean_logp is missing for gradient
            ``mean``, or shapes differ.
    """
    check_integer(1, n=n)
    check_choice(("sum", "mean"), gradient=gradient)
    check_same_shape(sequence_logp=sequence_logp, mean_logp=mean_logp)
    loss, factor = _coverage(sequence_logp, n)
    metrics = {"coverage": torch.exp(-loss.detach()), "factor": factor}
    if gradient == "sum":
        return Loss(loss, metrics)
    if mean_logp is None:
        raise ValueError("gradient is 'mean' but mean_logp is missing; pass it, or set gradient to 'sum'.")
    surrogate = -factor * mean_logp
    return Loss(loss.detach() + (surrogate - surrogate.detach()), metrics)


def _coverage(logp: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The loss, and its factor f detached.

    Where x = exp(logp) would underflow, the series -log(nx) + (n-1)x/2 and f = 1 - (n-1)x/2 take over. where() needs
    both branches finite in value and gradient, so each gets a harmless number where it is not chosen.
    """
    if n == 1:
        return -logp, torch.ones_like(logp)
    edge = SERIES_BELOW - math.log(n)
    rare = logp < edge
    first_order = (n - 1) / 2 * torch.where(rare, logp, edge).exp()
    common = torch.where(rare, -1.0, logp)
    log_miss = log1mexp(common)
    loss = -log1mexp(n * log_miss)
    factor = torch.exp(math.log(n) + (n - 1) * log_miss + common + loss).detach()
    # at x = 1 the product is 0 * inf; its limit for n > 1 is 0
    factor = torch.where(common < 0, factor, 0)
    series = -logp - math.log(n) + first_order
    return torch.where(rare, series, loss), torch.where(rare, 1 - first_order.detach(), factor)
