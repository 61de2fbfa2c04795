"""The reference model of a trainer: which kind serves, and what it says of a micro-batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from posttrain.binding import REFERENCE
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.modeling import StatisticsGroup, VocabRequest
from posttrain.side import Side
from posttrain.suggest import unknown
from posttrain.term import KernelOptions, Term

KINDS = ("auto", "cached", "adapter_off", "model", "none")


@dataclass(frozen=True)
class Needs:
    """What the terms ask of a reference model.

    Args:
        groups: kernel statistics by kernel options.
        vocabulary: its whole next-token distribution, as the teacher of the kernel.
    """

    groups: Mapping[KernelOptions, tuple[str, ...]]
    vocabulary: bool

    @property
    def any(self) -> bool:
        return bool(self.groups) or self.vocabulary


def needs_vocabulary(terms: tuple[Term, ...]) -> bool:
    """Whether a term compares whole distributions, so that the reference is the kernel's teacher."""
    return any(statistic.kernel in TEACHER_STATISTICS for term in terms for statistic in term.all_statistics)


def check_kind(kind: str) -> str:
    """Raise a ValueError unless ``kind`` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(unknown("reference", kind, KINDS))
    return kind


class LiveReference:
    """A reference model that runs beside the policy, or the policy without its adapter.

    Args:
        model: frozen and attached; None runs the policy without its adapter (or with its adapter named ``ref``).
        needs: of the terms.
        options: ``backend`` and ``budget`` of the kernels.
    """

    def __init__(self, model: nn.Module | None, needs: Needs, options: Mapping[str, Any]) -> None:
        self.model, self.needs, self.options = model, needs, options

    @torch.no_grad()
    def __call__(
        self, policy: nn.Module, unwrapped: nn.Module, inputs: Mapping[str, Any], side: Side
    ) -> tuple[dict[KernelOptions, dict[str, Tensor]], Any]:
        """Its statistics under ``reference_`` + kernel name, and (hidden, head) where a term needs its distribution.

        Args:
            policy: as the engine wrapped it.
            unwrapped: the policy's own module.
            inputs: of the model.
            side: of the micro-batch.
        """
        groups = tuple(
            StatisticsGroup(wanted, temperature=options.temperature, layer=options.layer)
            for options, wanted in self.needs.groups.items()
        )
        request = VocabRequest(
            side.target_index,
            side.targets,
            groups,
            return_hidden=self.needs.vocabulary,
            return_head=self.needs.vocabulary,
            **self.options,
        )
        if self.model is not None:
            outputs = self.model(**inputs, vocab_request=request)
        else:
            with without_adapter(unwrapped):
                outputs = policy(**inputs, vocab_request=request)
        answers = outputs.statistics or ()
        found = {
            options: {REFERENCE + name: statistics[name] for name in wanted}
            for (options, wanted), statistics in zip(self.needs.groups.items(), answers, strict=True)
        }
        return found, (outputs.hidden, outputs.head) if self.needs.vocabulary else None


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The policy as it was before its adapter was trained, without dropout.

    An adapter that was trained before stands beside as ``ref`` (TRL copies it), and serves in its place.
    """
    assert isinstance(model, PeftModel)
    training = model.training
    model.eval()
    try:
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield
    finally:
        model.train(training)
