"""Unlearning on trl.SFTTrainer: terms on what is to be forgotten, terms on what is to stay, a sum or a constraint."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.combination import DualVariable, parse
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.drawing import DrawingSampler, DrawnRows
from posttrain.data.overlap import refuse_overlap
from posttrain.data.preparation import AnyDataset, column_names, number_rows
from posttrain.data.refusals import with_refusals
from posttrain.data.unlearning_collation import ROLES, UnlearningCollator
from posttrain.modeling import attach, causal_lm
from posttrain.reduction import StepCounts, sum_dtype
from posttrain.side import Side
from posttrain.term import Term
from posttrain.terms import Available, build_terms
from posttrain.trainers.coupling import Computed
from posttrain.trainers.metrics import MetricSums
from posttrain.trainers.reference import LiveReference, frozen_copy
from posttrain.trainers.reference_choice import reference_needs
from posttrain.trainers.supervised import SupervisedTrainer, side_columns

logger = logging.getLogger(__name__)

DUAL = "dual_variable"
# what a term may lack -> the setting that gives it
REMEDIES = {
    "refusal": "set data.refusal (refusals in Python)",
    "retain": "set data.retain (retain_dataset in Python)",
    "retain_refusal": "set data.retain and data.refusal (retain_dataset and refusals in Python)",
    "teacher_ids": "set data.refusal_template (refusal_template in Python)",
}


class UnlearningTrainer(SupervisedTrainer):
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
        reference: ``model``, ``adapter_off``, ``none``, or ``auto``: the model before unlearning.

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
        **kwargs: Any,
    ) -> None:
        if forget_dataset is None:
            raise ValueError("forget_dataset is missing; pass the rows to forget.")
        _refuse(args, kwargs)
        for name, rows in (("forget", forget_dataset), ("retain", retain_dataset)):
            if rows is not None and not len(rows):
                raise ValueError(f"the {name} data is empty; give at least one row.")
        if not retain_per_forget > 0:
            raise ValueError(f"data.retain_per_forget is {retain_per_forget}; give a number above 0.")
        self._parsed = parse(objective)
        self._parsed.check_trained(assistant=self._trains_assistant)
        self._given = {"retain": retain_dataset, "refusal": refusals}
        self._template = refusal_template
        if retain_dataset is not None:
            refuse_overlap(forget_dataset, retain_dataset, allowed=allow_overlap)
        columns = side_columns(forget_dataset)
        reference_model = self._reference_copy(model, reference, kwargs.get("peft_config"), columns)
        numbered: Any = number_rows(forget_dataset)
        super().__init__(model, args, objective=[*self._parsed.terms], train_dataset=numbered, **kwargs)
        constraint = self._parsed.combination.constraint
        self.dual = DualVariable(constraint) if constraint else None
        self._step_losses = torch.zeros(3, dtype=sum_dtype(self.accelerator.device), device=self.accelerator.device)
        self._live_reference = self._start_reference(reference_model)
        self.train_dataset: Any = self._drawn(numbered, retain_dataset, refusals, retain_per_forget)

    def _build_terms(self, objective: Any, dataset: AnyDataset, teacher: bool) -> tuple[Term, ...]:
        roles = ["forget"]
        roles += ["retain"] if self._given["retain"] is not None else []
        roles += ["refusal"] if self._given["refusal"] else []
        roles += ["retain_refusal"] if self._given["retain"] is not None and self._given["refusal"] else []
        columns = side_columns(dataset) + (["teacher_ids"] if self._template else [])
        reference = self.reference != "none"
        available = Available(columns, roles, reference=reference, needs_role=True, remedies=REMEDIES)
        return build_terms(objective, available)

    def _reference_copy(self, model: Any, reference: str, peft_config: Any, columns: list[str]) -> Any:
        """A copy of the model before anything changes it, where the reference is not the policy without its adapter."""
        if reference not in ("auto", "model", "adapter_off", "none"):
            raise ValueError(f"reference is {reference!r}; unlearning knows auto, model, adapter_off and none.")
        adapter = peft_config is not None or isinstance(model, PeftModel)
        self.reference = ("adapter_off" if adapter else "model") if reference == "auto" else reference
        if self.reference == "adapter_off" and not adapter:
            raise ValueError("reference is adapter_off, and the model has no adapter; set it to model, or give peft.")
        if self.reference != "model" or isinstance(model, str) or not self._asks_reference(columns):
            return None
        return frozen_copy(model, {})

    def _asks_reference(self, columns: list[str]) -> bool:
        available = Available(roles=ROLES, reference=True, needs_role=True, columns=[*columns, "teacher_ids"])
        terms = build_terms([*self._parsed.terms], available)
        return reference_needs(terms).any

    def _start_reference(self, model: Any) -> LiveReference | None:
        needs = reference_needs(self.terms)
        if not needs.any or self.reference == "none":
            return None
        if self.reference == "model":
            if model is None:
                policy = causal_lm(self.model)
                model = type(policy).from_pretrained(policy.config._name_or_path, dtype=policy.dtype)
            attach(model)
            model = self.accelerator.prepare_model(model.eval().requires_grad_(False), evaluation_mode=True)
        options = {"backend": self.kernel.backend, "budget": self.kernel.budget}
        return LiveReference(model, needs, options, self.accelerator.autocast)

    def _frozen(self, model: nn.Module, model_inputs: dict[str, Any], side: Side) -> tuple[Computed, Any]:
        if self._live_reference is None:
            return {}, None
        return self._live_reference(model, self.accelerator.unwrap_model(model), model_inputs, side)

    def _drawn(self, forget: Dataset, retain: Dataset | None, refusals: list[str] | None, ratio: float) -> DrawnRows:
        """The prepared rows of every role that a term reads, and the sampler that draws them."""
        read = {one.role or term.role for term in self.terms for one in term.all_statistics}
        read |= {term.role for term in self.terms}
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        parts: dict[str, Any] = {"forget": self.train_dataset, "retain": None}
        if "retain" in read and retain is not None:
            parts["retain"] = self._prepared(retain, "retain")
        for role, given in (("refusal", forget), ("retain_refusal", retain)):
            own = parts["retain" if role.startswith("retain") else "forget"]
            parts[role] = None
            if role in read and given is not None and own is not None and refusals:
                numbered: Any = number_rows(given)
                rows = with_refusals(numbered, own[ROW_NUMBER], refusals, seed=seed)
                parts[role] = _in_order(self._prepared(rows, role), own[ROW_NUMBER], role)
        kept = parts["retain"]
        shuffle = self.args.train_sampling_strategy != "sequential"
        counts = len(parts["forget"]), len(kept) if kept is not None else 0
        sampler = DrawingSampler(*counts, ratio=ratio, shuffle=shuffle, seed=seed)
        return DrawnRows(parts["forget"], kept, parts["refusal"], parts["retain_refusal"], sampler)

    def _prepared(self, rows: Dataset, role: str) -> Any:
        bound = {column: term.name for term in self.terms if term.role == role for column in term.all_columns}
        for column in self._columns:
            if column in column_names(rows):
                continue
            if column in bound:
                raise ValueError(
                    f"the {role} data lacks the column {column!r} that the objective {bound[column]!r} needs; it has "
                    f"{sorted(column_names(rows))}."
                )
            # no term reads it here, and a batch holds rows of every role
            rows = rows.add_column(column, [0.0] * len(rows))
        prepare: Callable[..., Any] = self._prepare_dataset
        return prepare(rows, self.processing_class, self.args, False, None, role)

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

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> StepCounts:
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


def _in_order(rows: Dataset, numbers: list[int], role: str) -> Dataset:
    """The rows of these numbers, in their order, whatever preparing has shuffled or left out."""
    position = {number: index for index, number in enumerate(rows[ROW_NUMBER])}
    lost = sum(number not in position for number in numbers)
    if lost:
        raise ValueError(
            f"{lost} prompts of the {role} data leave no room for a refusal within trainer.max_length; raise it."
        )
    return rows.select([position[number] for number in numbers])
