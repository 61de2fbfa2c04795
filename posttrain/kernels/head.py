"""The language-model head as the kernels see it: numbers only, no modules."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LMHead:
    """Everything that turns a hidden state into logits.

    ``z = softcap(scale * (hidden @ weight.T + bias + hidden2 @ B.T)) / temperature`` with
    ``softcap(a) = softcap * tanh(a / softcap)``; the temperature belongs to the call, not to the head.

    Args:
        weight: (vocab, width), the output embedding; any floating dtype.
        bias: (vocab,), added before the scale.
        scale: multiplies the biased logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: the cap of Gemma 2, in logit units; None for no cap.
        low_rank: ``(hidden2, B)`` with hidden2 (tokens, rank) and B (vocab, rank): an adapter on the head, already
            scaled, ``hidden2 = s * dropout(hidden) @ A.T``. It is added inside a tile and never merged into the weight.
    """

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[Float[Tensor, "tokens rank"], Float[Tensor, "vocab rank"]] | None = None
