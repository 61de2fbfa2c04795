"""The language-model head as the kernels see it: numbers only, no modules."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Which slice of the vocabulary a process holds, where a head is spread over several.

    Args:
        start: the first of its vocabulary entries; slices follow each other in the order of the group's ranks.
        vocab: entries of the whole vocabulary.
        group: the processes that share the head; None for all.
    """

    start: int
    vocab: int
    group: ProcessGroup | None = None


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
        shard: says that weight, bias and B are this process's slice of a head that is spread over several processes.
            Tokens and targets (ids of the whole vocabulary) are the same on each of them, and so are the results.
    """

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[Float[Tensor, "tokens rank"], Float[Tensor, "vocab rank"]] | None = None
    shard: VocabShard | None = None

    @property
    def vocab(self) -> int:
        """Entries of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab
