"""``posttrain evaluate CONFIG``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.cli.output import console
from posttrain.cli.train import print_paths
from posttrain.config import EvaluationConfig, load, resolve
from posttrain.config.unlearning import SUITES


def evaluate(path: str, overrides: Sequence[str], suites: Sequence[str] | None = None) -> None:
    """Evaluate the configuration's model and print one table.

    Args:
        path: YAML file.
        overrides: of its keys.
        suites: keys of ``evaluation`` that alone are evaluated; None for all that it names.

    Raises:
        ValueError: the file has no block for a suite.
    """
    config = resolve(load(path, overrides), name=Path(path).stem)
    if suites is not None:
        config.evaluation = only(config.evaluation, suites)

    from posttrain import pipeline

    found = pipeline.evaluate_only(config)
    if found is not None:
        report, paths = found
        console().print(report.table())
        print_paths(paths)


def only(settings: EvaluationConfig, suites: Sequence[str]) -> EvaluationConfig:
    """The settings with nothing to measure on but these suites."""
    for suite in suites:
        if getattr(settings, suite) is None:
            raise ValueError(f"--suite {suite} needs the block evaluation.{suite}, which names its data; add it.")
    nothing: dict[str, Any] = {name: None for name in ("data", "harness", *SUITES) if name not in suites}
    return dataclasses.replace(settings, **nothing)
