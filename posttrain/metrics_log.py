"""metrics.jsonl: one JSON object per logged step, and the training curves drawn from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Drawn where they were logged, in this order; an eval_ series shares the panel of its training series.
PANELS: Mapping[str, str] = {
    "loss": "loss",
    "mean_target_probability": "mean target probability",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy (nats)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
_COLUMNS = 3


class MetricsLog(TrainerCallback):
    """Appends what the trainer logs to a file, on the main process; a resumed run first drops the lines it repeats."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [line for line in read(self.path) if line["step"] <= state.global_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "epoch": state.epoch, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The logged lines, oldest first; none where there is no file. A last line that a kill cut short is left out."""
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_curves(lines: list[dict[str, Any]], path: str | Path) -> Path | None:
    """Draw every series of `PANELS` that was logged over the optimizer steps; None where there was none.

    Args:
        lines: of `read`.
        path: file to write, format by suffix.
    """
    from matplotlib.figure import Figure

    drawn = [name for name in PANELS if any(name in line or f"eval_{name}" in line for line in lines)]
    if not drawn:
        return None
    rows = -(-len(drawn) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel, name in zip(panels, drawn, strict=False):
        for series, label in ((name, "training"), (f"eval_{name}", "evaluation")):
            points = [(line["step"], line[series]) for line in lines if series in line]
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", label=label)
        panel.set(title=PANELS[name], xlabel="optimizer step")
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend()
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
    return Path(path)
