"""``posttrain evaluate CONFIG``."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.output import console
from posttrain.cli.train import print_paths
from posttrain.config import load, resolve


def evaluate(path: str, overrides: Sequence[str]) -> None:
    """Evaluate the configuration's model and print one table."""
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain import pipeline

    found = pipeline.evaluate_only(config)
    if found is not None:
        report, paths = found
        console().print(report.table())
        print_paths(paths)
