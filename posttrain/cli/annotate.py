"""``posttrain annotate KIND CONFIG``."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.train import print_paths
from posttrain.config import load, resolve
from posttrain.suggest import unknown

# Kind -> its function in `posttrain.annotation`, by name, since that package takes seconds to import.
KINDS = {
    "teacher-topk": "annotate_teacher_topk",
    "reward-margins": "annotate_reward_margins",
    "density-weights": "annotate_density_weights",
    "step-rewards": "annotate_step_rewards",
}


def annotate(kind: str, path: str, overrides: Sequence[str]) -> None:
    """Write columns beside the configuration's training data and print where they are.

    Raises:
        ValueError: an unknown kind, no ``annotation.output``, or what the kind itself refuses.
    """
    if kind not in KINDS:
        raise ValueError(unknown("kind of annotation", kind, KINDS))
    config = resolve(load(path, overrides), name=Path(path).stem)

    from posttrain import annotation

    print_paths({"annotated rows": getattr(annotation, KINDS[kind])(config)})
