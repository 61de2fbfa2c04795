"""``posttrain train CONFIG``."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.cli.output import console
from posttrain.config import load, resolve


def train(path: str, overrides: Sequence[str]) -> int:
    """Train and print the before/after table and where everything is.

    Returns:
        0, or 1 where the loss stopped being finite.
    """
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain import pipeline
    from posttrain.evaluation import comparison_table
    from posttrain.trainers import NonFiniteLossError

    try:
        outcome = pipeline.train(config)
    except NonFiniteLossError as error:
        # in one line, also where nobody looks at a window: `compare` reads it from the log
        print(f"posttrain: {error}", file=sys.stderr)
        return 1
    if outcome.before is not None and outcome.after is not None:
        console().print(comparison_table(outcome.before, outcome.after))
    elif outcome.after is not None:
        console().print(outcome.after.table())
    if outcome.is_main_process:
        print_paths(outcome.paths)
    return 0


def print_paths(paths: Mapping[str, Path]) -> None:
    """One line a file, name first."""
    width = max(map(len, paths))
    for name, path in paths.items():
        print(f"{name.ljust(width)}  {path}")
