"""``posttrain annotate KIND CONFIG``."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.train import print_paths
from posttrain.config import load, resolve
from posttrain.suggest import unknown

KINDS = ("teacher-topk",)


def annotate(kind: str, path: str, overrides: Sequence[str]) -> None:
    """Write columns beside the configuration's training data and print where they are.

    Raises:
        ValueError: an unknown kind, no ``annotation.output``, or what the kind itself refuses.
    """
    if kind not in KINDS:
        raise ValueError(unknown("kind of annotation", kind, KINDS))
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain.annotation import annotate_teacher_topk

    print_paths({"annotated rows": annotate_teacher_topk(config)})
