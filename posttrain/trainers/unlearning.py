"""Unlearning on trl.SFTTrainer: terms on what is to be forgotten, terms on what is to stay, a sum or a constraint."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.combination import DualVariable, parse
from posttrain.data.overlap import refuse_overlap
from posttrain.data.preference_collation import REFERENCE_SUM, REFERENCE_TOKENS
from posttrain.data.preparation import AnyDataset, number_rows
from posttrain.data.unlearning_collation import ROLES, UnlearningCollator
from posttrain.reduction import StepCounts, sum_dtype
from posttrain.side import Side
from posttrain.term import KernelOptions, Term
from posttrain.terms import Available, build_terms
from posttrain.trainers import trl_adapter
from posttrain.trainers.coupling import Computed
from posttrain.trainers.metrics import MetricSums
from posttrain.trainers.reference import keep_adapter
from posttrain.trainers.reference_choice import (
    Circumstances,
    circumstances,
    reference_needs,
    reference_roles,
    rows_drawn,
)
from posttrain.trainers.reference_handling import ReferenceHandling
from posttrain.trainers.reference_pass import Ask, ReferencePass
from posttrain.trainers.supervised import SupervisedTrainer, sft_config, side_columns
from posttrain.trainers.unlearning_rows import RowsByRole, check_rows

logger = logging.getLogger(__name__)

DUAL = "dual_variable"
# what a term may lack -> the setting that gives it
REMEDIES = {
    "refusal": "set data.refusal (refusals in Python)",
    "retain": "set data.retain (retain_dataset in Python)",
    "retain_refusal": "set data.retain and data.refusal (retain_dataset and refusals in Python)",
    "teacher_ids": "set data.refusal_template (refusal_template in Python) to a short text, such as No idea",
}


class UnlearningTrainer(ReferenceHandling, RowsByRole, SupervisedTrainer):  # type: ignore[misc]
    """trl.SFTTrainer that forgets one data set and keeps another.

    The loss of a step is the forget terms' plus the retain terms', each over its own count of the whole step and all
    ranks; under a constraint the retain terms weigh by a dual variable, which moves once per optimizer step.

    Args:
        model, args, processing_class, peft_config, ...: TRL's own.
        objective: ``{forget: ..., retain: ..., combine: ...}``, see `posttrain.combination.parse`.
        forget_dataset: rows with ``prompt`` and ``completion``; an epoch is an epoch of these.
        retain_dataset: the same, of what is to stay; None where no term asks for it.
        refusals: texts, one of which each row to forget gets as a second completion, drawn by ``args.seed``.
        retain_per_forget: rows to retain drawn beside each row to forget.
        refusal_template: a short text whose tokens repeat over the positions of a forget answer, for terms that ask for
            ``ids_logp``.
        allow_overlap: rows that stand in both data sets are counted and kept instead of refused.
        reference: how the model before unlearning is asked: ``cached`` (once, before training), ``adapter_off``,
            ``model`` (a copy), ``none``, or ``auto``, which takes what the objective needs and costs least.
        reference_cache: folder of a cached reference; None keeps it beside the data sets' own cache files, or in
            ``args.output_dir``.

    Raises:
        ValueError: as `SupervisedTrainer`; a term asks for completions that there are none of; overlapping data.
    """

    _name = "posttrain-unlearning"
    _trains_assistant = False

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        objective: Any,
        forget_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        refusals: list[str] | None = None,
        retain_per_forget: float = 1.0,
        refusal_template: str | None = None,
        allow_overlap: bool = False,
        reference: str = "auto",
        reference_cache: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if forget_dataset is None:
            raise ValueError("forget_dataset is missing; pass the rows to forget.")
        args = sft_config(args, model)
        _refuse(args, kwargs)
        check_rows(forget_dataset, "forget")
        if retain_dataset is not None:
            check_rows(retain_dataset, "retain")
            refuse_overlap(forget_dataset, retain_dataset, allowed=allow_overlap)
        if not retain_per_forget > 0:
            raise ValueError(f"data.retain_per_forget is {retain_per_forget}; give a number above 0.")
        self._parsed = parse(objective)
        self._parsed.check_trained(assistant=self._trains_assistant)
        self._given: dict[str, Any] = {"forget": forget_dataset, "retain": retain_dataset, "refusal": refusals}
        self._template, self._retain_per_forget = refusal_template, retain_per_forget
        self.reference = reference
        terms = self._build_terms([*self._parsed.terms], forget_dataset, False)
        here = self._circumstances(args, terms, model, kwargs.get("peft_config"))
        needs = reference_needs(terms)
        self._choose_reference(reference, needs, here, reference_cache)
        named = isinstance(model, str)
        model = trl_adapter.loaded(model, args, kwargs)
        frozen = self._reference_model(here, args, model, None)
        if isinstance(model, PeftModel) and self.reference in ("cached", "adapter_off"):
            keep_adapter(model)
        numbered: Any = number_rows(forget_dataset)
        with trl_adapter.without_init_kwargs(args, named):
            super().__init__(model, args, objective=[*self._parsed.terms], train_dataset=numbered, **kwargs)
        constraint = self._parsed.combination.constraint
        self.dual = DualVariable(constraint) if constraint else None
        self._warn_of_warmup(len(forget_dataset))
        self._step_losses = torch.zeros(3, dtype=sum_dtype(self.accelerator.device), device=self.accelerator.device)
        self.train_dataset: Any = self._drawn(self._given, retain_per_forget)
        self.ref_model = None if frozen is None else trl_adapter.reference_placed(frozen, self)
        self._start_reference(needs, self.kernel, reference_cache)
        if self.reference == "cached":
            trl_adapter.drop_copied_adapter(self.model)

    def _warn_of_warmup(self, rows: int) -> None:
        if self.dual is None:
            return
        epochs, constraint = rows_drawn(self.args, rows) / rows, self.dual.constraint
        if epochs <= constraint.warmup_epochs:
            logger.warning(
                "Training ends after %.2g epochs of the rows to forget, and objective.combine.constraint.warmup_epochs "
                "is %g: the dual variable stays at %g.", epochs, constraint.warmup_epochs, constraint.initial,
            )  # fmt: skip

    def _circumstances(self, args: Any, terms: tuple[Term, ...], model: Any, peft_config: Any) -> Circumstances:
        forget, retain = self._given["forget"], self._given["retain"]
        here = circumstances(args, forget, None, model, None, peft_config)
        reads_retained = any(role.startswith("retain") for role in reference_roles(terms))
        drawn = rows_drawn(args, len(forget)) * self._retain_per_forget
        return replace(here, whole_epoch=here.whole_epoch and not (reads_retained and drawn < len(retain)))

    def _build_terms(self, objective: Any, dataset: AnyDataset, teacher: bool) -> tuple[Term, ...]:
        roles = ["forget"]
        roles += ["retain"] if self._given["retain"] is not None else []
        roles += ["refusal"] if self._given["refusal"] else []
        roles += ["retain_refusal"] if self._given["retain"] is not None and self._given["refusal"] else []
        columns = side_columns(dataset) + (["teacher_ids"] if self._template else [])
        reference = self.reference != "none"
        available = Available(columns, roles, reference=reference, needs_role=True, remedies=REMEDIES)
        return build_terms(objective, available)

    def _kept_for(self) -> dict[str, Any]:
        collator: Any = self.data_collator
        return {"roles": ("",), "ids": ("input_ids", "labels"), "collator": collator.alone}

    def _add_reference(self, added: ReferencePass, ask: Ask | None) -> None:
        parts, collator = self.train_dataset.parts, self.data_collator
        assert isinstance(collator, UnlearningCollator)
        for role in reference_roles(self.terms):
            parts[role] = added.add(parts[role], role, ask)
        column = REFERENCE_TOKENS if added.needs.per_token else REFERENCE_SUM
        self.data_collator = replace(collator, reference=column)

    def _collator(self) -> UnlearningCollator:
        theirs: Any = self.data_collator
        assert isinstance(theirs, DataCollatorForLanguageModeling)
        template = None
        if self._template:
            tokenizer: Any = self.processing_class
            template = tuple(tokenizer(self._template, add_special_tokens=False)["input_ids"])
        self._columns = tuple(name for name in self._columns if name != "teacher_ids")
        return UnlearningCollator(
            pad_token_id=theirs.pad_token_id,
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            columns=self._columns,
            template=template,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        drawn: Any = self.train_dataset
        return drawn.sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of items with rows by role."""
        self._signature_columns = list(ROLES)  # type: ignore[assignment]
        return super().get_train_dataloader()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Not here: one loss of one data set would say little.

        Raises:
            ValueError: always; it says what measures unlearning.
        """
        raise ValueError("unlearning has no evaluation loss; use evaluation: or posttrain.evaluation.unlearning.")

    def _log_tokens(self, computed: Computed, side: Side, sums: MetricSums) -> None:
        super()._log_tokens(computed, side, sums)
        probability = computed[KernelOptions()]["logp"].detach().exp()
        for role, block in side.roles.items():
            sums.add(f"{role}/mean_target_probability", probability[block.tokens])

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> StepCounts:
        # a step that broke off leaves nothing behind
        self._step_losses.zero_()
        return super()._get_num_items_in_batch(batch_samples, device)

    def _reduce(self, counts: StepCounts, computed: Computed, side: Side, sums: MetricSums) -> list[Tensor]:
        shares = super()._reduce(counts, computed, side, sums)
        forgets = self._parsed.forgets
        sides = [torch.stack(part).sum() if part else torch.zeros(()) for part in (shares[:forgets], shares[forgets:])]
        if torch.is_grad_enabled():
            retained = sum(side.size(term.declaration.unit, term.role) for term in self.terms[forgets:])
            found = [one.detach().to(self._step_losses) for one in sides]
            self._step_losses += torch.stack([*found, torch.full_like(found[0], retained)])
        if self.dual is None:
            return shares
        weight = self.dual.value.to(shares[0])
        return [*shares[:forgets], *(weight * share for share in shares[forgets:])]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's share; after the step's last one, the dual variable moves."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = num_items_in_batch
        last = not isinstance(counts, StepCounts) or counts.seen == len(counts.batches)
        if last and torch.is_grad_enabled():
            self._finish_step()
        return found

    def _finish_step(self) -> None:
        """Whole-step losses of both sides, over micro-batches and ranks, and what follows from them.

        A step without a row to retain (``retain_per_forget`` below 1) says nothing of the retain loss.
        """
        losses = self.accelerator.reduce(self._step_losses, "sum")
        self._step_losses = torch.zeros_like(self._step_losses)
        self._sums["train"].add("forget_loss", losses[0])
        if len(self.terms) > self._parsed.forgets:
            self._sums["train"].add("retain_loss", losses[1:2], weight=losses[2:].sign())
        if self.dual is not None:
            self._sums["train"].add("dual", self.dual.value.to(self.accelerator.device))
            _, retain, retained = losses.cpu()
            if retained > 0:
                self.dual.update(retain, float(self.state.epoch or 0.0))

    def _remembered(self) -> dict[str, Any]:
        return super()._remembered() | ({DUAL: self.dual.state_dict()} if self.dual is not None else {})

    def _remember(self, saved: Mapping[str, Any]) -> None:
        super()._remember(dict(saved))
        if self.dual is not None:
            if DUAL not in saved:
                raise ValueError("the checkpoint holds no dual variable; it was saved without a constraint.")
            self.dual.load_state_dict(saved[DUAL])


def _refuse(args: Any, given: Mapping[str, Any]) -> None:
    """Settings of supervised training that unlearning does not have."""
    if given.get("eval_dataset") is not None:
        raise ValueError("eval_dataset is given, and unlearning has no evaluation loss; use evaluation: instead.")
    if given.get("teacher") is not None:
        raise ValueError("teacher is given, and unlearning compares with the model before unlearning; take it out.")
    if getattr(args, "packing", False):
        raise ValueError("trainer.packing is true, and rows are drawn one by one; set it to false.")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise ValueError(
            f"trainer.train_sampling_strategy is {strategy!r}, and rows to forget are drawn with rows to retain; "
            "set it to random or sequential."
        )
