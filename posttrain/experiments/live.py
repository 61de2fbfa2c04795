"""What is shown while jobs run: a table on a terminal, lines elsewhere."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from posttrain.experiments.jobs import Job, State
from posttrain.run_record import METRICS_FILE

# Enough for several logged lines.
_TAIL_BYTES = 1 << 14
_STYLES: dict[State, str] = {
    "running": "bold",
    "done": "green",
    "failed": "red",
    "waiting": "dim",
    "not started": "red",
}
# Rows of the terminal that the table's own lines take.
_FRAME = 7

Newest = Callable[[Job], str]


class LiveTable:
    """A table of all jobs, drawn anew while they run.

    Args:
        console: a terminal.
        newest: a finished job -> its most telling result.
    """

    def __init__(self, console: Console, newest: Newest) -> None:
        self._console, self._newest = console, newest
        self._results: dict[str, str] = {}
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._jobs: Sequence[Job] = ()
        self._drawn = 0.0

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._table(self._jobs), refresh=True)
        self._live.stop()

    def update(self, jobs: Sequence[Job]) -> None:
        """Draw the table, at most once a second."""
        self._jobs = jobs
        now = time.monotonic()
        if now - self._drawn >= 1:
            self._drawn = now
            self._live.update(self._table(jobs), refresh=True)

    def _table(self, jobs: Sequence[Job]) -> Table:
        table = Table(title=summary(jobs), title_justify="left", caption_justify="left")
        shown = _fitting(jobs, self._console.height - _FRAME)
        names = [name for name in jobs[0].labels if len({job.labels.get(name) for job in jobs}) > 1] if jobs else []
        for name in ("", *names, "state", "progress", "left", "newest"):
            table.add_column(name, overflow="fold")
        for job in shown:
            step = last_logged(job.folder) if job.state == "running" else {}
            labels = (job.labels.get(name, "").replace("[", r"\[") for name in names)
            state = "done before" if job.earlier else job.state
            table.add_row(
                job.kind,
                *labels,
                f"[{_STYLES[job.state]}]{state}[/]",
                progress(job, step),
                duration(time_left(job, step)),
                self._result(job, step).replace("[", r"\["),
            )
        if len(shown) < len(jobs):
            table.caption = f"{len(jobs) - len(shown)} more"
        return table

    def _result(self, job: Job, step: dict[str, Any]) -> str:
        if job.state == "running":
            return _logged(step)
        if job.state == "done":
            if job.name not in self._results:
                self._results[job.name] = self._newest(job)
            return self._results[job.name]
        return job.error or ""


class PlainLines:
    """One line for each change of a job's state, and now and then one on how far it is.

    Args:
        say: prints a line.
        newest: a finished job -> its most telling result.
        every: seconds between lines on one running job.
    """

    def __init__(self, say: Callable[[str], None], newest: Newest, every: float = 60.0) -> None:
        self._say, self._newest, self._every = say, newest, every
        self._states: dict[str, State] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, jobs: Sequence[Job]) -> None:
        """Print what has changed."""
        now = time.monotonic()
        for job in jobs:
            if self._states.get(job.name, "waiting") != job.state:
                self._states[job.name] = job.state
                self._said[job.name] = now
                self._say(f"{job.name}: {self._change(job)}")
            elif job.state == "running" and now - self._said[job.name] >= self._every:
                self._said[job.name] = now
                step = last_logged(job.folder)
                self._say(f"{job.name}: {progress(job, step)}, {duration(time_left(job, step))} left, {_logged(step)}")

    def _change(self, job: Job) -> str:
        if job.state == "done":
            return "done before" if job.earlier else f"done in {duration(job.seconds)}, {self._newest(job)}"
        return f"{job.state}, {job.error}" if job.error else job.state


def summary(jobs: Sequence[Job]) -> str:
    """How many jobs are where, and the time left if the rest take as long as those that ended."""
    counts = {state: sum(job.state == state for job in jobs) for state in _STYLES}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    ended = [job.seconds for job in jobs if job.seconds is not None and job.kind != "base"]
    running = max(1, counts["running"])
    left = [job for job in jobs if job.state in ("waiting", "running") and job.kind != "base"]
    if not ended or not left:
        return text
    mean = sum(ended) / len(ended)
    spent = sum(min(mean, time.monotonic() - job.started) for job in left if job.started is not None)
    return f"{text}; about {duration((mean * len(left) - spent) / running)} left"


def progress(job: Job, step: dict[str, Any]) -> str:
    """Steps done of all."""
    if job.state != "running" or job.kind == "base":
        return ""
    done = step.get("step", 0)
    return f"{done}/{job.max_steps}" if job.max_steps else f"step {done}"


def time_left(job: Job, step: dict[str, Any]) -> float | None:
    """Seconds until a running job's last step, by its pace so far."""
    if job.started is None or not job.max_steps or not step.get("step"):
        return None
    spent = time.monotonic() - job.started
    return max(0.0, spent / step["step"] * (job.max_steps - step["step"]))


def duration(seconds: float | None) -> str:
    """Short: 45 s, 12 min, 3 h 20 min."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def last_logged(folder: Path) -> dict[str, Any]:
    """The newest whole line of a run's metrics that has a loss, else the newest; empty before there is one."""
    path = folder / METRICS_FILE
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        # what stands before the first line end may be cut, and after the last one is being written
        whole = file.read().split(b"\n")[:-1]
    for line in reversed(whole):
        if line.startswith(b"{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def _logged(step: dict[str, Any]) -> str:
    return f"loss {step['loss']:.4g}" if isinstance(step.get("loss"), float | int) else ""


def _fitting(jobs: Sequence[Job], rows: int) -> list[Job]:
    """As many jobs as there are rows, in their order: running ones first, then failures, the newest done, the next."""
    if len(jobs) <= rows:
        return list(jobs)
    done = [job for job in jobs if job.state == "done"]
    waiting = [job for job in jobs if job.state == "waiting"]
    by_weight = [
        *(job for job in jobs if job.state == "running"),
        *(job for job in jobs if job.state in ("failed", "not started")),
        *waiting[:3],
        *reversed(done),
        *waiting[3:],
    ]
    kept = {id(job) for job in by_weight[: max(1, rows)]}
    return [job for job in jobs if id(job) in kept]
