"""The same search for every objective, on rows that the comparison does not report."""

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.values import expand
from posttrain.experiments.grid import PlannedRun, Tree, evaluation_sources, slug
from posttrain.experiments.schema import TuneConfig
from posttrain.metric_direction import direction

# The part of a file's or hub set's training rows that trials are measured on, and do not train on.
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Trial:
    """One trial: what it tries, and the run that tries it."""

    number: int
    values: Mapping[str, Any]
    run: PlannedRun


def trials(tune: TuneConfig, runs: Sequence[PlannedRun], seeds: Sequence[int]) -> list[Trial]:
    """The trials of every objective, base and data set that the runs hold; each gets the same values to try.

    Args:
        runs: of the comparison.
        seeds: of the comparison.

    Raises:
        ValueError: there is no validation data for ``tune.on``, or ``tune.metric`` has no better direction.
    """
    if direction(tune.metric) == 0:
        raise ValueError(f"tune.metric is {tune.metric!r}, and more of it is neither better nor worse; name another.")
    seed = seeds[0] if tune.seed is None else tune.seed
    tried = values_to_try(tune, seed)
    first = {run.group: run for run in reversed(runs)}
    found = []
    for run in (first[group] for group in dict.fromkeys(one.group for one in runs)):
        on_validation = _on_validation(tune, run, seed)
        for number, values in enumerate(tried):
            name = slug(f"{run.objective}-{run.base}-{run.data}-trial{number}")
            found.append(Trial(number, values, on_validation.with_settings(values, name=name)))
    return found


def values_to_try(tune: TuneConfig, seed: int) -> list[dict[str, Any]]:
    """The combinations in the order of the lists, or a seeded choice of ``trials`` among them."""
    combinations = [dict(zip(tune.values, chosen, strict=True)) for chosen in itertools.product(*tune.values.values())]
    count = len(combinations) if tune.trials is None else tune.trials
    if count >= len(combinations):
        return combinations
    return [combinations[index] for index in sorted(random.Random(seed).sample(range(len(combinations)), count))]


def measure(metrics: Mapping[str, float], metric: str) -> float | None:
    """A metric of one evaluation; without a source in its name, the mean over the sources. None where it is missing."""
    if metric in metrics:
        return metrics[metric]
    found = [value for name, value in metrics.items() if name.rpartition("/")[2] == metric]
    return sum(found) / len(found) if found else None


def best(values: Sequence[float | None], metric: str) -> int | None:
    """Index of the best value, the first among equals; None where there is none."""
    sign = direction(metric)
    usable = [(sign * value, -index) for index, value in enumerate(values) if value is not None and value == value]
    return -max(usable)[1] if usable else None


def _on_validation(tune: TuneConfig, run: PlannedRun, seed: int) -> PlannedRun:
    """The run with the trials' seed, measured on validation rows."""
    tree = copy.deepcopy(run.tree)
    tree["trainer"]["seed"] = seed
    train: Tree = tree["data"].get("train") or {}
    if train.get("task") is not None:
        train["seed"] = int(train.get("seed") or 0) - run.seed + seed
    # what is known outside, such as the tasks of lm-evaluation-harness, has test rows alone
    evaluation = {**tree["evaluation"], "every": None, "harness": None}
    if isinstance(tune.on, list):
        evaluation["data"] = copy.deepcopy(tune.on)
    elif tune.on == "validation":
        if not train:
            raise ValueError("tune.on is validation, and data.train is missing; set it to evaluation, or to sources.")
        evaluation["data"] = _validation(evaluation_sources(tree), train)
    tree["evaluation"] = evaluation
    return PlannedRun(run.name, run.objective, run.base, run.data, seed, tree, run.hyperparameters)


def _validation(sources: Sequence[Mapping[str, Any]], train: Tree) -> list[Tree]:
    """Validation rows in place of test rows; rows held out of a file are taken out of ``train``."""
    found: list[Tree] = []
    held_out: Tree | None = None
    for source in sources:
        if source.get("task") is not None:
            found.append({**source, "split": "validation"})
        elif held_out is None:
            held_out = _hold_out(source, train)
            found.append(held_out)
    if not found:
        raise ValueError("tune.on is validation, and run.evaluation.data has no rows; give tune.on a list of sources.")
    return found


def _hold_out(source: Mapping[str, Any], train: Tree) -> Tree:
    split, path = str(train.get("split", "train")), expand(str(train.get("path")))
    saved = any((Path(path) / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    if train.get("path") is None or "[" in split or train.get("streaming") or saved:
        raise ValueError(
            f"tune.on is validation, and no rows can be held out of data.train (path {train.get('path')!r}, split "
            f"{split!r}): it must be a whole file or hub set, not streamed; give tune.on a list of evaluation sources."
        )
    share = 100 - HELD_OUT_PERCENT
    rest: Tree = {key: train[key] for key in ("path", "name", "format", "columns", "template") if key in train}
    judged = {key: source[key] for key in ("verifier", "label", "limit") if key in source}
    train["split"] = f"{split}[:{share}%]"
    return {**rest, **judged, "split": f"{split}[{share}%:]"}
