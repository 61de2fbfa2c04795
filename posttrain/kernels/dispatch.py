"""The public entry to the statistics: checks, then the backend."""

from collections.abc import Iterable

from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.checks import Query, check_query
from posttrain.kernels.dense import dense_statistics
from posttrain.kernels.head import LMHead
from posttrain.kernels.streamed import streamed_statistics
from posttrain.kernels.table import VocabStatistics


def vocab_statistics(
    hidden: Float[Tensor, "tokens width"],
    head: LMHead,
    targets: Int[Tensor, " tokens"],
    wanted: Iterable[str],
    *,
    temperature: float = 1.0,
    ids: Int[Tensor, "tokens n"] | None = None,
    k: int | None = None,
    teacher: tuple[Float[Tensor, "tokens teacher_width"], LMHead] | None = None,
    jsd_beta: float = 0.5,
    gradient_tolerance: float = 0.0,
    budget: int | str | None = None,
    backend: str = "auto",
) -> VocabStatistics:
    """Statistics of each token's next-token distribution softmax(z), z = softcap(scale * logits) / temperature.

    Differentiable, once, with respect to hidden, the head's weight and bias and both parts of its adapter; `dense` also
    twice. The teacher is a constant. Under autocast the operands of the products are rounded to its dtype; logits, sums
    and statistics are float32 in any case (float64 where an operand is).

    Args:
        hidden: (tokens, width), the positions that count; ignored ones have been dropped. May have no tokens.
        head: see `LMHead`.
        targets: (tokens,) int64 in [0, vocab).
        wanted: names of `STATISTICS`; only these are computed.
        temperature: divides the logits of student and teacher alike, > 0.
        ids: (tokens, n) vocabulary ids for ``ids_logp``; an id may repeat.
        k: how many for ``topk_logp`` and ``topk_ids``.
        teacher: hidden states and head of the teacher at the same tokens, over the same vocabulary.
        jsd_beta: the teacher's weight in the mixture of ``jsd``, in [0, 1].
        gradient_tolerance: leave out of the backward tokens that change the head's gradient (the hidden states', where
            the head is frozen) by at most this share of its norm; see `record_certificates`. Which tokens go depends on
            the batch, so gradients no longer are the same however a batch is split. 0 leaves out only tokens whose
            incoming gradient is exactly zero.
        budget: bytes for tiles that are kept from the forward to the backward instead of being computed again; None
            keeps none, ``auto`` all of them or what fits into a sixteenth of the device's memory.
        backend: ``dense`` (logits in full, plain autograd: the truth for tests), ``streamed`` (vocabulary tiles,
            recomputed in the backward), ``triton`` (the same with fused GPU kernels), or ``auto``: ``triton`` on CUDA
            where it is installed, else ``streamed``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a name is unknown, an option is missing or not available, or
            (on a CPU; on CUDA an assertion fails on the device) an id lies outside the vocabulary.
    """
    query = check_query(
        hidden,
        head,
        targets,
        wanted,
        temperature=temperature,
        ids=ids,
        k=k,
        teacher=teacher,
        jsd_beta=jsd_beta,
        gradient_tolerance=gradient_tolerance,
        budget=budget,
        backend=backend,
    )
    return answer(hidden, head, query)


def answer(hidden: Float[Tensor, "tokens width"], head: LMHead, query: Query) -> VocabStatistics:
    """The query answered by its backend."""
    return (dense_statistics if query.backend == "dense" else streamed_statistics)(hidden, head, query)
