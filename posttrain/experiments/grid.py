"""From a comparison's settings to the runs it consists of, each with its whole configuration."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.load import assign
from posttrain.config.schema import SECRET_KEYS
from posttrain.experiments.schema import CompareConfig, merged
from posttrain.suggest import unknown

Tree = dict[str, Any]

# What a budget decides, and may not differ between objectives.
_SPENT = ("trainer.max_steps", "trainer.num_train_epochs")
_ROWS_A_STEP = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
_DATA_KEYS = ("train", "eval", "evaluation")
# What says which objective it is; unlearning has a preset, or a forget term among others.
_NAMED_BY = ("name", "preset", "forget")
# Parts of `evaluation` that bring rows of their own.
_SUITES = ("harness", "tofu", "muse", "audit")


@dataclass(frozen=True)
class Variant:
    """One objective of the comparison, a grid's and ``vary``'s values applied.

    Args:
        label: with the values, such as ``power(alpha=2)``.
        objective: for ``objective:`` of the run.
        settings: dotted keys -> values that are set for it alone.
        hyperparameters: its own settings by name, the dotted keys in full.
    """

    label: str
    objective: Any
    settings: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid.

    Args:
        name: unique, and fit for a folder.
        objective, base, data: labels.
        tree: the run's configuration without its output folder, as `posttrain.config.from_tree` reads it.
        hyperparameters: as in `posttrain.experiments.results.RunResult`.
    """

    name: str
    objective: str
    base: str
    data: str
    seed: int
    tree: Tree
    hyperparameters: Mapping[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        """What is tuned together: objective, base and data."""
        return self.objective, self.base, self.data

    def with_settings(self, settings: Mapping[str, Any], **changes: Any) -> "PlannedRun":
        """The run with dotted keys set, among its hyper-parameters too."""
        tree = copy.deepcopy(self.tree)
        for key, value in settings.items():
            assign(tree, key, copy.deepcopy(value), f"the setting {key}={value!r} of {self.objective}")
        return dataclasses.replace(self, tree=tree, hyperparameters={**self.hyperparameters, **settings}, **changes)


def expand(config: CompareConfig) -> list[PlannedRun]:
    """Every run of the comparison: base by base, data set by data set, objective by objective, seed by seed.

    ``trainer.max_steps`` is set for a budget in steps; for one in tokens see `posttrain.experiments.budget`.

    Raises:
        ValueError: there is no run in the grid, two runs have one name, an unknown key or label, nothing to train or
            to evaluate on, a token written out, or a setting that would give objectives unequal budgets.
    """
    for key in ("objectives", "seeds", "bases", "data"):
        if getattr(config, key) is not None and not getattr(config, key):
            raise ValueError(f"{key} is empty, so that the comparison has no run in it; name at least one.")
    found = variants(config)
    _check_fairness(config, found)
    runs = [
        _planned(config, variant, base, data, seed)
        for base, data, variant, seed in itertools.product(
            _bases(config).items(), _data(config).items(), found, config.seeds
        )
    ]
    _check_names(runs)
    for run in runs:
        _check_secrets(run.tree, "run")
        trained = "forget" if run.tree.get("method") == "unlearning" else "train"
        if run.tree.get("data", {}).get(trained) is None:
            raise ValueError(f"run.data.{trained} is missing for data {run.data!r}; name a path or a task to train on.")
        if not evaluation_sources(run.tree) and not any(run.tree["evaluation"].get(name) for name in _SUITES):
            raise ValueError(f"run.evaluation.data is missing for data {run.data!r}; name what to compare the runs on.")
    return runs


def variants(config: CompareConfig) -> list[Variant]:
    """The objectives with their grids and with ``vary``."""
    found: list[Variant] = []
    for label, spec in config.objectives.items():
        grid = spec.get("grid") if isinstance(spec, Mapping) else None
        for chosen in _combinations(grid or {}, f"objectives.{label}.grid"):
            for varied in _combinations(config.vary, "vary"):
                found.append(_variant(config, label, spec, chosen, varied))
    known = [*config.objectives, *(variant.label for variant in found)]
    for label in config.overrides_for:
        if label not in known:
            raise ValueError(unknown("objective in overrides_for", label, dict.fromkeys(known)))
    return found


def evaluation_sources(tree: Mapping[str, Any]) -> list[Tree]:
    """What a run's configuration is evaluated on; `posttrain.config.resolve` falls back in the same way."""
    sources = (tree.get("evaluation") or {}).get("data")
    if sources is None:
        held_out = (tree.get("data") or {}).get("eval")
        return [] if held_out is None else [held_out]
    return list(sources)


def slug(text: str) -> str:
    """The text as a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")


def _variant(
    config: CompareConfig, label: str, spec: Any, chosen: Mapping[str, Any], varied: Mapping[str, Any]
) -> Variant:
    if isinstance(spec, Mapping):
        if spec.keys().isdisjoint(_NAMED_BY):
            raise ValueError(f"objectives.{label} has no name; say which objective of `posttrain list` it is.")
        objective: Any = {key: value for key, value in spec.items() if key != "grid"} | dict(chosen)
        own = {key: value for key, value in objective.items() if key not in _NAMED_BY}
    elif isinstance(spec, str | list):
        objective, own = copy.deepcopy(spec), {}
    else:
        raise ValueError(f"objectives.{label} is {spec!r}; give a name, a mapping with a name, or a list of terms.")
    short = {key: key.rpartition(".")[2] for key in varied}
    names = [*chosen, *short.values()]
    shown = dict(chosen) | {name if names.count(name) == 1 else key: varied[key] for key, name in short.items()}
    full = f"{label}({', '.join(f'{key}={_text(value)}' for key, value in shown.items())})" if shown else label
    overrides = {**config.overrides_for.get(label, {}), **(config.overrides_for.get(full, {}) if shown else {})}
    settings = {**varied, **overrides}
    return Variant(full, objective, settings, {**own, **settings})


def _planned(
    config: CompareConfig, variant: Variant, base: tuple[str, Tree], data: tuple[str, Tree], seed: int
) -> PlannedRun:
    tree = copy.deepcopy(config.run)
    tree["model"] = base[1]
    tree |= copy.deepcopy(data[1])
    tree["objective"] = copy.deepcopy(variant.objective)
    tree["trainer"] = {**(tree.get("trainer") or {}), "seed": seed}
    tree["trainer"].pop("output_dir", None)
    if config.budget is not None and config.budget.steps is not None:
        tree["trainer"]["max_steps"] = config.budget.steps
    name = slug(f"{variant.label}-{base[0]}-{data[0]}-seed{seed}")
    run = PlannedRun(name, variant.label, base[0], data[0], seed, tree, {})
    run = run.with_settings(variant.settings)
    # after the overrides, which may bring data of their own
    train = (run.tree.get("data") or {}).get("train")
    if isinstance(train, dict) and train.get("task") is not None:
        train["seed"] = int(train.get("seed") or 0) + seed
    elif isinstance(train, dict) and train.get("path") is not None:
        train["path"] = str(train["path"]).replace("{seed}", str(seed))
    return dataclasses.replace(run, hyperparameters=variant.hyperparameters)


def _bases(config: CompareConfig) -> dict[str, Tree]:
    own = dict(config.run.get("model") or {})
    if config.bases is None:
        return {Path(str(own.get("name_or_path", "tiny-base"))).name: own}
    found = {}
    for label, base in config.bases.items():
        if not isinstance(base, str | Mapping):
            raise ValueError(f"bases.{label} is {base!r}; give a name or path, or keys of model.")
        found[label] = merged(own, {"name_or_path": base} if isinstance(base, str) else base)
    return found


def _data(config: CompareConfig) -> dict[str, Tree]:
    """Label -> the ``data`` and ``evaluation`` parts of a run's configuration."""
    data = dict(config.run.get("data") or {})
    evaluation = {**(config.run.get("evaluation") or {})}
    if config.data is None:
        train = data.get("train") or data.get("forget") or {}
        label = train.get("task") or Path(str(train.get("path", "data"))).name.partition(".")[0]
        return {label: {"data": data, "evaluation": evaluation}}
    found = {}
    for label, over in config.data.items():
        if not isinstance(over, Mapping):
            raise ValueError(f"data.{label} is {over!r}; give keys among {', '.join(_DATA_KEYS)}.")
        for key in over:
            if key not in _DATA_KEYS:
                raise ValueError(unknown(f"key of data.{label}", key, _DATA_KEYS))
        sources = dict(data)
        for key in ("train", "eval"):
            if key in over:
                sources[key] = _source(sources.get(key), over[key])
        wanted = over.get("evaluation", {})
        measured = merged(evaluation, {"data": wanted} if isinstance(wanted, list) else wanted or {})
        found[label] = {"data": sources, "evaluation": measured}
    return found


def _source(under: Mapping[str, Any] | None, over: Any) -> Any:
    """A source with keys laid over it; one that names other rows replaces it."""
    if under is None or not isinstance(over, Mapping) or "path" in over or "task" in over:
        return over
    return merged(under, over)


def _combinations(values: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{key} is {values!r}; give names with lists of values.")
    for name, options in values.items():
        if not isinstance(options, list):
            raise ValueError(f"{key}.{name} is {options!r}; give the list of its values.")
        if not options:
            raise ValueError(
                f"{key}.{name} is empty, so that the comparison has no run in it; name at least one value."
            )
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_fairness(config: CompareConfig, found: Sequence[Variant]) -> None:
    """Raise where an objective would spend more than another, or be measured otherwise."""
    budget = config.budget
    fixed = () if budget is None else _SPENT if budget.steps is None else (*_SPENT, *_ROWS_A_STEP)
    places = {f"objective {variant.label}": variant.settings for variant in found}
    if config.tune is not None:
        places["tune"] = config.tune.values
    for place, settings in places.items():
        for key in settings:
            if key in fixed:
                raise ValueError(
                    f"{key} is set for {place}, and the budget is equal for all; leave it to run, or leave out budget."
                )
            if key.partition(".")[0] == "evaluation":
                raise ValueError(f"{key} is set for {place}, and all runs are evaluated alike; set it in run.")


def _check_names(runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        # folders of one name, where the file system does not tell capitals apart
        other = seen.setdefault(run.name.lower(), run)
        if other is not run:
            one, two = (f"{each.objective}, {each.base}, {each.data}, seed {each.seed}" for each in (other, run))
            raise ValueError(f"two runs have the name {run.name!r}: ({one}) and ({two}); give them other labels.")


def _check_secrets(tree: Any, key: str) -> None:
    """A comparison writes its runs' configurations to disk: secrets must come from the environment."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in SECRET_KEYS and isinstance(value, str) and not value.startswith("${"):
                raise ValueError(f"{key}.{name} is written out; a comparison stores its settings: write ${{HF_TOKEN}}.")
            _check_secrets(value, f"{key}.{name}")
