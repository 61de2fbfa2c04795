"""What stateful objectives remember, in the checkpoints of a run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.trainers.coupling import States

if TYPE_CHECKING:
    from transformers import Trainer as Host
else:
    Host = object

STATE_FILE = "objective_state.json"


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
