"""Evaluation by objectives: sums over the whole set divided by its counts, where TRL averages batch means."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from posttrain.reduction import StepCounts
from posttrain.side import Side
from posttrain.term import Term
from posttrain.trainers.coupling import Computed, States, resolve
from posttrain.trainers.metrics import MetricSums

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object


# what stands in a micro-batch beside the model's own inputs
NOT_FOR_MODEL = frozenset({"side", "labels", "mismatched"})


class EvaluationMixin(Host):
    """The part of `posttrain.trainers.base.ObjectiveMixin` that evaluates; what it calls stands there."""

    terms: tuple[Term, ...]
    states: States
    router_aux_loss_coef: float
    _sums: dict[str, MetricSums]
    _prepares_apart: bool
    _evaluated: list[tuple[Computed, Side]] | None
    _evaluated_apart: list[tuple[Computed, Side]]
    _statistics: Callable[..., tuple[Computed, Side, Any]]
    _prepared_from: Callable[..., tuple[Computed, Side]]
    _check_head_once: Callable[..., None]
    _auxiliary: Callable[..., Any]
    _count: Callable[..., dict[str, Tensor]]
    _reduce: Callable[..., list[Tensor]]
    _log_tokens: Callable[..., None]
    exclude_from_clock: Callable[[float], None]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Collect the statistics of an evaluation batch; `evaluation_loop` reduces them over the whole set."""
        inputs = self._prepare_inputs(inputs)
        logits = labels = None
        with torch.no_grad(), self.compute_loss_context_manager():
            self._check_head_once(model, inputs)
            computed, side, outputs = self._statistics(model, inputs)
            apart = self._prepared_from(model, inputs) if self._prepares_apart else None
            self._auxiliary(outputs, 1, "eval")
            if not prediction_loss_only:
                plain = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
                # as TRL does: without labels transformers would leave compute_metrics out
                logits, labels = model(**plain).logits, inputs.get("labels", inputs["input_ids"])
        if self._evaluated is not None:
            self._evaluated.append(self._waiting(computed, side))
            if apart is not None:
                self._evaluated_apart.append(self._waiting(*apart))
        return torch.zeros((), device=inputs["input_ids"].device), logits, labels

    def deployed_model(self) -> Any:
        """What the run gives away: its model without the wrapper that mixed precision put around forward."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _waiting(self, computed: Computed, side: Side) -> tuple[Computed, Side]:
        """On the CPU, where the whole set's statistics wait for its quantiles and counts."""
        computed, side = self._without_repeats(computed, side)
        return {o: {n: values.cpu() for n, values in group.items()} for o, group in computed.items()}, side.to("cpu")

    def _without_repeats(self, computed: Computed, side: Side) -> tuple[Computed, Side]:
        """Leave out the rows with which accelerate fills the last batch so that every rank has one."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return computed, side
        real = state.remainder - self.accelerator.process_index * side.rows
        if real >= side.rows:
            return computed, side
        side, tokens = side.first_rows(max(real, 0))
        kept = {
            options: {name: values[tokens] for name, values in group.items()} for options, group in computed.items()
        }
        return kept, side

    def _evaluated_metrics(self, prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """What a trainer adds to the metrics of a whole evaluation set."""
        return {}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """TRL's loop, with the loss and metrics as sums over the whole set divided by its counts."""
        started = time.perf_counter()
        self._evaluated, self._evaluated_apart = [], []
        output = super().evaluation_loop(*args, **kwargs)
        batches, self._evaluated = self._evaluated, None
        apart, self._evaluated_apart = self._evaluated_apart, []
        sums = self._sums["eval"]
        device = self.accelerator.device
        counts = StepCounts(self._count([side for _, side in batches], device))
        resolve(counts, self.terms, batches, self.accelerator, states=self.states, prepared_from=apart or None)
        loss = torch.zeros(())
        for computed, side in batches:
            loss = loss + torch.stack(self._reduce(counts, computed, side, sums)).sum()
            self._log_tokens(computed, side, sums)
            counts.seen += 1
        loss = self.accelerator.reduce(loss.to(device), "sum").item()
        metrics = sums.reduce(self.accelerator)
        if "aux_loss" in metrics:
            loss += self.router_aux_loss_coef * metrics["aux_loss"]
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics |= self._evaluated_metrics(prefix, metrics)
        found = {f"{prefix}_{name}": value for name, value in {"loss": loss, **metrics}.items()}
        self.exclude_from_clock(time.perf_counter() - started)
        return output._replace(metrics={**(output.metrics or {}), **found})
