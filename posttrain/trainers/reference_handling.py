"""Which reference a trainer has, where it comes from and when it is asked."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from posttrain.binding import REFERENCE
from posttrain.config import KernelConfig
from posttrain.data.preference_preparation import PROMPT
from posttrain.modeling import attach
from posttrain.side import Side
from posttrain.trainers import trl_adapter
from posttrain.trainers.coupling import Computed
from posttrain.trainers.evaluating import NOT_FOR_MODEL
from posttrain.trainers.reference import LiveReference, frozen_copy, without_dropout
from posttrain.trainers.reference_choice import Circumstances, Needs, choose
from posttrain.trainers.reference_pass import Ask, ReferencePass, shared_hash_of

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object

logger = logging.getLogger(__name__)


class ReferenceHandling(Host):
    """What has to do with the reference model in trainers that compare with one.

    Cached log-probabilities are computed at the end of the constructor: the policy has its first weights only there,
    and engines shard it when training starts.
    """

    roles: ClassVar[Sequence[str]]
    _collator: Callable[[], Any]
    model: Any
    ref_model: Any
    train_dataset: Any
    eval_dataset: Any
    reference: str
    _live_reference: LiveReference | None = None
    _reference_pass: ReferencePass | None = None

    def _choose_reference(self, reference: str, needs: Needs, here: Circumstances, folder: str | Path | None) -> None:
        """Settle the kind of reference, and say which.

        Raises:
            ValueError: this kind cannot serve here, or a folder is given for what is not kept.
        """
        if folder is not None and reference not in ("auto", "cached"):
            raise ValueError(
                f"reference_cache is set and reference is {reference!r}, which keeps nothing; set it to cached."
            )
        self.reference, why = choose(reference, needs, here)
        logger.info("reference is %s%s: %s.", self.reference, " (auto)" if reference == "auto" else "", why)

    def _reference_model(self, here: Circumstances, args: Any, model: Any, given: Any) -> Any:
        """The model that TRL's constructor is to place beside the policy, or None.

        Args:
            model: the policy, loaded, without an adapter that is still to be made.
            given: the reference model that the trainer was given, or its name.
        """
        self._policy_is_reference = given is None
        if self.reference == "none" and given is not None:
            logger.warning("The reference model is not used: no term of the objective reads one.")
        if self.reference in ("none", "adapter_off"):
            return None
        if given is None and (self.reference == "model" or here.fsdp):
            self._policy_is_reference = False
            given = frozen_copy(model, {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})})
        if isinstance(given, str):
            attention = model.config._attn_implementation
            given = trl_adapter.loaded_by_name(given, args, dtype=model.dtype, attn_implementation=attention)
        if self.reference == "cached":
            source = model if given is None else given
            trained = source.active_adapter if isinstance(source, PeftModel) else None
            self._reference_weights = shared_hash_of(source, trained)
        return given

    def _start_reference(self, needs: Needs, kernel: KernelConfig, folder: str | Path | None) -> None:
        """Take the reference into service; one that is cached is asked now and then given up."""
        model = self.ref_model
        if model is not None:
            attach(model)
            # apart: the eval of a DeepSpeed engine returns nothing
            model.eval()
            model.requires_grad_(False)
        if self.reference == "none":
            return
        options = {"backend": kernel.backend, "budget": kernel.budget}
        self._live_reference = LiveReference(model, needs, options, self.accelerator.autocast)
        if self.reference != "cached":
            return
        live, self._live_reference = self._live_reference, None
        added = ReferencePass(
            needs,
            self._reference_weights,
            self.model if model is None else model,
            folder=folder,
            args=self.args,
            accelerator=self.accelerator,
            **self._kept_for(),
        )
        with self._asked(live) as ask:
            self._add_reference(added, ask)
        self._give_up_reference()
        live.model = None
        self._reference_pass, self._pass_over = added, live

    def _kept_for(self) -> dict[str, Any]:
        """What a row of the data is, as `ReferencePass` takes it."""
        ids = [PROMPT, *(f"{role or 'completion'}_ids" for role in self.roles)]
        return {"roles": self.roles, "ids": ids, "collator": self.data_collator}

    def _add_reference(self, added: ReferencePass, ask: Ask | None) -> None:
        """Put the columns of a cached reference beside the data that the trainer was given."""
        self.train_dataset = added.add(self.train_dataset, "train", ask)
        if isinstance(self.eval_dataset, dict):
            for name, one in self.eval_dataset.items():
                self.eval_dataset[name] = added.add(one, f"eval-{name}", ask)
        elif self.eval_dataset is not None:
            self.eval_dataset = added.add(self.eval_dataset, "eval", ask)

    def _give_up_reference(self) -> None:
        """Nothing of the trainer keeps a reference model of its own in memory."""
        if self.ref_model is None:
            return
        trl_adapter.end_engine(self.ref_model)
        self.accelerator._models = [one for one in self.accelerator._models if one is not self.ref_model]
        self.ref_model = None
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).empty_cache()

    @contextmanager
    def _asked(self, live: LiveReference) -> Iterator[Ask | None]:
        """The reference's log-probabilities of a micro-batch; None once there is no reference left to ask."""
        if live.model is not None:
            yield self._ask(live, live.model)
            return
        adapter = isinstance(self.model, PeftModel)
        if not self._policy_is_reference or (self.state.global_step > 0 and not adapter):
            yield None
            return
        with trl_adapter.placed(self) as policy, without_dropout(self.model):
            whole = live if adapter else LiveReference(policy, live.needs, live.options, live.autocast)
            yield self._ask(whole, policy)

    def _ask(self, live: LiveReference, policy: nn.Module) -> Ask:
        options = next(iter(live.needs.groups))

        def ask(batch: dict[str, Any]) -> Tensor:
            inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}
            found, _ = live(policy, self.accelerator.unwrap_model(policy), inputs, batch["side"])
            return found[options][REFERENCE + "logp"]

        return ask

    def _with_reference(self, dataset: Any) -> Any:
        """A data set that came after the constructor, with the columns of a cached reference."""
        if self._reference_pass is None:
            return dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "reference is cached, and the data to evaluate is streamed; set streaming to false, or reference to "
                "adapter_off or model."
            )
        with self._asked(self._pass_over) as ask:
            return self._reference_pass.add(dataset, None, ask)

    def _frozen(self, model: nn.Module, model_inputs: Mapping[str, Any], side: Side) -> tuple[Computed, Any]:
        if self._live_reference is None:
            return {}, None
        unwrapped = self.accelerator.unwrap_model(model)
        return self._live_reference(model, unwrapped, model_inputs, side)
