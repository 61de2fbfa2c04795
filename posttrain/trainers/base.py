"""The shared way from a micro-batch to a loss: statistics -> objective -> reduction -> metrics."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.binding import reference_groups, wanted_groups
from posttrain.config import KernelConfig
from posttrain.modeling import StatisticsGroup, VocabRequest, check_head
from posttrain.objectives import Loss
from posttrain.reduction import StepCounts, divide, weighted_sum
from posttrain.side import Side
from posttrain.term import KernelOptions, Term
from posttrain.trainers.card import card_of
from posttrain.trainers.checkpoints import StatesInCheckpoints
from posttrain.trainers.coupling import (
    Computed,
    States,
    bind_term,
    count_columns,
    detached,
    preserved_random_state,
    resolve,
)
from posttrain.trainers.evaluating import NOT_FOR_MODEL, EvaluationMixin
from posttrain.trainers.finite import check_finite
from posttrain.trainers.metrics import CertificateBounds, MetricSums
from posttrain.trainers.one_pass import in_one_pass, read, use_one_pass

LOGGED = ("logp", "entropy", "is_top1")


class ObjectiveMixin(EvaluationMixin, StatesInCheckpoints):
    """Goes before a TRL trainer in the bases; that trainer keeps data preparation, PEFT set-up and saving.

    The loss of a step is the sum over terms of ``weight * sum(values) / denominator``, the denominator counted over
    the step's micro-batches and all ranks, so that the gradient does not depend on how the step was split.
    """

    model: Any
    loss_is_scaled_for_ga = True
    aux_loss_enabled: bool = False
    router_aux_loss_coef: float = 0.0
    _paper: dict[str, str]

    def _start_objective(self, terms: Sequence[Term], kernel: KernelConfig) -> None:
        self.terms, self.kernel = tuple(terms), kernel
        self._one_pass = use_one_pass(kernel, terms)
        self._certificates = CertificateBounds() if kernel.gradient_tolerance > 0 else None
        self._groups = wanted_groups(self.terms, LOGGED)
        self._reference_groups = reference_groups(self.terms)
        self._counted = tuple(dict.fromkeys(("tokens", *(term.denominator for term in self.terms))))
        self.states = States(self.terms)
        self._name, self._paper = card_of(self.terms)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._evaluated, self._evaluated_apart = None, []
        self._head_checked = False
        self._clock, self._clock_tokens, self._all_tokens = time.perf_counter(), 0, 0

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> StepCounts:
        """Count each unit over the step's micro-batches and all ranks, before the step's first forward."""
        counts = StepCounts(self._count([batch["side"] for batch in batch_samples], device), batch_samples)
        count_columns(counts, self.terms, self.accelerator)
        return counts

    def _count(self, sides: Sequence[Side], device: torch.device) -> dict[str, Tensor]:
        """Each denominator that a term may need, over these micro-batches and all ranks."""
        local = [sum(side.count(name) for side in sides) for name in self._counted]
        return dict(zip(self._counted, self.accelerator.reduce(torch.tensor(local, device=device), "sum"), strict=True))

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepCounts | None = None,
    ) -> Any:
        """One micro-batch's share of the step's loss.

        Raises:
            NonFiniteLossError: names the step, the rows of the data and the offending objective.
        """
        counts = num_items_in_batch
        if not isinstance(counts, StepCounts):
            counts = self._get_num_items_in_batch([inputs], inputs["input_ids"].device)
        self._check_head_once(model, inputs)
        if self._coupled and not counts.resolved and (len(counts.batches) > 1 or self._prepares_apart):
            self._count_step(model, counts)
        one_pass = self._one_pass and torch.is_grad_enabled()
        with self._certificates.recorded() if self._certificates else nullcontext():
            computed, side, outputs = self._statistics(model, inputs, counts if one_pass else None)
        if self._coupled and not counts.resolved:
            resolve(counts, self.terms, [(detached(computed), side)], self.accelerator, states=self.states)
        shares = self._reduce(counts, computed, side, self._sums["train"])
        auxiliary = self._auxiliary(outputs, len(counts.batches), "train")
        check_finite(self.terms, [*shares, auxiliary], computed, side, self.state.global_step)
        share = outputs.statistics[0]["loss"] if one_pass else torch.stack(shares).sum()
        # DDP, FSDP and ZeRO average gradients over ranks, and the denominators already count all of them
        loss = share * self.accelerator.num_processes + auxiliary
        self._log_tokens(computed, side, self._sums["train"])
        self._clock_tokens += side.num_tokens
        counts.seen += 1
        if torch.is_grad_enabled():
            self.states.observe(computed, side)
            if counts.seen == len(counts.batches):
                self.states.update(self.accelerator)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the clock of tokens per second started here."""
        self._clock, self._clock_tokens = time.perf_counter(), 0
        return super().train(*args, **kwargs)

    def exclude_from_clock(self, seconds: float) -> None:
        """Keep time spent on something else out of the tokens per second."""
        self._clock += seconds

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""

    @property
    def _coupled(self) -> bool:
        return any(term.needs_whole_step for term in self.terms)

    # whether `prepare` reads other sequences than the loss does
    _prepares_apart = False

    def _statistics(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        one_pass: StepCounts | None = None,
        groups: Mapping[KernelOptions, tuple[str, ...]] | None = None,
    ) -> tuple[Computed, Side, Any]:
        """Run the wrapped model's forward; the kernel runs inside it, where sharded parameters can be read.

        With the step's counts as ``one_pass`` it also forms the gradients, and the statistics are detached. ``groups``
        are what all terms ask for unless given.
        """
        side: Side = inputs["side"]
        groups = self._groups if groups is None else groups
        model_inputs = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
        reference, teacher = self._frozen(model, model_inputs, side)
        kernel_groups = tuple(
            StatisticsGroup(
                wanted=wanted,
                temperature=options.temperature,
                k=options.k,
                jsd_beta=options.jsd_beta,
                layer=options.layer,
                ids=side.token_columns.get("teacher_ids") if "ids_logp" in wanted else None,
            )
            for options, wanted in groups.items()
        )
        request = VocabRequest(
            target_index=side.target_index,
            targets=side.targets,
            groups=kernel_groups,
            teacher=teacher,
            backend=self.kernel.backend,
            gradient_tolerance=self.kernel.gradient_tolerance,
            budget=self.kernel.budget,
        )
        if one_pass is not None:
            request = in_one_pass(request, tuple(groups), self.terms, one_pass, side)
        outputs = model(**model_inputs, vocab_request=request)
        answers = outputs.statistics if one_pass is None else read(outputs.statistics[0], tuple(groups))
        computed = {
            options: {name: statistics[name] for name in groups[options]} | dict(reference.get(options, {}))
            for options, statistics in zip(groups, answers, strict=True)
        }
        return computed, side, outputs

    def _frozen(self, model: nn.Module, model_inputs: dict[str, Any], side: Side) -> tuple[Computed, Any]:
        """What models that are not trained say of a micro-batch.

        Returns:
            the reference model's statistics, named ``reference_`` + kernel name, where they are not among the columns
            already; and (hidden, head) of the teacher, or None.
        """
        return {}, None

    def _prepared_from(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Computed, Side]:
        """Statistics and side that the terms' ``prepare`` reads of a micro-batch."""
        computed, side, _ = self._statistics(model, inputs)
        return computed, side

    def _count_step(self, model: nn.Module, counts: StepCounts) -> None:
        """A no-gradient pass over the step's micro-batches, drawing the random numbers that the real pass will draw."""
        batches: list[tuple[Computed, Side]] = []
        apart: list[tuple[Computed, Side]] = []
        weighs = any(term.counts_weight and not term.weight_from_columns for term in self.terms)
        with torch.no_grad(), preserved_random_state(self.accelerator.device):
            for batch in counts.batches:
                inputs = self._prepare_inputs(batch)
                if weighs or not self._prepares_apart:
                    batches.append(self._statistics(model, inputs)[:2])
                if self._prepares_apart:
                    apart.append(self._prepared_from(model, inputs))
        prepared_from = apart if self._prepares_apart else None
        resolve(counts, self.terms, batches or apart, self.accelerator, states=self.states, prepared_from=prepared_from)

    def _reduce(self, counts: StepCounts, computed: Computed, side: Side, sums: MetricSums) -> list[Tensor]:
        """Each term's weighted share of the step's loss."""
        shares: list[Tensor] = []
        for index, term in enumerate(self.terms):
            prepared = counts.prepared[index][counts.seen] if index in counts.prepared else {}
            remembered = self.states.tensors(index, side.targets.device)
            loss = term(bind_term(term, computed, side, {**remembered, **prepared}))
            self._check_units(term, loss, side)
            if loss.weight is not None and index not in counts.denominators:
                raise ValueError(
                    f"objective {term.name!r} returned a weight now and none on its trial call at the start; declare "
                    "it with `declare(..., model_weight=True)` so that the step's weights are counted."
                )
            denominator = counts.denominators.get(index, counts.units[term.denominator])
            shares.append(term.weight * divide(weighted_sum(loss.values, loss.weight), denominator))
            self._observe(term, loss, side, sums)
            for name, values in loss.metrics.items():
                sums.add(f"{term.name}/{name}", values)
            if len(self.terms) > 1:
                sums.add(f"{term.name}/loss", loss.values, loss.weight)
        return shares

    def _observe(self, term: Term, loss: Loss, side: Side, sums: MetricSums) -> None:
        """For trainers that watch more than the objective's own metrics."""

    def _check_units(self, term: Term, loss: Loss, side: Side) -> None:
        expected = side.size(term.declaration.unit, term.role)
        if loss.values.shape[0] != expected:
            raise ValueError(
                f"objective {term.name!r} declares the unit {term.declaration.unit} and returned "
                f"{loss.values.shape[0]} values for {expected} of them; return one value each."
            )

    def _auxiliary(self, outputs: Any, accumulation_steps: int, mode: str) -> Tensor | float:
        """The weighted load-balancing loss of a mixture of experts: a mean over micro-batches, like TRL's."""
        if not self.aux_loss_enabled:
            return 0.0
        self._sums[mode].add("aux_loss", outputs.aux_loss)
        return self.router_aux_loss_coef * outputs.aux_loss / accumulation_steps

    def _log_tokens(self, computed: Computed, side: Side, sums: MetricSums) -> None:
        default = computed[KernelOptions()]
        sums.add("entropy", default["entropy"])
        sums.add("mean_token_accuracy", default["is_top1"])
        sums.add("mean_target_probability", default["logp"].detach().exp())

    def _check_head_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Contract: what the kernels read as the head must give the model's own logits, or nothing is trained."""
        if self._head_checked:
            return
        self._head_checked = True
        with preserved_random_state(self.accelerator.device):
            check_head(model, inputs["input_ids"][:1, :8])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, reduced over micro-batches and ranks."""
        if "loss" in logs:
            logs.update(self._sums["train"].reduce(self.accelerator))
            if self._certificates:
                logs.update(self._certificates.reduce(self.accelerator))
            tokens = torch.tensor(self._clock_tokens, device=self.accelerator.device)
            total = self.accelerator.reduce(tokens, "sum").item()
            now = time.perf_counter()
            if not self._all_tokens:
                counted = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
                self._all_tokens = int(counted[-1]) if counted else 0
            self._all_tokens += total
            logs["num_tokens"] = self._all_tokens
            logs["tokens_per_second"] = total / max(now - self._clock, 1e-9)
            self._clock, self._clock_tokens = now, 0
        super().log(logs, start_time)
