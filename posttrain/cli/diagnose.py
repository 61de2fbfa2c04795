"""``posttrain diagnose CONFIG``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.cli.output import console, print_rows
from posttrain.cli.train import print_paths
from posttrain.config import load, resolve


def diagnose(path: str, overrides: Sequence[str]) -> None:
    """Look at a sample of the configuration's training data with its model; print tables and a recommendation."""
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain.diagnosis import run

    diagnosis = run.diagnose(config)
    found = diagnosis.found
    (_print_pairs if "pairs" in found else _print_tokens)(found)
    print()
    advice = diagnosis.advice
    console().print(f"Start with {advice.objective}: {advice.reason} [{advice.paper}]", markup=False, soft_wrap=True)
    print_paths(diagnosis.paths)


def _print_tokens(found: Mapping[str, Any]) -> None:
    target = found["target_probability"]
    levels = target["quantiles"]
    rows = [
        ("rows, trained tokens", f"{found['rows']}, {found['tokens']}"),
        ("mean target probability", f"{target['mean']:.4f} ({target['low']:.4f} to {target['high']:.4f})"),
        ("median (5 % to 95 %)", f"{levels['0.5']:.4g} ({levels['0.05']:.4g} to {levels['0.95']:.4g})"),
        ("on the capability continuum", found["region"]),
    ]
    rows += [
        (f"rows dropped at tolerance {tolerance}", f"{share:.1%}")
        for tolerance, share in found["rows_dropped_by_tolerance"].items()
    ]
    print_rows("The base on the training data", ("", ""), rows)
    print()
    silent = [(name, f"{share:.1%}") for name, share in found["silenced"].items()]
    print_rows("Tokens with less than 1 % of nll's pull", ("objective", "share"), silent)
    if "predicted" in found:
        print()
        steps = _grouped(found["predicted"]["steps"])
        print_rows(
            "Predicted for an optimizer step on one device", ("head", "time", "peak memory", "objectives"), steps
        )


def _grouped(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One row for all objectives that cost the same."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        cost = step["path"], f"{step['seconds']:.3g} s", f"{step['memory_bytes'] / 2**30:.2f} GiB"
        groups.setdefault(cost, []).append(step["objective"])
    return [(*cost, ", ".join(names)) for cost, names in groups.items()]


def _print_pairs(found: Mapping[str, Any]) -> None:
    pairs = found["pairs"]
    margin, length, agrees = pairs["base_margin"], pairs["length"], pairs["base_agrees"]
    rows = [
        ("pairs", str(pairs["pairs"])),
        ("base's log-prob margin", f"{margin['mean']:.4g} ({margin['low']:.4g} to {margin['high']:.4g}) nats"),
        ("base prefers the chosen", f"{agrees['mean']:.1%} ({agrees['low']:.1%} to {agrees['high']:.1%})"),
        ("tokens, chosen and rejected", f"{length['chosen']:.1f}, {length['rejected']:.1f}"),
        ("chosen is longer", f"{length['chosen_longer']:.1%} of those that differ"),
        ("shared beginning", f"{pairs['shared_prefix']:.1%} of the shorter answer"),
    ]
    if "scores" in pairs:
        scores = pairs["scores"]
        rows.append(("scores contradict the label", f"{scores['disagree']:.1%}, tie {scores['ties']:.1%}"))
    print_rows("The pairs", ("", ""), rows)
