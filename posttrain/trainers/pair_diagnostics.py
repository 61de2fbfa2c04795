"""What a loss of margins hides: where the log-probabilities of both completions go, and whether margins mean anything.

A margin grows as well when both completions become less likely (likelihood displacement, arXiv:2410.08847), and the
two gradients pull on each other where they point the same way (gradient entanglement, arXiv:2410.13828).
"""

import itertools
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from posttrain.config import DiagnosticsConfig
from posttrain.evaluation.calibration import bin_sums, expected_calibration_error
from posttrain.kernels.budget import total_memory
from posttrain.modeling import StatisticsGroup, VocabRequest
from posttrain.objectives import Loss
from posttrain.reduction import segment_sum
from posttrain.side import Side
from posttrain.term import KernelOptions, Term
from posttrain.trainers.base import ObjectiveMixin
from posttrain.trainers.coupling import Computed, gather_ragged
from posttrain.trainers.evaluating import NOT_FOR_MODEL
from posttrain.trainers.metrics import MetricSums

logger = logging.getLogger(__name__)

BINS = 10
DEFAULT_BATCHES = 2
ROLES = ("chosen", "rejected")
SCORE_MARGIN = "score_margin"
# share of the device's memory that the two gradients compared may take
GRADIENTS_SHARE = 16
# their place in the file of `posttrain.trainers.checkpoints`
DIAGNOSTICS = "pair_diagnostics"


@dataclass(frozen=True)
class Entanglement:
    """The inner product of the gradients of the mean chosen and rejected log-probability, over their norms.

    Args:
        cosine: <g_chosen, g_rejected> / (norm of g_chosen * norm of g_rejected).
        over_chosen: <g_chosen, g_rejected> / squared norm of g_chosen; above 1, a step on a loss that pulls equally on
            both (dpo and most others) makes the chosen completions less likely.
        over_rejected: the same over the squared norm of g_rejected; above 1, such a step makes the rejected likelier.
    """

    cosine: float
    over_chosen: float
    over_rejected: float


def entanglement(chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> Entanglement:
    """Of two gradients, given parameter by parameter (arXiv:2410.13828, Sec. 3)."""

    def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return sum(float(torch.dot(_flat(a), _flat(b))) for a, b in zip(left, right, strict=True))

    both, chosen_square, rejected_square = inner(chosen, rejected), inner(chosen, chosen), inner(rejected, rejected)
    tiny = torch.finfo(torch.float64).tiny
    return Entanglement(
        both / max((chosen_square * rejected_square) ** 0.5, tiny),
        both / max(chosen_square, tiny),
        both / max(rejected_square, tiny),
    )


def _flat(gradient: Tensor) -> Tensor:
    return gradient.flatten() if gradient.dtype == torch.float64 else gradient.flatten().float()


def _identity(dataset: Any) -> str:
    """Tells evaluation sets apart, also in a resumed run: their size and their first row."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return ""
    return f"{len(dataset)}-{zlib.crc32(repr(sorted(dataset[0].items())).encode()):08x}"


class PairDiagnostics(ObjectiveMixin):
    """The part of `posttrain.trainers.preference.PreferenceTrainer` that watches pairs."""

    def _start_diagnostics(self, settings: DiagnosticsConfig) -> None:
        self.diagnostics = settings
        self._evaluated_set: Any = None
        self._margins: list[tuple[Tensor, Tensor]] = []
        self._calibrated: str | None = None
        # evaluation set -> role -> mean log-probability at its first and at its last evaluation
        self._first: dict[str, dict[str, float]] = {}
        self._last: dict[str, dict[str, float]] = {}
        self._falling: dict[str, int] = {}

    def _log_tokens(self, computed: Computed, side: Side, sums: MetricSums) -> None:
        super()._log_tokens(computed, side, sums)
        logp = computed[KernelOptions()]["logp"].detach()
        for role in ROLES:
            sums.add(f"{role}_logp", segment_sum(logp[side.roles[role].tokens], side.of(role).lengths))

    def _observe(self, term: Term, loss: Loss, side: Side, sums: MetricSums) -> None:
        margin = loss.metrics.get("implicit_margin")
        scores = side.of("chosen").sequence_columns.get(SCORE_MARGIN)
        if sums is not self._sums["eval"] or margin is None or scores is None:
            return
        # a sum of terms has a margin each: calibration is told of the first one's
        self._calibrated = self._calibrated or term.name
        if term.name == self._calibrated:
            self._margins.append((margin.cpu(), scores.cpu()))

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """With the set that is evaluated at hand."""
        self._evaluated_set = dataloader.dataset
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _evaluated_metrics(self, prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
        found = self._displacement(prefix, metrics) | self._calibration()
        return found | self._entanglement()

    def _remembered(self) -> dict[str, Any]:
        watched = {"first": self._first, "last": self._last, "falling": self._falling}
        return super()._remembered() | ({DIAGNOSTICS: watched} if self._first else {})

    def _remember(self, saved: dict[str, Any]) -> None:
        super()._remember(saved)
        watched = saved.get(DIAGNOSTICS, {"first": {}, "last": {}, "falling": {}})
        self._first, self._last, self._falling = watched["first"], watched["last"], watched["falling"]

    def _displacement(self, prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Change of both log-probabilities since the set's first evaluation; warns where chosen keeps falling."""
        now = {role: metrics[f"{role}_logp"] for role in ROLES if f"{role}_logp" in metrics}
        if len(now) < len(ROLES):
            return {}
        key = f"{prefix} {_identity(self._evaluated_set)}"
        first = self._first.setdefault(key, now)
        last, self._last[key] = self._last.get(key), now
        fell = last is not None and now["chosen"] < last["chosen"]
        self._falling[key] = self._falling.get(key, 0) + 1 if fell else 0
        if self._falling[key] > self.diagnostics.patience:
            logger.warning(
                "The log-probability of the chosen completions of the %s data has fallen at %d evaluations in a row, "
                "by %.3g nats since the first (the rejected ones' changed by %.3g): the margin may grow by "
                "displacement alone; add a chosen_nll term, take a smaller learning rate or a loss such as dpop.",
                prefix, self._falling[key], first["chosen"] - now["chosen"], now["rejected"] - first["rejected"],
            )  # fmt: skip
        return {f"{role}_logp_change": now[role] - first[role] for role in ROLES}

    def _calibration(self) -> dict[str, float]:
        """Of sigmoid(implicit margin) as the probability that the scores prefer the chosen completion."""
        margins, self._margins = self._margins, []
        empty = torch.zeros(0)
        stacked = [torch.cat([pair[index] for pair in margins]) if margins else empty for index in (0, 1)]
        margin, score = (gather_ragged(tensor.float(), self.accelerator) for tensor in stacked)
        decided = torch.isfinite(score) & (score != 0)
        if not bool(decided.any()):
            return {}
        probability = torch.sigmoid(margin[decided].double())
        preferred = (score[decided] > 0).double()
        sums = bin_sums(probability.numpy(), preferred.numpy(), bins=BINS).sum(0)
        return {
            "margin_calibration_error": float(expected_calibration_error(sums)),
            "margin_brier_score": float((probability - preferred).square().mean()),
            "margin_agrees_with_scores": float((0.5 + 0.5 * torch.sign(margin[decided] * score[decided])).mean()),
        }

    def _entanglement(self) -> dict[str, float]:
        wanted = self._entanglement_batches()
        if not wanted:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        loader: Iterable[Any] = DataLoader(
            self._evaluated_set, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator
        )
        found = [self._entangled(model, batch) for batch in itertools.islice(loader, wanted)]
        if not found:
            return {}
        names = {"cosine": "gradient_cosine", "over_chosen": "entanglement_over_chosen",
                 "over_rejected": "entanglement_over_rejected"}  # fmt: skip
        return {name: sum(getattr(one, key) for one in found) / len(found) for key, name in names.items()}

    def _entanglement_batches(self) -> int:
        """As set, and by default as many as memory and engine allow."""
        wanted, reason = self.diagnostics.entanglement_batches, None
        size = 2 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "a sharded engine holds no whole gradient"
        elif wanted is None and size > total_memory(self.accelerator.device) // GRADIENTS_SHARE:
            reason = f"two gradients take {size / 2**30:.1f} GiB; set diagnostics.entanglement_batches to have it"
        if reason is not None and wanted != 0:
            logger.info("Gradient entanglement is left out: %s.", reason)
        return 0 if reason is not None else DEFAULT_BATCHES if wanted is None else wanted

    def _entangled(self, model: nn.Module, batch: dict[str, Any]) -> Entanglement:
        """Gradients of both roles' mean log-probability, in evaluation mode; the parameters' own are left alone."""
        inputs: dict[str, Any] = self._prepare_inputs(batch)
        side: Side = inputs["side"]
        training = model.training
        model.eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        request = VocabRequest(
            side.target_index, side.targets, (StatisticsGroup(("logp",)),), backend=self.kernel.backend
        )
        with torch.enable_grad(), self.compute_loss_context_manager():
            plain = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
            logp = model(**plain, vocab_request=request).statistics[0]["logp"]
            sums = [logp[side.roles[role].tokens].sum() / side.size("pairs") for role in ROLES]
        gradients: list[list[Tensor]] = []
        for index, total in enumerate(sums):
            some = torch.autograd.grad(total, parameters, retain_graph=index == 0, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, some, strict=True)])
        model.train(training)
        return entanglement(*gradients)
