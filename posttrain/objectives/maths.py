"""Functions of log-probabilities that stay accurate, and finite in value and gradient, at both ends."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# The squared gradient norm of a billion parameters still fits in float32 at e^30 a parameter.
LARGEST_EXPONENT = 30.0


def one_minus_p(logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``1 - p``; exact to rounding where p is near 1, where ``1 - exp(logp)`` is not. Gradient ``-p``."""
    return -_expm1(logp)


def power(logp: Float[Tensor, "*shape"], a: float) -> Float[Tensor, "*shape"]:
    """``p**a`` as ``exp(a * logp)``, up to e^30; beyond (a < 0 and tiny p) it goes on as a straight line of that slope.

    Gradient ``a * p**a``, held at ``a * e^30``, so that neither overflows.
    """
    held, excess = _held_exponent(logp, a)
    return torch.exp(held) + excess


def one_minus_power(logp: Float[Tensor, "*shape"], a: float) -> Float[Tensor, "*shape"]:
    """``(1 - p**a) / a`` for every finite a; ``-logp`` at a = 0, its limit. Gradient ``-p**a``, held as in `power`."""
    # at |a| = 1e-20 the limit is met to the last bit of float64 down to logp = -1e4, and below it a * logp underflows
    if abs(a) < 1e-20:
        return -logp
    held, excess = _held_exponent(logp, a)
    return -(_expm1(held) + excess) / a


def _held_exponent(logp: Tensor, a: float) -> tuple[Tensor, Tensor]:
    exponent = a * logp
    held = exponent.clamp(max=LARGEST_EXPONENT)
    # relu and not a difference with `held`: two slopes of e^30 that should cancel would leave their rounding
    return held, math.exp(LARGEST_EXPONENT) * torch.relu(exponent - LARGEST_EXPONENT)


def _expm1(x: Tensor) -> Tensor:
    # autograd takes torch.expm1's slope as result + 1, which holds nothing of a small exp(x)
    return torch.where(x < -math.log(2), torch.exp(x) - 1, torch.expm1(x))


def log1mexp(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log(1 - exp(u))`` for u <= 0, accurate to rounding everywhere.

    At u = 0 (and above, where rounding put it) the value is that of the smallest normal number below zero, -87 in
    float32 and -708 in float64, and the gradient is 0; elsewhere the gradient is ``-1 / expm1(-u)``.
    """
    u = u.clamp(max=-torch.finfo(u.dtype).tiny)
    near = u > -math.log(2)
    close = torch.log(-torch.expm1(u))
    # log1p(-1) would be -inf where `close` is chosen, and where() would pass 0 * inf = NaN on to the gradient
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, u)))
    return torch.where(near, close, far)


def quantile(values: Float[Tensor, " n"], q: float) -> Float[Tensor, ""]:
    """The q-quantile, linear between neighbours, of any number of values (torch.quantile stops at 2^24); 0 of none."""
    if values.shape[0] == 0:
        return values.new_zeros(())
    position = q * (values.shape[0] - 1)
    low = math.floor(position)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[math.ceil(position)], position - low)
