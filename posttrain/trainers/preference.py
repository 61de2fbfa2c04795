"""Preference objectives on trl.DPOTrainer."""

from typing import Any

from trl import DPOConfig, DPOTrainer

from posttrain.data.preference_collation import PairCollator
from posttrain.side import Side
from posttrain.trainers.coupling import Computed
from posttrain.trainers.metrics import MetricSums
from posttrain.trainers.referenced import ReferencedMixin


class PreferenceTrainer(ReferencedMixin, DPOTrainer):  # type: ignore[misc]
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

    Raises:
        ValueError: unknown objective, statistic, column or hyper-parameter; a TRL setting that ``objective`` or
            ``reference`` replaces; rows without a finite number in a column that the objective binds.
    """

    _name = "posttrain-DPO"
    roles = ("chosen", "rejected")
    config_class = DPOConfig
    default_objective = "dpo"

    def _collator(self) -> PairCollator:
        theirs: Any = self.data_collator
        return PairCollator(
            pad_token_id=theirs.pad_token_id, pad_to_multiple_of=theirs.pad_to_multiple_of, columns=self._columns
        )

    def _log_tokens(self, computed: Computed, side: Side, sums: MetricSums) -> None:
        super()._log_tokens(computed, side, sums)
