"""A whole comparison: evaluate the bases, tune, run the grid, and read what it left."""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import yaml

from posttrain import run_record
from posttrain.experiments.grid import PlannedRun
from posttrain.experiments.jobs import DONE_FILE, Job, differences
from posttrain.experiments.plan import SETTINGS_FILE, Plan, settings_tree
from posttrain.experiments.reading import metrics_of, read_base, read_run, status_of
from posttrain.experiments.results import Comparison
from posttrain.experiments.runner import Runner
from posttrain.experiments.tuning import best, measure

LOCK_FILE = ".lock"
_TOLD = ("budget", "objectives", "bases", "data", "seeds", "vary", "tune", "overrides_for")

MakeRunner = Callable[[Sequence[int]], Runner]


def execute(plan: Plan, make_runner: MakeRunner) -> None:
    """Run everything that is not done. A job that fails is left as failed, and those that need it are not started.

    Args:
        plan: of the comparison, not refused by `Plan.refuse_changes`.
        make_runner: from file descriptors that children are to hold, a runner.

    Raises:
        ValueError: another process runs in the folder, or tuning chose other values for a finished run than before.
        KeyboardInterrupt: children have been stopped; the next call goes on from there.
    """
    with _locked(plan) as lock:
        text = yaml.safe_dump(settings_tree(plan.config), sort_keys=False, allow_unicode=True)
        (plan.folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
        runner = make_runner([lock.fileno()])
        for job in plan.all_jobs:
            if job.is_done() and job.tree is not None:
                job.state, job.earlier = "done", True
        runner.run(list(plan.before.values()), plan.all_jobs)
        _skip_what_bases_cannot_do(plan)
        runner.run([job for _, job in plan.trials], plan.all_jobs)
        for _, job in plan.trials:
            run_record.remove_model(job.folder)
        choose(plan)
        for name, job in plan.jobs.items():
            if job.state == "waiting" and job.is_done():
                plan.refuse([f"{name}: {one}" for one in differences(job)])
                job.state, job.earlier = "done", True
        runner.run(list(plan.jobs.values()), plan.all_jobs)
        if not plan.config.keep_models:
            for job in plan.jobs.values():
                if job.is_done():
                    run_record.remove_model(job.folder)


def choose(plan: Plan) -> list[dict[str, Any]]:
    """Give every tuned run the best values of its group; runs of a group without any are failed.

    Returns:
        the table of trials, as in `Comparison.trials`.
    """
    tune = plan.config.tune
    if tune is None:
        return []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for trial, job in plan.trials:
        status, error = status_of(job.folder) if job.state != "not started" else ("failed", job.error)
        value = measure(metrics_of(job.folder), tune.metric) if status == "done" else None
        if status == "done" and value is None:
            status, error = "failed", f"its evaluation has no {tune.metric}"
        row = {
            "objective": trial.run.objective, "base": trial.run.base, "data": trial.run.data,
            "hyperparameters": dict(trial.values), "metric": tune.metric, "value": value,
            "status": status, "error": error, "chosen": False,
        }  # fmt: skip
        groups.setdefault(trial.run.group, []).append(row)
    for rows in groups.values():
        index = best([row["value"] for row in rows], tune.metric)
        # all of a group's trials must have ended before one of them is the best
        if index is not None and all(row["status"] != "missing" for row in rows):
            rows[index]["chosen"] = True
    for run in list(plan.runs):
        rows = groups[run.group]
        chosen = next((row for row in rows if row["chosen"]), None)
        if chosen is not None:
            plan.choose(run, chosen["hyperparameters"])
        elif all(row["status"] == "failed" for row in rows):
            _not_started(plan.jobs[run.name], f"every trial failed: {rows[0]['error']}")
    return [row for rows in groups.values() for row in rows]


def read(plan: Plan, command: str) -> Comparison:
    """What the folder holds, whether all of it is there or not.

    Args:
        plan: of the comparison.
        command: to repeat it.
    """
    trials = choose(plan)
    before = {
        key: read_base(job.folder, base=key[0], data=key[1], seed=plan.config.seeds[0])
        for key, job in plan.before.items()
    }
    runs = []
    for run in plan.runs:
        job = plan.jobs[run.name]
        found = read_run(job.folder, **_identity(run), before=before.get((run.base, run.data)))
        if found.status == "missing" and job.error is not None:
            found = dataclasses.replace(found, status="failed", error=job.error)
        runs.append(found)
    record = _record(plan)
    return Comparison(
        question=plan.config.question,
        settings=_settings(plan),
        runs=runs,
        before=before,
        trials=trials,
        command=command,
        versions={name: version for name, version in (record.get("versions") or {}).items() if version is not None},
        hardware=_hardware(record.get("hardware") or {}),
        date=_date(plan.all_jobs),
    )


@contextmanager
def _locked(plan: Plan) -> Iterator[IO[str]]:
    """The folder for this process alone. Children hold the lock as well: what a killed comparison left running keeps
    the next one out of its folders."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with (plan.folder / LOCK_FILE).open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps two comparisons apart
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output_dir {str(plan.folder)!r} is in use by another comparison, or by a run that one left behind; "
                "wait for it or stop it."
            ) from error
        yield file


def _skip_what_bases_cannot_do(plan: Plan) -> None:
    """What cannot be evaluated before training cannot be after it: a run would fail at its very end."""
    for key, job in plan.before.items():
        if job.state != "failed":
            continue
        error = f"the base cannot be evaluated: {job.error}"
        later = [one for trial, one in plan.trials if (trial.run.base, trial.run.data) == key]
        later += [plan.jobs[run.name] for run in plan.runs if (run.base, run.data) == key]
        for one in later:
            if one.state == "waiting" and not one.is_done():
                _not_started(one, error)


def _not_started(job: Job, error: str) -> None:
    if job.state == "waiting" and not job.is_done():
        job.state, job.error = "not started", error


def _identity(run: PlannedRun) -> dict[str, Any]:
    names = ("name", "objective", "base", "data", "seed", "hyperparameters")
    return {name: getattr(run, name) for name in names}


def _settings(plan: Plan) -> dict[str, Any]:
    """What decides the numbers: neither where the runs were placed, nor what of ``run`` the comparison replaces."""
    tree = settings_tree(plan.config)
    found = {key: tree[key] for key in _TOLD if tree[key]}
    if "budget" in found:
        found["budget"] = {key: value for key, value in found["budget"].items() if value is not None}
    replaced = {"output_dir", "seed", *(("max_steps",) if plan.config.budget is not None else ())}
    run = {key: value for key, value in tree["run"].items() if key != "objective"}
    run["trainer"] = {key: value for key, value in (run.get("trainer") or {}).items() if key not in replaced}
    steps = {f"{base}/{data}": count for (base, data), count in plan.steps.items() if count is not None}
    return {**found, "steps": steps, "run": run}


def _record(plan: Plan) -> Mapping[str, Any]:
    """run.json of a run that is done: where and with which versions it ran."""
    for job in reversed(plan.all_jobs):
        path = job.folder / run_record.RECORD_FILE
        if job.is_done() and path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {"versions": run_record.versions()}


def _hardware(found: Mapping[str, Any]) -> dict[str, str]:
    """In words."""
    words = {name: str(found[name]) for name in ("machine", "system", "cores") if found.get(name) is not None}
    if found.get("memory_bytes"):
        words["memory"] = f"{found['memory_bytes'] / 2**30:.0f} GiB"
    for index, device in enumerate(found.get("devices") or ()):
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device.get("memory_bytes") else ""
        words[f"device {index}"] = re.sub(r"\s+", " ", device["name"]) + memory
    return words


def _date(jobs: Sequence[Job]) -> str:
    """Of the newest result, today where there is none."""
    days = [json.loads((job.folder / DONE_FILE).read_text())["finished"][:10] for job in jobs if job.is_done()]
    return max(days, default=datetime.datetime.now(datetime.UTC).date().isoformat())
