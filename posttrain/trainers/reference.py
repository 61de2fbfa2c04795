"""The reference model of a trainer, and what it says of a micro-batch."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path, use_adapter

from posttrain.binding import REFERENCE
from posttrain.modeling import StatisticsGroup, VocabRequest, check_head, standalone_copy
from posttrain.side import Side
from posttrain.term import KernelOptions
from posttrain.trainers.coupling import preserved_random_state
from posttrain.trainers.reference_choice import Needs


def frozen_copy(model: PreTrainedModel | PeftModel, options: Mapping[str, Any]) -> Any:
    """The model as it is now, as one of its own.

    Args:
        model: the policy before training. One that ZeRO-3 sharded while it was loaded is loaded again by its name.
        options: of ``from_pretrained``.

    Raises:
        ValueError: it would have to be loaded again, and has adapters or no name.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return standalone_copy(model)
    name = model.config._name_or_path
    if isinstance(model, PeftModel) or not name:
        raise ValueError(
            "ZeRO-3 sharded the policy while it was loaded, so that no copy of it can be made; give the reference by "
            "name (reference_model, or ref_model in Python)."
        )
    defaults = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    revision = getattr(model.config, "_commit_hash", None)
    found = {**defaults, **({"revision": revision} if revision else {}), **options, "device_map": None}
    return create_model_from_path(name, **found)


class LiveReference:
    """A reference model that runs beside the policy, or the policy without its adapter.

    Args:
        model: frozen and attached; None runs the policy without its adapter (or with its adapter named ``ref``).
        needs: of the terms.
        options: ``backend`` and ``budget`` of the kernels.
        autocast: of the trainer's mixed precision.
    """

    def __init__(
        self,
        model: nn.Module | None,
        needs: Needs,
        options: Mapping[str, Any],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.needs, self.options, self.autocast = model, needs, options, autocast
        self._checked = False

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

        Raises:
            RuntimeError: on the first call, what is read as its head does not give its own logits.
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
        runs = self.model if self.model is not None else policy
        with without_adapter(unwrapped) if self.model is None else nullcontext(), self.autocast():
            if not self._checked:
                with preserved_random_state(inputs["input_ids"].device):
                    check_head(runs, inputs["input_ids"][:1, :8])
                self._checked = True
            outputs = runs(**inputs, vocab_request=request)
        answers = outputs.statistics or ()
        found = {
            options: {REFERENCE + name: statistics[name] for name in wanted}
            for (options, wanted), statistics in zip(self.needs.groups.items(), answers, strict=True)
        }
        return found, (outputs.hidden, outputs.head) if self.needs.vocabulary else None


def keep_adapter(model: PeftModel) -> None:
    """Add ``ref``, a frozen copy of an adapter that knows something already, where TRL's DPO trainer has it too."""
    active = model.active_adapter
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    model.add_adapter("ref", copy.deepcopy(model.peft_config[active]))
    known = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    set_peft_model_state_dict(model, known, adapter_name="ref")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The policy as it was before its adapter was trained, without dropout.

    An adapter that was trained before stands beside as ``ref`` (TRL copies it), and serves in its place.
    """
    assert isinstance(model, PeftModel)
    with (
        without_dropout(model),
        use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None),
    ):
        yield
