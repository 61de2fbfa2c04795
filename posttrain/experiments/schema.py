"""The dataclasses behind ``configs/compare/*.yaml``, and reading them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.inputs import REST
from posttrain.config.load import build, override, read_file
from posttrain.config.values import expand


@dataclass(kw_only=True)
class BudgetConfig:
    """``budget:``: what every run may spend; one of the two.

    Args:
        steps: optimizer steps (``trainer.max_steps``).
        tokens: tokens the model reads in training; the steps follow from a count over the training rows.
    """

    steps: int | None = None
    tokens: int | None = None


@dataclass(kw_only=True)
class TuneConfig:
    """``tune:``: a search that every objective gets alike, before its runs; the tried keys stand beside these.

    Each key of a run's configuration, dotted as on the command line, is given the list of values to try:
    ``tune: {trainer.learning_rate: [1e-4, 1e-3], metric: nll}``.

    Args:
        trials: runs per objective, base and data: the first combinations of the values, or where there are more, a
            seeded choice among them, the same for every objective. None tries every combination.
        on: ``validation``: tasks are measured on their validation split, files and hub sets on the last tenth of the
            training rows, which trials then do not train on. ``evaluation``: what the runs are measured on, where there
            are no other rows, as in unlearning. Or a list of evaluation sources.
        metric: what decides, such as ``pass@1`` (the mean over the sources) or ``source/metric``.
        seed: of the trials' training and of the choice; None takes the first of ``seeds``.
    """

    trials: int | None = None
    on: str | list[Any] = "validation"
    metric: str = "nll"
    seed: int | None = None
    values: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclass(kw_only=True)
class CompareConfig:
    """A comparison: every objective on every base, data set and seed.

    Args:
        question: for the report's head.
        run: the configuration that all runs start from, as ``posttrain train`` takes it; ``include`` names a YAML file,
            relative to this one, whose keys it is laid over.
        budget: equal for all; None leaves ``run.trainer.max_steps`` or ``num_train_epochs`` to decide.
        objectives: label -> an objective as ``objective:`` takes it. In a mapping with a ``name``, ``grid: {alpha:
            [2, 10]}`` makes one objective of each combination, called ``label(alpha=2)``, ``label(alpha=10)``.
        bases: label -> ``model.name_or_path``, or keys of ``model:``; None takes ``run.model``.
        data: label -> ``train``, ``eval`` and ``evaluation`` (a list of sources, or keys of ``evaluation:``), laid over
            those of ``run``; a source with a path or task of its own replaces the other. None takes ``run.data``.
        seeds: each is ``trainer.seed`` of one run, and is added to ``data.train.seed`` where the data are a task's; in
            ``data.train.path`` of a file it stands for ``{seed}``, so that each seed may have rows of its own. The
            evaluation's seed and rows are the same for all.
        vary: dotted key of ``run`` -> values; every objective is run with each, called ``label(learning_rate=0.001)``.
        tune: None takes the settings as they stand.
        overrides_for: objective's label, with or without its grid's values -> dotted keys set for it alone.
        output_dir: of results and report; None is ``runs/compare/<name of the file>``.
        devices: one run at a time on each: CUDA indices (``"0,1"`` gives two to each run) or ``cpu``; None leaves the
            choice to accelerate, one run at a time.
        parallel: runs at a time on each entry of ``devices``; the CPU's cores are shared out among them.
        launch: accelerate's configuration file for each run; None is one process, or one for each GPU of an entry.
        keep_models: false removes a run's weights once it is evaluated; those of trials are never kept.
    """

    question: str = "Which objective should be used?"
    run: dict[str, Any] = field(default_factory=dict)
    budget: BudgetConfig | None = None
    objectives: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    vary: dict[str, list[Any]] = field(default_factory=dict)
    tune: TuneConfig | None = None
    overrides_for: dict[str, dict[str, Any]] = field(default_factory=dict)
    output_dir: str | None = None
    devices: list[int | str] | None = None
    parallel: int = 1
    launch: str | None = None
    keep_models: bool = True


def load(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read a comparison; ``run`` comes back with its ``include`` merged in.

    ``${NAME}`` in the runs' settings is left to the runs to expand, so that no secret and no place on this machine is
    written into the results.

    Args:
        path: YAML file.
        overrides: ``key.sub=value``, the value in YAML.

    Raises:
        ValueError: no such file, malformed YAML, an unknown key (the nearest known one is named), a value of another
            type, or settings that contradict each other.
    """
    file = Path(path)
    tree = read_file(file)
    for one in overrides:
        override(tree, one)
    config = build(CompareConfig, tree, "")
    config.run = _with_include(config.run, file.parent, (file.resolve(),))
    config.output_dir = expand(config.output_dir) or str(Path("runs") / "compare" / file.stem)
    config.launch = expand(config.launch)
    check(config)
    return config


def check(config: CompareConfig) -> None:
    """Raise a ValueError where a comparison's settings contradict each other."""
    if config.budget is not None and (config.budget.steps is None) == (config.budget.tokens is None):
        found = "neither" if config.budget.steps is None else "both"
        raise ValueError(f"budget has {found} of steps and tokens; give one of them.")
    for key in ("steps", "tokens"):
        amount = getattr(config.budget, key, None)
        if amount is not None and amount < 1:
            raise ValueError(f"budget.{key} is {amount}; give at least 1.")
    if config.parallel < 1:
        raise ValueError(f"parallel is {config.parallel}; give at least 1 run at a time.")
    if config.devices == []:
        raise ValueError("devices is empty; name CUDA devices or cpu, or leave it out.")
    if config.tune is not None:
        _check_tune(config.tune, config.vary)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``under`` with the keys of ``over`` laid on it, mapping by mapping; lists are replaced whole."""
    result: dict[str, Any] = copy.deepcopy(dict(under))
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def _with_include(tree: Mapping[str, Any], folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The tree over the file that it includes, which may include another."""
    rest = {key: value for key, value in tree.items() if key != "include"}
    if "include" not in tree:
        return rest
    file = (folder / expand(str(tree["include"]), "run.include")).resolve()
    if file in seen:
        raise ValueError(f"run.include: {file.name} includes itself; take one of the two out.")
    below = read_file(file)
    return merged(_with_include(below, file.parent, (*seen, file)), rest)


def _check_tune(tune: TuneConfig, vary: Mapping[str, Any]) -> None:
    if not tune.values:
        raise ValueError(
            "tune names nothing to try; give keys with values, such as trainer.learning_rate: [1e-4, 1e-3]."
        )
    for key, values in tune.values.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"tune.{key} is {values!r}; give the list of values to try.")
        if key in vary:
            raise ValueError(f"{key} stands in both tune and vary; tune chooses one value, vary runs all.")
    if tune.trials is not None and tune.trials < 1:
        raise ValueError(f"tune.trials is {tune.trials}; give at least 1, or leave it out for every combination.")
    if isinstance(tune.on, str) and tune.on not in ("validation", "evaluation"):
        raise ValueError(f"tune.on is {tune.on!r}; give validation, evaluation, or a list of evaluation sources.")
