"""What is shown while jobs run."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.experiments.jobs import Job
from posttrain.experiments.live import LiveTable, PlainLines, duration, last_logged, summary


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """A finished run, one at step 5 of 20 that began ten seconds ago, a failed one and one that waits."""
    labels = ({"objective": name, "seed": "0"} for name in ("nll", "power(alpha=[2])", "bad", "late"))
    tree = {"trainer": {"max_steps": 20}}
    made = [Job(f"run{i}", "run", tmp_path / f"run{i}", tree, label) for i, label in enumerate(labels)]
    done, running, failed, _ = made
    done.state, done.seconds = "done", 40.0
    running.state, running.started = "running", time.monotonic() - 10
    failed.state, failed.error, failed.seconds = "failed", "ValueError: [no]", 20.0
    running.folder.mkdir()
    lines = [{"step": 4, "loss": 2.5}, {"step": 5, "loss": 2.25}]
    (running.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6')
    return made


def test_a_table_on_a_terminal(jobs: list[Job]) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, height=40, color_system=None)
    with LiveTable(console, lambda job: "pass@1 0.5") as table:
        table.update(jobs)
    shown = text.getvalue()
    # brackets of a label or an error are no markup, and a column in which nothing differs is left out
    for words in ("power(alpha=[2])", "5/20", "loss 2.25", "30 s", "pass@1 0.5", "ValueError: [no]", "waiting"):
        assert words in shown, words
    assert "seed" not in shown
    assert "1 running, 1 done, 1 failed, 1 waiting" in shown


def test_a_long_table_shows_what_matters(jobs: list[Job]) -> None:
    many = [*jobs, *(Job(f"more{i}", "run", jobs[0].folder, {}, {"objective": f"m{i}"}) for i in range(50))]
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, height=20, color_system=None)
    with LiveTable(console, lambda job: "") as table:
        table.update(many)
    shown = text.getvalue()
    assert "5/20" in shown and "ValueError" in shown and "41 more" in shown


def test_lines_where_there_is_no_terminal(jobs: list[Job]) -> None:
    said: list[str] = []
    lines = PlainLines(said.append, lambda job: "pass@1 0.5", every=0.0)
    lines.update(jobs)
    assert said == ["run0: done in 40 s, pass@1 0.5", "run1: running", "run2: failed, ValueError: [no]"]
    said.clear()
    lines.update(jobs)
    assert said == ["run1: 5/20, 30 s left, loss 2.25"]


def test_the_time_left_of_all(jobs: list[Job]) -> None:
    # runs took 30 s on average; one has 20 s left at that pace, one has not begun
    assert summary(jobs).endswith("about 50 s left")


def test_the_newest_line_is_whole(tmp_path: Path) -> None:
    assert last_logged(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    assert last_logged(tmp_path) == {"step": 1}
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert last_logged(tmp_path) == {}


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (4.4, "4 s"), (89, "89 s"), (150, "2 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words
