"""A comparison's jobs: what runs before, in tuning and after it, and what an old results folder says against them."""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.config.values import expand, read_yaml
from posttrain.experiments.budget import TokenCounter
from posttrain.experiments.grid import PlannedRun, slug
from posttrain.experiments.grid import expand as expand_grid
from posttrain.experiments.jobs import Job, differences
from posttrain.experiments.schema import CompareConfig
from posttrain.experiments.tuning import Trial, trials

SETTINGS_FILE = "compare.yaml"
_SHOWN_DIFFERENCES = 12
# What every run of the grid is measured by, whatever its objective.
_MEASURED = ("model", "tokenizer", "data", "evaluation", "method")


class Plan:
    """All jobs of a comparison.

    Args:
        config: as loaded.
        processes: of each run's launch, for a budget in tokens.

    Attributes:
        runs: the grid; a tuned run's values are still missing in its tree.
        steps: (base, data) -> optimizer steps, where the configuration says how many.
        before: (base, data) -> evaluation of the base, where one is asked for.
        trials: tuning, with a job each.
        jobs: by the name of the run.

    Raises:
        ValueError: as in `posttrain.experiments.grid.expand`, `budget` and `tuning`.
    """

    def __init__(self, config: CompareConfig, processes: int = 1) -> None:
        self.config = config
        self.folder = Path(str(config.output_dir))
        self._counter = TokenCounter(processes)
        planned = expand_grid(config)
        self.before = self._before(planned)
        planned = [_without_before(run) for run in planned]
        self.runs = [self.with_budget(run) for run in planned]
        self.steps = {(run.base, run.data): _steps(run) for run in self.runs}
        self.trials: list[tuple[Trial, Job]] = []
        if config.tune is not None:
            for trial in trials(config.tune, planned, config.seeds):
                run = self.with_budget(trial.run)
                job = Job(f"trial {run.name}", "trial", self.folder / "trials" / run.name, run.tree, _labels(run))
                self.trials.append((trial, job))
        self.jobs = {
            run.name: Job(run.name, "run", self.folder / "runs" / run.name, self._known(run), _labels(run))
            for run in self.runs
        }

    @property
    def all_jobs(self) -> list[Job]:
        """In the order in which they are run."""
        return [*self.before.values(), *(job for _, job in self.trials), *self.jobs.values()]

    def with_budget(self, run: PlannedRun) -> PlannedRun:
        """The run with its steps, where the budget is in tokens."""
        budget = self.config.budget
        if budget is None or budget.tokens is None:
            return run
        tree = copy.deepcopy(run.tree)
        tree["trainer"]["max_steps"] = self._counter.steps(run, budget.tokens)
        return dataclasses.replace(run, tree=tree)

    def choose(self, run: PlannedRun, values: Mapping[str, Any]) -> None:
        """Give a run the values that tuning has found, and its job its configuration."""
        chosen = self.with_budget(run.with_settings(values))
        self.runs[[one.name for one in self.runs].index(run.name)] = chosen
        self.jobs[run.name].tree = chosen.tree

    def refuse_changes(self) -> None:
        """Raise a ValueError where finished results were made with other settings; nothing is changed on disk."""
        tune = self.config.tune
        tuned = () if tune is None else (*tune.values, "trainer.max_steps")
        found: list[str] = []
        for job in [*self.before.values(), *(job for _, job in self.trials)]:
            found += differences(job)
        for run in self.runs:
            # a tuned run's own values come from the trials, which were compared above
            stand_in = dataclasses.replace(self.jobs[run.name], tree=run.tree)
            found += differences(stand_in, ignored=tuned if self.jobs[run.name].tree is None else ())
        if any(job.is_done() for job in self.jobs.values()):
            found += self._tune_differences()
        self.refuse(found)

    def refuse(self, found: list[str]) -> None:
        """Raise a ValueError that lists the differences, if there are any."""
        found = list(dict.fromkeys(found))
        if not found:
            return
        more = f"; and {len(found) - _SHOWN_DIFFERENCES} more" if len(found) > _SHOWN_DIFFERENCES else ""
        raise ValueError(
            f"output_dir {str(self.folder)!r} holds runs made with other settings "
            f"({'; '.join(found[:_SHOWN_DIFFERENCES])}{more}); name another folder, remove this one, or set them back."
        )

    def _before(self, runs: list[PlannedRun]) -> dict[tuple[str, str], Job]:
        found: dict[tuple[str, str], Job] = {}
        for run in runs:
            evaluation = dict(run.tree["evaluation"])
            wanted = evaluation.pop("before", True)
            if not wanted or (run.base, run.data) in found:
                continue
            tree = {key: copy.deepcopy(run.tree[key]) for key in _MEASURED if key in run.tree}
            tree["evaluation"] = {key: value for key, value in evaluation.items() if key != "every"}
            tree["data"] = {key: value for key, value in tree["data"].items() if key == "eval"}
            labels = {"objective": "base", "base": run.base, "data": run.data, "seed": ""}
            name = slug(f"{run.base}-{run.data}")
            found[run.base, run.data] = Job(f"base {name}", "base", self.folder / "before" / name, tree, labels)
        return found

    def _known(self, run: PlannedRun) -> dict[str, Any] | None:
        return run.tree if self.config.tune is None else None

    def _tune_differences(self) -> list[str]:
        path = self.folder / SETTINGS_FILE
        stored = read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.exists() else None
        if stored is None:
            return []
        old, new = stored.get("tune") or {}, settings_tree(self.config).get("tune") or {}
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return [f"tune.{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in keys]


def settings_tree(config: CompareConfig) -> dict[str, Any]:
    """The comparison as plain data, with the YAML's keys."""
    tree = dataclasses.asdict(config)
    if config.tune is not None:
        tree["tune"] = {**tree["tune"].pop("values"), **tree["tune"]}
    return tree


def validate(plan: Plan) -> None:
    """Check every configuration that is still to run as `train` would, but for what only the data can tell.

    Raises:
        ValueError: an unknown key, a value of another type, or an objective or hyper-parameter that does not exist;
            the objective is named.
    """
    from posttrain.combination import parse
    from posttrain.config import from_tree

    checked: set[str] = set()
    trees = [(run.objective, run.tree) for run in plan.runs if not plan.jobs[run.name].is_done()]
    trees += [(trial.run.objective, job.tree) for trial, job in plan.trials if job.tree and not job.is_done()]
    for objective, tree in trees:
        unseeded = {**tree, "trainer": {**tree["trainer"], "seed": 0}}
        if (text := repr((unseeded, objective))) in checked:
            continue
        checked.add(text)
        try:
            read = from_tree(expand(tree))
            _check_objective(parse(read.objective).terms if read.method == "unlearning" else read.objective)
        except ValueError as error:
            raise ValueError(f"{objective}: {error}") from error


def _check_objective(objective: Any) -> None:
    """Raise a ValueError where an objective works with no data: not with all optional columns, nor with one left out,
    as where two of them are alternatives."""
    from posttrain import objectives
    from posttrain.statistics import signature
    from posttrain.terms import Available, build_terms

    def build(*missing: str) -> None:
        build_terms(objective, Available(_Anything(missing), _Anything(), reference=True, teacher=True))

    try:
        build()
    except ValueError as error:
        for term in objective if isinstance(objective, list) else [objective]:
            name = term.get("name") if isinstance(term, Mapping) else term
            if name in objectives.names():
                for column in signature(objectives.get(str(name))).optional:
                    with suppress(ValueError):
                        return build(column)
        raise error


class _Anything(Collection[str]):
    """Holds every name but some: which columns and roles there are is known when the data are read."""

    def __init__(self, missing: Collection[str] = ()) -> None:
        self._missing = missing

    def __contains__(self, name: object) -> bool:
        return name not in self._missing

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _without_before(run: PlannedRun) -> PlannedRun:
    """The bases are evaluated once, not by every run."""
    return dataclasses.replace(run, tree={**run.tree, "evaluation": {**run.tree["evaluation"], "before": False}})


def _steps(run: PlannedRun) -> int | None:
    steps = run.tree["trainer"].get("max_steps")
    return int(steps) if steps is not None and int(steps) > 0 else None


def _labels(run: PlannedRun) -> dict[str, str]:
    return {"objective": run.objective, "base": run.base, "data": run.data, "seed": str(run.seed)}
