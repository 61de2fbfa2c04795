"""The report of a made-up comparison: what stands in it, what must not, and what stands for what is missing."""

import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.experiments.report import write_report
from posttrain.experiments.report.figures import forget_retain_axes
from posttrain.experiments.report.groups import groups, headline
from posttrain.experiments.report.tables import plain
from posttrain.experiments.results import Comparison, RunResult

ITEMS = 40
SECTIONS = (
    "Answer",
    "Setting",
    "Results",
    "Tuning",
    "Failed and missing runs",
    "Learning curves",
    "During training",
    "pass@k",
    "Forgetting and keeping",
    "Calibration",
    "Target probabilities",
    "Time and memory",
    "Repeat it",
)
NASTY = "<script>alert('$1')</script>|x"


def make_run(objective: str, seed: int, level: float, **changes: Any) -> RunResult:
    """Of ``level`` on average over seeds 0, 1 and 2, which differ by 0.01."""
    noise = np.random.default_rng([seed, int(1000 * level)]).normal(size=ITEMS)
    spread = 0.1 * np.random.default_rng(0).normal(size=ITEMS) + 0.02 * noise
    values = (level + 0.01 * (seed - 1) + spread - spread.mean()).tolist()
    scores = {"pass@1": values, "nll": [1 - value for value in values], "tokens": [5.0] * ITEMS}
    metrics = {"pass@1": float(np.mean(values)), "nll": 1 - float(np.mean(values)), "expected_calibration_error": 0.1}
    table = [{"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None}]
    table += [{"low": 0.5, "high": 1.0, "count": 10, "confidence": 0.8, "accuracy": level}]
    run = RunResult(
        name=f"{objective}-{seed}",
        objective=objective,
        base="tiny",
        data="words",
        seed=seed,
        folder=Path("runs"),
        status="done",
        metrics={f"{source}/{name}": value for source in ("forget", "retain") for name, value in metrics.items()},
        items={"forget": scores, "retain": scores},
        curves={"loss": [(step, 2 - level + 1 / step) for step in range(1, 100)], "learning_rate": [(1, 1e-4)]},
        during={"retain/pass@1": [(0, 0.2), (50, level)]},
        reliability={"retain": table},
        probability_histogram={"retain": [0, *range(1, 20)]},
        pass_at_k={"retain": {1: level, 2: level + 0.1, 4: level + 0.15}},
        seconds=60.0 + seed,
        peak_memory_bytes=2**30,
    )
    return replace(run, **changes)


def make_comparison() -> Comparison:
    levels = {"nll": 0.4, "focal": 0.6, NASTY: 0.402}
    runs = [make_run(objective, seed, level) for objective, level in levels.items() for seed in range(3)]
    for place in (3, 4, 5):
        kept = {name: value for name, value in runs[place].metrics.items() if "calibration" not in name}
        runs[place] = replace(runs[place], metrics=kept)
    failed = {"metrics": {}, "items": {}, "curves": {}, "during": {}}
    runs[8] = replace(runs[8], status="failed", error="the loss is NaN & more", **failed)
    return Comparison(
        question="Which <objective> for words?",
        settings={"objectives": {"nll": "nll", NASTY: {"name": "focal"}}, "run": {"trainer": {"max_steps": 3}}},
        runs=runs,
        before={("tiny", "words"): make_run("base", 0, 0.3)},
        trials=[
            {"objective": "nll", "hyperparameters": {"lr": 0.1}, "metric": "nll", "value": 1.25, "chosen": True},
            {"objective": "nll", "hyperparameters": {"lr": 9}, "metric": "nll", "value": None, "status": "failed"},
        ],
        command="posttrain compare words.yaml",
        versions={"torch": "2.13.0"},
        hardware={"cpu": "2 cores"},
        date="2026-01-05",
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(make_comparison(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(written: dict[str, Path]) -> str:
    return written["html"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(written: dict[str, Path]) -> str:
    return written["markdown"].read_text(encoding="utf-8")


def row(markdown: str, start: str) -> str:
    """The first table row that begins so."""
    return next(line for line in markdown.splitlines() if line.startswith(f"| {start} |"))


@pytest.mark.parametrize("title", SECTIONS)
def test_every_section_is_there(html: str, markdown: str, title: str) -> None:
    assert f"<h2>{title}</h2>" in html
    assert f"\n## {title}\n" in markdown


def test_the_answer_gives_verdicts_in_words(html: str, markdown: str) -> None:
    # knowing more or less of what is to be forgotten is neither better nor worse
    assert "Against nll, by pass@1: focal is better on 1 of 2 test sets, differs on 1 of 2 test sets" in html
    assert "cannot be told apart on both test sets" in html
    table = markdown[markdown.index("| objective | forget, pass@1 | retain, pass@1 |") :]
    assert row(table, "nll") == "| nll | 0.400 | 0.400 |"
    assert "| different +0.200" in row(table, "focal") and "| ▲ better +0.200" in row(table, "focal")
    assert row(table, "best mean") == "| best mean |  | focal (0.600) |"


def test_names_are_escaped(html: str, markdown: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html and "Which &lt;objective&gt; for words?" in html
    assert "the loss is NaN &amp; more" in html
    tables = [line for line in markdown.splitlines() if "script" in line and line.startswith("|")]
    assert len(tables) > 3 and all("\\<script>" in line and "\\|x" in line for line in tables)


def test_the_page_needs_nothing_beside_it(html: str) -> None:
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|<script", html)
    assert {link[1:] for link in links if link.startswith("#")} <= set(re.findall(r'id="([^"]*)"', html))


def test_every_plot_says_what_it_shows(html: str) -> None:
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) >= 8
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in images)


def test_markdown_finds_its_plots(written: dict[str, Path], markdown: str) -> None:
    linked = re.findall(r"\]\((plots/[^)]*)\)", markdown)
    assert len(linked) == len(set(linked)) >= 8
    for name in linked:
        content = (written["markdown"].parent / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and min(width, height) > 200


def test_a_metric_that_a_run_lacks_is_a_gap(markdown: str) -> None:
    lines = [line for line in markdown.splitlines() if line.startswith("| focal | 3 of 3 |")]
    assert len(lines) == 2
    for line in lines:
        assert line.endswith("| *not measured* |") and not re.search(r"\| 0(\.0+)? \|", line)
    assert "*no test (focal did not measure it)*" in markdown


def test_results_carry_intervals_the_base_and_the_best(markdown: str) -> None:
    best = next(line for line in markdown.splitlines() if line.startswith("| focal | 3 of 3 |"))
    # 0.59, 0.60, 0.61: t(0.975, 2) * 0.01 / sqrt(3) = 0.0248
    assert r"| 0.600 \[0.575, 0.625\] |" in best
    retain = markdown[markdown.index("### retain") :]
    assert row(retain, "focal").count("★") == 2, "pass@1 and nll"
    assert row(retain, "before training").startswith("| before training | – | 0.290 |")
    assert "2 of 3" in next(line for line in retain.splitlines() if line.startswith("| \\<script>"))


def test_failures_stand_with_their_error(markdown: str) -> None:
    section = markdown[markdown.index("## Failed and missing runs") :]
    assert "| *failed* | the loss is NaN & more |" in section


def test_trials_show_what_was_chosen(markdown: str) -> None:
    assert "| 0.1 | nll | **★ 1.250** | chosen |" in markdown
    assert "| 9 | nll | *failed* |  |" in markdown


def test_the_way_to_repeat_it(html: str, markdown: str) -> None:
    assert "posttrain compare words.yaml" in html and "max_steps: 3" in html
    assert "| torch | 2.13.0 |" in markdown and "| cpu | 2 cores |" in markdown


def test_a_report_made_again_is_the_same_and_leaves_no_old_plots(tmp_path: Path) -> None:
    runs = [make_run(name, seed, 0.5, reliability={}, pass_at_k={}, during={}) for name in "ab" for seed in (0, 1)]
    comparison = Comparison(question="?", settings={}, runs=runs)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "99_old.png").touch()
    first = {name: path.read_bytes() for name, path in write_report(comparison, tmp_path).items()}
    second = {name: path.read_bytes() for name, path in write_report(comparison, tmp_path).items()}
    assert first == second
    assert not (tmp_path / "plots" / "99_old.png").exists()


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    bare = {"curves": {}, "during": {}, "reliability": {}, "probability_histogram": {}, "pass_at_k": {}, "items": {}}
    cost = {"seconds": None, "peak_memory_bytes": None}
    runs = [make_run(name, 0, 0.5, metrics={"test/acc": 0.5}, **bare, **cost) for name in "ab"]
    text = write_report(Comparison(question="?", settings={}, runs=runs), tmp_path)["markdown"].read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == ["Answer", "Results"]
    assert "One seed: what varies between seeds is unknown" in text
    assert "b and a cannot be compared: one seed and no values per item" in text


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    runs = [make_run("nll", 0, 0.5, status="missing", metrics={})]
    text = write_report(Comparison(question="?", settings={}, runs=runs), tmp_path)["markdown"].read_text()
    assert "No run has finished" in text and "not ended yet" in text


def test_a_value_that_is_not_finite_is_said(tmp_path: Path) -> None:
    runs = [make_run(name, seed, 0.5, items={}) for name in "ab" for seed in (0, 1)]
    runs[0] = replace(runs[0], metrics={**runs[0].metrics, "retain/nll": math.inf})
    text = write_report(Comparison(question="?", settings={}, runs=runs), tmp_path)["markdown"].read_text()
    assert "*not finite*" in text and "a value is not finite" in text and "inf" not in text.replace("info", "")


def test_p_values_are_corrected_within_one_metric() -> None:
    (found,) = groups(make_comparison(), resamples=999)
    differences = [one for metric in ("forget/nll", "retain/nll") for one in found.differences[metric]]
    smallest = min(differences, key=lambda one: one.p or 1.0)
    assert len(differences) == 4
    assert smallest.corrected_p == pytest.approx(4 * (smallest.p or 1.0)), "Holm over two sources and two objectives"


def test_the_deciding_metric() -> None:
    assert headline(["nll", "pass@1"], None) == "pass@1"
    assert headline(["nll", "pass@1"], "test/nll") == "nll"
    assert headline(["own", "other"], None) == "own"


def test_forgetting_is_paired_with_keeping() -> None:
    assert forget_retain_axes(["forget/nll", "retain/nll", "test/nll"]) == [("forget/nll", "retain/nll")]
    assert forget_retain_axes(["tofu/forget_rouge", "tofu/retain_rouge"]) == [
        ("tofu/forget_rouge", "tofu/retain_rouge")
    ]
    assert forget_retain_axes(["tofu/forget_quality", "tofu/model_utility"]) == [
        ("tofu/forget_quality", "tofu/model_utility")
    ]
    kinds = ["tofu/forget_quality_a", "tofu/forget_quality_b", "tofu/model_utility_a", "tofu/model_utility_b"]
    assert forget_retain_axes(kinds) == [(kinds[0], kinds[2]), (kinds[1], kinds[3])]
    assert forget_retain_axes(["forget/nll"]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [({"nll": "nll", "b": {"n": 1}}, "nll; b: {n: 1}"), ([0, 1], "0, 1"), (3, "3"), (None, "null"), ("x y", "x y")],
)
def test_settings_in_one_line(value: Any, text: str) -> None:
    assert plain(value) == text
