"""The parent's side of `math_worker`: one process, killed and started again when an answer takes too long."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("math_worker.py")

# Importing sympy on a busy machine can take a while; only a worker that never starts reaches this.
_START_SECONDS = 120.0


class MathProcess:
    """Asks a worker process whether two answers are equal; usable from any thread, one question at a time.

    Args:
        timeout: seconds for one question.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, candidate: str) -> dict[str, Any] | None:
        """The worker's answer with ``readable``, ``correct`` and ``answer``; None where it found none in time.

        Raises:
            RuntimeError: the worker does not start.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
            request = json.dumps({"gold": gold, "candidate": candidate})
            response = self._exchange(self._process, request, self._timeout)
            if response is None:
                self._stop()
            return None if response is None or "error" in response else response

    def close(self) -> None:
        """End the worker; a later question starts a new one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder off the worker's import path, where its siblings could shadow other modules.
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        if self._exchange(process, None, _START_SECONDS) != "ready":
            self._end(process)
            raise RuntimeError(f"The math-verify worker {_WORKER.name} did not start; its error stands above.")
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[str], request: str | None, timeout: float) -> Any:
        """Send a line, if any, and read one; None where the process is gone or had to be killed."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def _stop(self) -> None:
        if self._process is not None:
            self._end(self._process)
            self._process = None

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()
