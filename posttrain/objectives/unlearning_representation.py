"""Unlearning by hidden states: those of the answers to forget are steered into a random direction."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare
from posttrain.objectives.checks import check_integer, check_positive, check_same_shape

FAMILY = "unlearning"

Hidden = Float[Tensor, "tokens width"]


def _accurate(hidden: Tensor) -> Tensor:
    """float32 of half precision: a mean over the width of squares of some hundreds would lose its digits."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def random_direction(width: int, seed: int) -> Float[Tensor, " width"]:
    """RMU's unit vector u: uniform in the positive orthant before scaling, the same on every device and process."""
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u / u.norm()


@declare(
    unit="tokens",
    formula="mean over the width of (hidden - scale u)^2, u a random unit vector",
    paper="arXiv:2403.03218 (RMU)",
    token_local=True,
)
def representation_misdirection(hidden: Hidden, *, scale: float = 2.0, seed: int = 0) -> Loss:
    """RMU: the hidden states at one layer (``statistics: {layer: 7}``) move to one random point, the same for all.

    Layers above are left with nothing to read; only the layer and those below get a gradient. Each token counts once:
    in open-unlearning two broadcast shapes let each sequence's length divide the others' losses. Gradient:
    dL/dhidden = 2 (hidden - scale u) / width.

    Args:
        hidden: (tokens, width), at the positions that predict each token of the answer to forget.
        scale: length of the point's vector, > 0; 2 in open-unlearning's settings, and states of another size want
            another.
        seed: of the direction.
    Returns:
        values (tokens,), squared activation units, unreduced, >= 0; metrics (tokens,): hidden_norm.
    Raises:
        ValueError: scale is not above 0, or seed is no whole number of at least 0.
    """
    check_positive(scale=scale)
    check_integer(0, seed=seed)
    hidden = _accurate(hidden)
    target = scale * random_direction(hidden.shape[1], seed).to(hidden)
    return Loss((hidden - target).square().mean(1), {"hidden_norm": hidden.detach().norm(dim=1)})


@declare(
    unit="tokens",
    formula="mean over the width of (hidden - reference_hidden)^2",
    paper="arXiv:2403.03218 (RMU, retain term)",
    token_local=True,
)
def representation_retention(hidden: Hidden, reference_hidden: Hidden) -> Loss:
    """RMU's retain term: hidden states at one layer stay where the model before unlearning has them.

    ``statistics: {layer: 7}`` names the layer, the same as in the forget term. Gradient:
    dL/dhidden = 2 (hidden - reference_hidden) / width.

    Args:
        hidden: (tokens, width), at the positions that predict each token of the answer to retain.
        reference_hidden: (tokens, width), the same of the model before unlearning.
    Returns:
        values (tokens,), squared activation units, unreduced, >= 0.
    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(hidden=hidden, reference_hidden=reference_hidden)
    return Loss((_accurate(hidden) - _accurate(reference_hidden)).square().mean(1))
