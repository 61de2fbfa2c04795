"""Preference objectives on trl.DPOTrainer."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from trl import DPOConfig, DPOTrainer

from posttrain.config import DiagnosticsConfig
from posttrain.config.trainer import checked
from posttrain.data.preference_collation import PairCollator
from posttrain.data.preparation import AnyDataset, column_names, number_rows
from posttrain.data.scores import SCORES, score
from posttrain.modeling import check_shared_prefix
from posttrain.trainers.coupling import preserved_random_state
from posttrain.trainers.pair_diagnostics import SCORE_MARGIN, PairDiagnostics
from posttrain.trainers.prompt_sharing import check_setting, prompt_sharing
from posttrain.trainers.referenced import ReferencedMixin

logger = logging.getLogger(__name__)


class PreferenceTrainer(PairDiagnostics, ReferencedMixin, DPOTrainer):  # type: ignore[misc]
    """trl.DPOTrainer with any objective over named statistics of chosen and rejected completions.

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: TRL's own; rows hold
            ``prompt``, ``chosen`` and ``rejected``, and the columns that the objective names.
        objective: a name, a dotted path, a callable, a mapping with ``name``, ``weight``, ``role``, ``statistics`` and
            hyper-parameters, or a list of these, which is summed. ``role: chosen`` lets a supervised objective train
            on the chosen completions.
        kernel: a `KernelConfig` or a mapping of its keys.
        reference: ``cached``, ``adapter_off``, ``model``, ``none``, or ``auto``, which takes what the objective needs
            and costs least.
        shared_prefix: chosen and rejected in one row behind their prompt, which is computed once; ``auto`` does so in
            the micro-batches where it saves time, if the model allows it.
        diagnostics: a `DiagnosticsConfig` or a mapping of its keys. Where training evaluates, it does so before the
            first step as well (``eval_on_start``), so that changes are told from the start.

    Raises:
        ValueError: unknown objective, statistic, column or hyper-parameter; a TRL setting that ``objective`` or
            ``reference`` replaces; rows without a finite number in a column that the objective binds; ``shared_prefix``
            true for a model that cannot share prompts exactly.
    """

    _name = "posttrain-DPO"
    roles = ("chosen", "rejected")
    config_class = DPOConfig
    default_objective = "dpo"
    watched = (SCORE_MARGIN,)

    def _collator(self) -> PairCollator:
        theirs: Any = self.data_collator
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        self._shares_prompts = prompt_sharing(self._shared_prefix, models)
        return PairCollator(
            pad_token_id=theirs.pad_token_id,
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            columns=self._columns,
            watched=self.watched,
            shares_prompts=self._shares_prompts,
        )

    def _check_head_once(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        first = not self._head_checked
        super()._check_head_once(model, inputs)
        if first and self._shares_prompts is not None:
            with preserved_random_state(self.accelerator.device):
                check_shared_prefix(model, self.accelerator.device)

    def __init__(
        self,
        *args: Any,
        shared_prefix: bool | str = "auto",
        diagnostics: DiagnosticsConfig | Mapping[str, Any] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self._shared_prefix = check_setting(shared_prefix)
        if not isinstance(diagnostics, DiagnosticsConfig):
            diagnostics = DiagnosticsConfig(**checked(diagnostics or {}, DiagnosticsConfig, "diagnostics"))
        self._start_diagnostics(diagnostics)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: _with_margin(dataset, name) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = _with_margin(eval_dataset, "eval")
        train_dataset = _with_margin(train_dataset, "train")
        super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def _config(self, args: Any, model: Any) -> Any:
        args = super()._config(args, model)
        if args.eval_strategy != "no" and not args.eval_on_start:
            args.eval_on_start = True
            logger.info("trainer.eval_on_start is set to true: changes of log-probabilities are told from the start.")
        return args


def _with_margin(dataset: Any, name: str) -> Any:
    """With ``score_margin``, where the rows hold two scores and no margin between them."""
    if dataset is None:
        return None
    columns = set(column_names(dataset))
    if SCORE_MARGIN in columns or not any(set(both) <= columns for both in SCORES):
        return dataset
    return score(number_rows(dataset), key=f"the {name} data")
