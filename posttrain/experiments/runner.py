"""Running jobs as child processes, one at a time on each place there is."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.config.values import read_yaml
from posttrain.experiments.jobs import LOG_FILE, Job, child_command, failure
from posttrain.experiments.schema import CompareConfig

POLL_SECONDS = 0.2
# How long a child may take to end after it was told to.
GRACE_SECONDS = 10.0


class Display(Protocol):
    """What is told of the jobs' states."""

    def update(self, jobs: Sequence[Job]) -> None: ...


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time.

    Args:
        device: CUDA indices such as ``0`` or ``0,1``, ``cpu``, or None for accelerate's choice.
        threads: CPU threads of a run; None leaves them to accelerate.
        launch: accelerate's configuration file.
    """

    device: str | None
    threads: int | None = None
    launch: str | None = None

    @property
    def processes(self) -> int:
        """Of one run."""
        if self.launch is not None:
            settings = read_yaml(Path(self.launch).read_text(encoding="utf-8"), self.launch) or {}
            return int(settings.get("num_processes", 1))
        return 1 if self.device in (None, "cpu") else len(str(self.device).split(","))

    def environment(self) -> dict[str, str]:
        """Of the child, over this process's."""
        found: dict[str, str] = {}
        if self.device is not None:
            found["CUDA_VISIBLE_DEVICES"] = "" if self.device == "cpu" else self.device
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found

    def options(self) -> list[str]:
        """Of ``accelerate launch``."""
        found = ["--num_cpu_threads_per_process", str(self.threads)] if self.threads is not None else []
        if self.launch is not None:
            return [*found, "--config_file", self.launch]
        found += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        found += ["--num_processes", str(self.processes)]
        found += ["--cpu"] if self.device == "cpu" else []
        # several launches on one machine must not meet at one port
        return [*found, "--multi_gpu", "--main_process_port", "0"] if self.processes > 1 else found


def slots(config: CompareConfig) -> list[Slot]:
    """The places that ``devices`` and ``parallel`` make.

    The CPU's cores are shared out among the runs on it; OMP_NUM_THREADS, where it is set, is how many there are.

    Raises:
        ValueError: ``launch`` is no file, or the entries of ``devices`` differ in their number of processes.
    """
    if config.launch is not None and not Path(config.launch).is_file():
        raise ValueError(f"launch is {config.launch!r}, and there is no such file; give an accelerate configuration.")
    devices = [None] if config.devices is None else [str(device) for device in config.devices]
    places = [device for device in devices for _ in range(config.parallel)]
    shares = max(1, _cores() // len(places))
    # accelerate gives a run one thread unless told otherwise; beside a GPU that is enough
    found = [Slot(device, shares if device in (None, "cpu") else None, config.launch) for device in places]
    counts = sorted({slot.processes for slot in found})
    if len(counts) > 1:
        raise ValueError(
            f"devices gives runs different numbers of processes, {' and '.join(map(str, counts))}, and with them "
            "batches of different sizes; give every entry as many devices."
        )
    return found


class Runner:
    """Runs jobs over slots, and leaves every one done or failed.

    Args:
        places: see `slots`.
        display: told whenever something may have changed.
        command: the child's; another one serves tests.
        keep: file descriptors that children hold as well.
    """

    def __init__(
        self,
        places: Sequence[Slot],
        display: Display,
        *,
        command: Callable[[Job, Slot], list[str]] | None = None,
        keep: Sequence[int] = (),
    ) -> None:
        self._places = places
        self._display = display
        self._command = command or (lambda job, slot: child_command(job, slot.options()))
        self._keep = tuple(keep)
        self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def run(self, jobs: Sequence[Job], shown: Sequence[Job]) -> None:
        """Run those jobs that are not done, in their order; returns when none is left.

        Args:
            jobs: to run.
            shown: all jobs of the comparison.

        Raises:
            KeyboardInterrupt: children have been stopped first.
        """
        waiting = [job for job in jobs if job.state == "waiting"]
        try:
            while waiting or self._running:
                for place in range(len(self._places)):
                    if place not in self._running and waiting:
                        self._start(waiting.pop(0), place)
                time.sleep(POLL_SECONDS)
                for place, (job, process) in list(self._running.items()):
                    if process.poll() is not None:
                        del self._running[place]
                        self._finish(job, process.returncode)
                self._display.update(shown)
            self._display.update(shown)
        finally:
            # an interrupt, or an error of our own: no child is left behind
            self._stop()

    def _start(self, job: Job, place: int) -> None:
        slot = self._places[place]
        job.write_resolved()
        # after it: it takes away checkpoints of another configuration, which must not be resumed
        command = self._command(job, slot)
        job.state, job.started = "running", time.monotonic()
        with (job.folder / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment()},
                # a group of its own: Ctrl-C reaches this process alone, which then stops all of the child's processes
                start_new_session=True,
                pass_fds=self._keep,
            )
        self._running[place] = (job, process)

    def _finish(self, job: Job, code: int) -> None:
        assert job.started is not None
        job.seconds = time.monotonic() - job.started
        if code == 0 and job.has_results():
            job.mark_done(job.seconds)
            job.state = "done"
            return
        stopped = f"stopped by signal {-code}" if code < 0 else failure(job.folder)[0]
        job.error = stopped if code else "it ended well and left no evaluation"
        job.mark_failed(job.error)
        job.state = "failed"

    def _stop(self) -> None:
        for job, process in self._running.values():
            _signal(process, signal.SIGTERM)
            job.state = "waiting"
        until = time.monotonic() + GRACE_SECONDS
        for _, process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            # whatever of the group outlived its leader
            _signal(process, signal.SIGKILL)
            process.wait()
        self._running.clear()


def _signal(process: subprocess.Popen[Any], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cores(environment: Mapping[str, str] = os.environ) -> int:
    told = environment.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
