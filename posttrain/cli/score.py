"""``posttrain score CONFIG``."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.output import print_rows
from posttrain.cli.train import print_paths
from posttrain.config import load, resolve


def score(path: str, overrides: Sequence[str]) -> None:
    """Write likelihood-ratio columns beside the configuration's training data and print their distribution."""
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain import scoring

    written, rows = scoring.score(config)
    header = ("column", "mean", "5 %", "median", "95 %")
    print_rows(f"Scores of {len(rows)} rows (nats)", header, scoring.summary(rows))
    print_paths({"scored rows": written})
