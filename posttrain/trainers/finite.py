"""The stop at a loss that is no number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.side import Side
from posttrain.terms import KernelOptions, Term
from posttrain.trainers.coupling import Computed


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; training stops and every checkpoint already written stays."""


def check_finite(
    terms: Sequence[Term], shares: Sequence[Tensor | float], computed: Computed, side: Side, steps: int
) -> None:
    """One look at the device per forward, and only on failure more of them for the message.

    The log-probabilities are looked at too: a threshold compares false with NaN, and would hide it.

    Args:
        terms: of the objective.
        shares: each term's share of the loss, and last that of the mixture of experts' auxiliary loss.
        computed, side: of the micro-batch.
        steps: optimizer steps that are finished.

    Raises:
        NonFiniteLossError: names the step, the rows of the data and the offending objective.
    """
    logp = computed[KernelOptions()]["logp"].detach().sum()
    numbers = [torch.as_tensor(share, device=logp.device).detach().to(logp) for share in shares]
    if torch.isfinite(torch.stack([logp, *numbers])).all():
        return
    names = [f"objective {term.name!r}" for term in terms] + ["the mixture of experts' auxiliary loss"]
    found = [(name, number.item()) for name, number in zip(names, numbers, strict=True) if not number.isfinite()]
    name, number = found[0] if found else (f"objective {terms[0].name!r}", logp.item())
    what = "the loss" if found else "summed log-probabilities of"
    raise NonFiniteLossError(
        f"{name} gave {what} {number} after {steps} steps on rows "
        f"{sorted(set(side.row_number.tolist()))} of the training data; checkpoints already written are kept: look "
        "at those rows or lower trainer.learning_rate, and go on from the last checkpoint."
    )
