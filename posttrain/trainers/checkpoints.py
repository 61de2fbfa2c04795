"""What a run remembers beside its policy, in its checkpoints: objectives' states, and a reference that follows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model, save_model

from posttrain.trainers.coupling import States

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object

STATE_FILE = "objective_state.json"
REFERENCE_FILE = "reference.safetensors"


class StatesInCheckpoints(Host):
    """The part of `posttrain.trainers.base.ObjectiveMixin` that saves and restores `States`."""

    states: States

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self._remembered()
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        self._remember(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def _remembered(self) -> dict[str, Any]:
        """What goes into the checkpoint; nothing is written where it is empty."""
        return self.states.state_dict()

    def _remember(self, saved: dict[str, Any]) -> None:
        self.states.load_state_dict(saved)


class ReferenceInCheckpoints(Host):
    """The part of `posttrain.trainers.referenced.ReferencedMixin` that saves and restores a reference which follows."""

    ref_model: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        args: Any = self.args
        if args.sync_ref_model and args.should_save and not args.save_only_model and not self._reference_is_sharded():
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            save_model(self.accelerator.unwrap_model(self.ref_model), str(folder / REFERENCE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also the reference, where ``trainer.sync_ref_model`` is true.

        Raises:
            ValueError: the checkpoint holds none, or an engine shards the reference.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        args: Any = self.args
        if checkpoint is None or not args.sync_ref_model:
            return
        if self._reference_is_sharded():
            raise ValueError(
                "trainer.sync_ref_model is true, and a reference that FSDP or ZeRO-3 shards is not kept in "
                "checkpoints; resume without sharding, or start the run anew."
            )
        path = Path(checkpoint) / REFERENCE_FILE
        if not path.exists():
            raise ValueError(
                f"trainer.sync_ref_model is true, and {checkpoint!r} holds no {REFERENCE_FILE}: the reference would "
                "start again at the initial policy; resume from a checkpoint of a run under sync_ref_model that is "
                "not save_only_model, or set sync_ref_model to false."
            )
        load_model(self.accelerator.unwrap_model(self.ref_model), str(path))

    def _reference_is_sharded(self) -> bool:
        sharded = any(hasattr(parameter, "ds_id") for parameter in self.ref_model.parameters())
        return sharded or bool(self.is_fsdp_enabled)
