"""What is asked of a model's forward, and what comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

from posttrain.kernels.head import LMHead

HeadFunction = Callable[[Tensor, LMHead], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class StatisticsGroup:
    """Statistics that share their kernel options; each group is one pass over the vocabulary.

    Args:
        wanted: names of the kernels' table, and ``hidden`` for hidden states at the targets' positions.
        temperature: divides the logits, > 0.
        ids: (targets, n) vocabulary ids for ``ids_logp``.
        k: how many for ``topk_logp`` and ``topk_ids``.
        jsd_beta: the mixture weight of ``jsd``.
        layer: block whose output ``hidden`` is, counted from 0 as in the names of the model's modules, or from the end;
            None for what the head reads, behind the last norm.
    """

    wanted: tuple[str, ...]
    temperature: float = 1.0
    ids: Int[Tensor, "targets n"] | None = None
    k: int | None = None
    jsd_beta: float = 0.5
    layer: int | None = None


@dataclass(frozen=True, eq=False)
class VocabRequest:
    """Asks an attached model for vocabulary statistics instead of logits: ``model(**inputs, vocab_request=request)``.

    Args:
        target_index: (targets,) positions in the flattened (batch * length) hidden states, computed by the collator on
            the CPU. Position i predicts the token after it.
        targets: (targets,) the token each of these positions has to predict, within the vocabulary.
        groups: the statistics, by kernel options.
        teacher: (hidden, head) of the teacher at the same positions, for the statistics that compare with one.
        backend: of the kernels.
        gradient_tolerance: of the kernels.
        budget: of the kernels.
        compute: called inside the forward with the selected hidden states and the head, in place of the groups; returns
            named tensors. This is where `vocab_loss`, `map_logits` or research code runs.
        return_hidden: also return the hidden states at the selected positions.
        return_head: also return the head, detached; with ``return_hidden`` this is what another request's ``teacher``
            takes. Sharded engines free their weights after the forward, so under them it is a copy.
    """

    target_index: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    groups: tuple[StatisticsGroup, ...] = ()
    teacher: tuple[Float[Tensor, "targets teacher_width"], LMHead] | None = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0
    budget: int | str | None = None
    compute: HeadFunction | None = None
    return_hidden: bool = False
    return_head: bool = False

    def __post_init__(self) -> None:
        if self.target_index.shape != self.targets.shape:
            raise ValueError(
                f"target_index has shape {tuple(self.target_index.shape)} but targets {tuple(self.targets.shape)}; "
                "give one target for every selected position."
            )
        if self.compute is not None and self.groups:
            raise ValueError("compute replaces groups; give one of them.")
        if not (self.groups or self.compute or self.return_hidden or self.return_head):
            raise ValueError("The request asks for nothing; give groups, compute, return_hidden or return_head.")

    @property
    def layers(self) -> set[int]:
        """The blocks whose outputs the groups ask for."""
        return {group.layer for group in self.groups if "hidden" in group.wanted and group.layer is not None}

    def kernel_options(self, group: StatisticsGroup, device: torch.device) -> dict[str, Any]:
        """The keyword options of `vocab_statistics` and `vocab_loss` for a group, on the head's device."""
        return {
            "temperature": group.temperature,
            "ids": None if group.ids is None else on_device(group.ids, device),
            "k": group.k,
            "teacher": self.teacher,
            "jsd_beta": group.jsd_beta,
            "gradient_tolerance": self.gradient_tolerance,
            "budget": self.budget,
            "backend": self.backend,
        }


@dataclass
class VocabOutput(ModelOutput):
    """What a forward with a `VocabRequest` returns.

    Plain dictionaries and tuples, since the engines look for tensors in these only to place their backward hooks.

    Args:
        statistics: one dictionary for each group, statistic name -> tensor, or the one dictionary of ``compute``.
        hidden: (targets, width), differentiable, if asked for.
        head: detached, if asked for.
        aux_loss: the load-balancing loss of a mixture of experts, where the config sets ``output_router_logits``;
            not yet multiplied by ``router_aux_loss_coef``.
    """

    statistics: tuple[dict[str, Tensor], ...] | None = None
    hidden: Tensor | None = None
    head: LMHead | None = None
    aux_loss: Tensor | None = None


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; wrappers move the tensors of dictionaries, not those of a dataclass."""
    return tensor.to(device, non_blocking=True)
