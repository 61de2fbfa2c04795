"""Functions that keep their digits near zero, which Triton's own have not and its interpreter lacks."""

import triton
import triton.language as tl

from posttrain.kernels.triton.folding import PROPAGATE


@triton.jit
def expm1_falling(x):
    """e^x - 1 for x <= 0."""
    near = tl.maximum(x, -0.5, propagate_nan=PROPAGATE)
    # Taylor's series, nested; its first neglected term is near^8 / 9! of the sum.
    series = 1.0 + near * (1.0 / 7.0) * (1.0 + near * (1.0 / 8.0))
    series = 1.0 + near * 0.25 * (1.0 + near * 0.2 * (1.0 + near * (1.0 / 6.0) * series))
    series = near * (1.0 + near * 0.5 * (1.0 + near * (1.0 / 3.0) * series))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def log1p_falling(y):
    """log(1 + y) for -1 <= y <= 0."""
    near = tl.maximum(y, -0.5, propagate_nan=PROPAGATE)
    # 2 artanh(s) with s = y / (2 + y), |s| <= 1/3.
    s = near / (2.0 + near)
    q = s * s
    series = 1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0))))
    series = 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (0.2 + q * series)))
    return tl.where(y > -0.5, series, tl.log(1.0 + y))


@triton.jit
def log_mixture(apart, beta):
    """As `accumulation.log_mixture`."""
    weight = tl.where(apart > 0.0, 1.0 - beta, beta)
    return log1p_falling(weight * expm1_falling(-tl.abs(apart)))


@triton.jit
def tanh(x):
    fallen = expm1_falling(-2.0 * tl.abs(x))
    size = -fallen / (2.0 + fallen)
    return tl.where(x < 0.0, -size, size)
