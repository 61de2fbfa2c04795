"""``posttrain compare CONFIG``."""

import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from posttrain.cli.output import console, print_rows
from posttrain.cli.train import print_paths
from posttrain.experiments import engine, live, runner, schema
from posttrain.experiments.jobs import LOG_FILE, Job, failure
from posttrain.experiments.plan import Plan, validate
from posttrain.experiments.reading import metrics_of
from posttrain.experiments.results import Comparison
from posttrain.experiments.tuning import measure
from posttrain.run_record import command

INTERRUPTED = 130


def compare(path: str, overrides: Sequence[str], *, report_only: bool = False, dry_run: bool = False) -> int:
    """Run what is missing of a comparison and write its report.

    Args:
        path: YAML file.
        overrides: of its keys.
        report_only: nothing is run; the report is written from what there is.
        dry_run: the runs are checked and listed, and nothing is run or written.

    Returns:
        0, 1 where a run failed, 130 after Ctrl-C.
    """
    config = schema.load(path, overrides)
    places = runner.slots(config)
    plan = Plan(config, max(place.processes for place in places))
    plan.refuse_changes()
    if not report_only:
        validate(plan)
    if dry_run:
        _list(plan, places)
        return 0
    if not report_only:
        # a polite end stops the children as Ctrl-C does
        earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _execute(plan, places)
        except KeyboardInterrupt:
            console(stderr=True).print("Stopped; the same command goes on from here.", markup=False)
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, earlier)
    failed = _say_failures(plan)
    _report(engine.read(plan, shlex.join(command(without=("--report-only",)))), plan.folder)
    return 1 if failed else 0


def _execute(plan: Plan, places: Sequence[runner.Slot]) -> None:
    screen = console()
    newest = _newest(plan)
    plain = live.PlainLines(lambda line: screen.print(line, markup=False), newest)
    display = live.LiveTable(screen, newest) if screen.is_terminal else plain
    with display:
        engine.execute(plan, lambda keep: runner.Runner(places, display, keep=keep))


def _report(comparison: Comparison, folder: Path) -> None:
    from posttrain.experiments.report import write_report

    print_paths(write_report(comparison, folder))


def _newest(plan: Plan) -> Callable[[Job], str]:
    """A finished job's result: what tuning goes by, else the first metric of its evaluation."""
    wanted = plan.config.tune.metric if plan.config.tune is not None else None

    def newest(job: Job) -> str:
        metrics = metrics_of(job.folder)
        value = measure(metrics, wanted) if wanted is not None else None
        name = wanted if value is not None else next(iter(metrics), None)
        return "" if name is None else f"{name} {metrics.get(name, value):.4g}"

    return newest


def _list(plan: Plan, places: Sequence[runner.Slot]) -> None:
    rows = [
        (job.kind, job.name, "done" if job.is_done() else "to do", str(job.max_steps or ""), str(job.folder))
        for job in plan.all_jobs
    ]
    print_rows(plan.config.question, ("kind", "name", "state", "steps", "folder"), rows)
    print(f"{len(rows)} jobs, {len(places)} at a time.")


def _say_failures(plan: Plan) -> bool:
    """Print why jobs failed and where their logs are; whether there were any."""
    failed = [job for job in plan.all_jobs if job.state in ("failed", "not started")]
    screen = console(stderr=True)
    for job in failed:
        if job.state == "not started":
            screen.print(f"{job.name}: not started, {job.error}", markup=False)
            continue
        screen.print(f"{job.name} failed: {job.error} ({job.folder / LOG_FILE})", markup=False)
        screen.print("\n".join(f"    {line}" for line in failure(job.folder)[1]), markup=False)
    return bool(failed)
