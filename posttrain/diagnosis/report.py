"""What a diagnosis leaves behind: a JSON, a histogram, and a configuration to start from."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from posttrain.config import RunConfig, trainer_config_class
from posttrain.config.schema import without_secrets
from posttrain.diagnosis.advice import STRONG, WEAK, Advice

RESULT_FILE, PLOT_FILE, START_FILE = "diagnosis.json", "diagnosis.png", "start.yaml"
BINS = 20


def write(folder: Path, found: Mapping[str, Any], advice: Advice, config: RunConfig) -> dict[str, Path]:
    """Write all three files; what -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"diagnosis": folder / RESULT_FILE, "histogram": folder / PLOT_FILE, "to start with": folder / START_FILE}
    paths["diagnosis"].write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    figure = _margins(found["pairs"]) if "pairs" in found else _probabilities(found)
    figure.savefig(paths["histogram"], dpi=150)
    paths["to start with"].write_text(starting_yaml(config, advice, found), encoding="utf-8")
    return paths


def starting_yaml(config: RunConfig, advice: Advice, found: Mapping[str, Any]) -> str:
    """The configuration with the recommended objective, where it differs from the defaults; the reason stands above."""
    tree, default = without_secrets(config.to_tree()), RunConfig().to_tree()
    tree |= {name: default[name] for name in ("diagnosis", "scoring", "resume", "overwrite")}
    if "pairs" in found:
        known = {item.name for item in dataclasses.fields(trainer_config_class("preference"))}
        trainer = {key: value for key, value in tree["trainer"].items() if key in known}
        tree |= {"method": "preference", "trainer": trainer}
    short = _differing(tree, default) | {"objective": advice.objective}
    lines = [advice.reason, f"Paper: {advice.paper}."]
    if advice.compare:
        lines.append(f"Compare with {', '.join(json.dumps(one) for one in advice.compare)}.")
    comment = [f"# {part}" for line in lines for part in textwrap.wrap(line, 116)]
    return "\n".join([*comment, yaml.safe_dump(short, sort_keys=False, allow_unicode=True)])


def _differing(tree: Mapping[str, Any], default: Any) -> dict[str, Any]:
    known = default if isinstance(default, Mapping) else {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key in known and value == known[key]:
            continue
        found[key] = _differing(value, known.get(key)) if isinstance(value, Mapping) and known.get(key) else value
    return {key: _bare(value) for key, value in found.items()}


def _bare(value: Any) -> Any:
    """A source without the settings that it leaves open."""
    if isinstance(value, Mapping):
        return {key: _bare(one) for key, one in value.items() if one is not None and one != {}}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def _probabilities(found: Mapping[str, Any]) -> Figure:
    histogram, mean = found["target_probability"]["histogram"], found["target_probability"]["mean"]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    share = np.asarray(histogram["counts"]) / max(1, sum(histogram["counts"]))
    panel.bar(histogram["edges"][:-1], share, width=1 / BINS, align="edge", color="tab:blue", edgecolor="white")
    panel.axvline(mean, color="tab:red", label=f"mean {mean:.3f}")
    for edge, name in ((WEAK, "weak below"), (STRONG, "strong above")):
        panel.axvline(edge, color="tab:gray", linestyle="--", label=f"{name} {edge:g}")
    panel.set(xlabel="probability of the target token under the base", ylabel="share of tokens", xlim=(0, 1))
    panel.legend()
    panel.grid(alpha=0.3)
    return figure


def _margins(pairs: Mapping[str, Any]) -> Figure:
    histogram, mean = pairs["histogram"], pairs["base_margin"]["mean"]
    edges = np.asarray(histogram["edges"])
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.bar(edges[:-1], histogram["counts"], width=np.diff(edges), align="edge", color="tab:blue", edgecolor="white")
    panel.axvline(mean, color="tab:red", label=f"mean {mean:.3g}")
    panel.axvline(0, color="tab:gray", linestyle="--")
    panel.set(xlabel="log p(chosen) - log p(rejected) under the base (nats)", ylabel="pairs")
    panel.legend()
    panel.grid(alpha=0.3)
    return figure


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise a ValueError where the folder holds a diagnosis that is not to be replaced."""
    if (folder / RESULT_FILE).exists() and not overwrite:
        raise ValueError(
            f"trainer.output_dir {str(folder)!r} already holds a diagnosis ({RESULT_FILE}); name another folder, or "
            "set overwrite=true to replace it."
        )
