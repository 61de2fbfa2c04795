"""Rows that a gradient tolerance could leave out, by the bound on what each adds to the head's gradient."""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor


def head_bounds(
    logp: Float[Tensor, " tokens"], hidden: Float[Tensor, "tokens width"], *, scale: float = 1.0
) -> Float[Tensor, " tokens"]:
    """sqrt(2) (1 - p) |scale| ||h||: what a token adds at most to the norm of the head's gradient under ``nll``."""
    norms = torch.linalg.vector_norm(hidden, dim=1, dtype=logp.dtype)
    return sqrt(2) * -torch.expm1(logp.clamp_max(0.0)) * abs(scale) * norms
