"""The names of the vocabulary statistics and the container that carries them."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VocabStatistics:
    """Statistics of each token's distribution p = softmax(z) over the vocabulary; None where not asked for.

    float32 (float64 for float64 input), in nats or logit units. All carry a gradient except those of `DETACHED`.
    z are the final logits (scale, softcap and temperature applied), y the target, t the teacher's distribution.

    Args:
        logp: log p_y.
        logsumexp: log sum_k exp z_k.
        entropy: -sum_k p_k log p_k.
        mean_logit: mean of z over the vocabulary.
        mean_square_logit: mean of z squared over the vocabulary.
        log_sum_sq_probs: log sum_k p_k^2.
        max_logit: the largest logit; its gradient goes to the first of equals.
        max_nontarget_logit: the largest logit other than the target's; -inf in a vocabulary of one.
        ids_logp: log p at the given ids.
        topk_logp, topk_ids: log p and ids of the k most likely tokens, falling.
        surprisal_variance: Var_p(log p).
        is_top1: 1 where the target is the (first) argmax, else 0.
        forward_kl, reverse_kl: KL(t || p) and KL(p || t).
        jsd: beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p; KL(t || p) at beta 0, KL(p || t) at 1.
        teacher_logp, teacher_entropy: log t_y and the entropy of t.
    """

    logp: Float[Tensor, " tokens"] | None = None
    logsumexp: Float[Tensor, " tokens"] | None = None
    entropy: Float[Tensor, " tokens"] | None = None
    mean_logit: Float[Tensor, " tokens"] | None = None
    mean_square_logit: Float[Tensor, " tokens"] | None = None
    log_sum_sq_probs: Float[Tensor, " tokens"] | None = None
    max_logit: Float[Tensor, " tokens"] | None = None
    max_nontarget_logit: Float[Tensor, " tokens"] | None = None
    ids_logp: Float[Tensor, "tokens n"] | None = None
    topk_logp: Float[Tensor, "tokens k"] | None = None
    topk_ids: Int[Tensor, "tokens k"] | None = None
    surprisal_variance: Float[Tensor, " tokens"] | None = None
    is_top1: Float[Tensor, " tokens"] | None = None
    forward_kl: Float[Tensor, " tokens"] | None = None
    reverse_kl: Float[Tensor, " tokens"] | None = None
    jsd: Float[Tensor, " tokens"] | None = None
    teacher_logp: Float[Tensor, " tokens"] | None = None
    teacher_entropy: Float[Tensor, " tokens"] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The statistic called `name`; KeyError if there is no such statistic or it was not asked for."""
        if name not in STATISTICS:
            raise KeyError(f"unknown statistic {name!r}; {nearest(name, STATISTICS)}")
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise KeyError(f"statistic {name!r} was not computed; add it to `wanted`")
        return value

    def as_dict(self) -> dict[str, Tensor]:
        """The statistics that were computed, by name, in the order of `STATISTICS`."""
        return {name: value for name in STATISTICS if (value := getattr(self, name)) is not None}

    def detach(self) -> "VocabStatistics":
        """The same numbers without gradient."""
        return VocabStatistics(**{name: value.detach() for name, value in self.as_dict().items()})


STATISTICS: tuple[str, ...] = tuple(field.name for field in fields(VocabStatistics))
DETACHED: frozenset[str] = frozenset({"topk_ids", "is_top1", "teacher_logp", "teacher_entropy"})
TEACHER_STATISTICS: frozenset[str] = frozenset({"forward_kl", "reverse_kl", "jsd", "teacher_logp", "teacher_entropy"})


def nearest(name: str, known: Iterable[str]) -> str:
    """The half-sentence of an error that helps with a misspelt name."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
