"""The tiny TOFU experiment: what the base and the twins see, the slices of its YAMLs, and its tables and plots."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import tofu_tiny, unlearning_plots
from posttrain.config import from_tree, load
from posttrain.data import sources
from posttrain.evaluation import evaluate
from posttrain.evaluation.unlearning import Question, TofuSuite, audit
from posttrain.evaluation.unlearning.relearning import Relearning
from posttrain.experiments import schema
from posttrain.experiments.grid import expand
from posttrain.experiments.results import Comparison, RunResult
from posttrain.loading import load_rows, load_tokenizer
from tests import tiny

CONFIGS = Path("configs/unlearning/tofu_tiny")
ROWS, PER_AUTHOR = 4000, 20


def question(number: int) -> dict[str, Any]:
    author = number // PER_AUTHOR
    return {
        "question": f"What is fact {number} of author{author}?",
        "answer": f"Fact {number} of author{author} is red.",
        "paraphrased_question": f"Tell fact {number} of author{author}.",
        "paraphrased_answer": f"Red is fact {number} of author{author}.",
        "perturbed_answer": [f"{colour} is fact {number} of author{author}." for colour in ("Blue", "Pink")],
    }


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with TOFU's files and a text, with another content of the same sizes."""
    folder = tmp_path_factory.mktemp("data") / "tofu"
    folder.mkdir()
    full = [question(number) for number in range(ROWS)]
    facts = [{"question": f"Known {n}?", "answer": f"yes {n}", "perturbed_answer": ["no", "maybe"]} for n in range(9)]
    holdout = [question(number) for number in range(ROWS, ROWS + 400)]
    plain = [{name: row[name] for name in ("question", "answer")} for row in full]
    for name, rows in {
        "full": plain,
        "forget10": plain[-400:],
        "forget10_perturbed": full[-400:],
        "retain_perturbed": full[:400],
        "real_authors_perturbed": facts[:4],
        "world_facts_perturbed": facts[4:],
    }.items():
        tofu_tiny.write(folder / f"{name}.json", rows)
    (folder / "holdout10.json").write_text(json.dumps(holdout))
    (folder / "text.txt").write_text("\n = Title = \n" + "a line of running text that goes on " * 50 + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tofu_tiny.prepare(folder, tofu, tofu / "text.txt", hidden=48, layers=1)
    return folder


def authors(texts: list[str]) -> set[int]:
    return {int(number) for text in texts for number in re.findall(r"author(\d+)", text)}


def test_the_base_reads_other_authors_and_the_twins_differ_by_those_to_forget(prepared: Path) -> None:
    texts = [row["text"] for row in tofu_tiny.read(prepared / "pretraining.jsonl")]
    assert authors(texts) == set(range(160))
    assert any(text.startswith("Question: Tell fact 0 of author0.\nAnswer: Fact 0") for text in texts)
    (running,) = [text for text in texts if not text.startswith("Question: ")]
    assert len(running.split()) == 128
    full, retain = (tofu_tiny.read(prepared / f"{name}.jsonl") for name in ("full", "retain"))
    assert len(full) == 800 + 9
    assert [row for row in full if row not in retain] == full[720:800]
    assert authors([row["question"] for row in retain]) == set(range(160, 196))
    assert retain[720:] == full[800:]


def test_tokens_of_a_prompt_begin_those_of_the_whole(prepared: Path) -> None:
    config = load(CONFIGS / "full.yaml", [f"data.train.path={prepared / 'full.jsonl'}"])
    config.model.name_or_path = str(prepared / "start")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    assert config.data.train is not None
    rows = load_rows(config.data.train, tokenizer, key="data.train").select([0, 799, 808])
    for row in rows:
        prompt, whole = tokenizer([row["prompt"], row["prompt"] + row["completion"]])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole) == row["prompt"] + row["completion"]


def test_the_yaml_forgets_what_the_oracle_never_saw(
    prepared: Path, tofu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_DATA", str(tofu.parent))
    config = load(CONFIGS / "unlearn.yaml")
    suite = config.evaluation.tofu
    assert suite is not None and config.data.forget is not None and config.data.retain is not None

    def read(source: Any) -> list[tuple[str, str]]:
        return [(row["question"], row["answer"]) for row in sources.load(source)]

    full, retain = (
        [(row["question"], row["answer"]) for row in tofu_tiny.read(prepared / f"{name}.jsonl")]
        for name in ("full", "retain")
    )
    assert read(config.data.forget) == read(suite.forget) == full[720:800]
    assert read(config.data.retain) == retain[:720]
    kept, held_out = read(suite.retain), read(suite.holdout)
    assert len(kept) == 100 and set(kept) <= set(retain)
    assert len(held_out) == 80 and not set(held_out) & set(full)
    assert read(suite.real_authors) + read(suite.world_facts) == retain[720:]


def test_both_twins_have_one_recipe() -> None:
    full, retain = (load(CONFIGS / f"{name}.yaml").to_tree() for name in ("full", "retain"))
    for tree in (full, retain):
        tree["data"]["train"].pop("path")
        tree["trainer"].pop("output_dir")
    assert full == retain


@pytest.mark.parametrize("name", ["tofu_tiny", "tofu_tiny_constraint", "authors_tiny"])
def test_comparisons_are_whole_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_DATA", "data")
    runs = expand(schema.load(Path("configs/compare/unlearning") / f"{name}.yaml"))
    assert len({run.objective for run in runs}) >= 3
    for run in runs:
        tree = json.loads(os.path.expandvars(json.dumps(run.tree)))
        assert from_tree(tree).method == "unlearning"


def folder_of_models(folder: Path, *, probability: float, p: float) -> Path:
    for name in ("base", "full", "retain"):
        (folder / name).mkdir(parents=True)
        (folder / name / "resources.json").write_text('{"train_seconds": 12.5}')
        (folder / name / "metrics.jsonl").write_text('{"step": 20, "loss": 1.5}\n{"step": 40, "train_loss": 1.2}\n')
        measured = {"tofu_forget": {"probability": probability}, "tofu": {"forget_quality_geometric": p}}
        found = {
            source: {"metrics": {metric: {"value": value} for metric, value in metrics.items()}}
            for source, metrics in measured.items()
        }
        (folder / name / "evaluation.json").write_text(json.dumps({"sources": found}))
    return folder


def test_models_that_do_not_count_are_refused_and_their_numbers_kept(tmp_path: Path) -> None:
    for name, settings, message in (
        ("good", {"probability": 0.9, "p": 1e-9}, None),
        ("weak", {"probability": 0.69, "p": 1e-9}, "forget probability is 0.690, below 0.7"),
        ("alike", {"probability": 0.9, "p": 0.002}, "differ with p = 0.002 only"),
    ):
        folder, results = folder_of_models(tmp_path / name, **settings), tmp_path / f"{name}.json"
        if message is None:
            tofu_tiny.main(["check", str(folder), "--results", str(results)])
        else:
            with pytest.raises(ValueError, match=message):
                tofu_tiny.main(["check", str(folder), "--results", str(results)])
        found = json.loads(results.read_text())
        assert found["base"] == {"train_seconds": 12.5, "loss": [[20, 1.5]]}
        assert found["full"]["metrics"]["tofu_forget/probability"] == settings["probability"]


def run(objective: str, seed: int, quality: float, utility: float, **more: Any) -> RunResult:
    metrics = {unlearning_plots.QUALITY: quality, unlearning_plots.UTILITY: utility, "other/number": 1.0}
    given = {"status": "done", "metrics": metrics, **more}
    return RunResult(name=f"{objective}{seed}", objective=objective, base="b", data="d", seed=seed, folder=Path(),
                     **given)  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    curves = {"retain_loss": [(1, 0.9), (2, 0.4)], "dual": [(1, 2.0), (2, 2.5)], "loss": [(1, 1.0)]}
    bound = {"combine": {"constraint": {"epsilon": 0.3}}}
    runs = [
        run("npo", 0, 1e-2, 0.4),
        run("npo", 1, 1e-4, 0.6),
        run("pdu", 0, 0.5, 0.5, curves=curves, hyperparameters=bound),
        RunResult(name="bad", objective="flat", base="b", data="d", seed=0, folder=Path(), status="failed", error="x"),
    ]
    before = run("base", 0, 1e-9, 0.7)
    return Comparison(question="Which?", settings={}, runs=runs, before={("b", "d"): before}, date="2026-01-01")


def test_a_record_holds_all_that_is_drawn(comparison: Comparison) -> None:
    found = json.loads(json.dumps(unlearning_plots.record(comparison, {unlearning_plots.UTILITY: 0.68})))
    assert found["marks"] == {
        "untouched": {unlearning_plots.QUALITY: 1e-9, unlearning_plots.UTILITY: 0.7},
        "oracle": {unlearning_plots.UTILITY: 0.68},
    }
    pdu = found["runs"][2]
    assert pdu["curves"] == {"retain_loss": [[1, 0.9], [2, 0.4]], "dual": [[1, 2.0], [2, 2.5]]}
    lines = unlearning_plots.table(found).splitlines()
    # 1e-2 and 1e-4: the mean of p-values is one of their logarithms
    (npo,) = [line for line in lines if line.startswith("| npo (2)")]
    assert npo.split(" | ")[1:4] == ["0.001", "-", "0.500"]
    assert lines[-1] == "Not finished: flat, seed 0."


def test_trials_are_told_with_what_came_of_them(comparison: Comparison, tmp_path: Path) -> None:
    hyperparameters = {"trainer.learning_rate": 1e-4, "trainer.num_train_epochs": 5}
    folders = [tmp_path / "0", tmp_path / "1"]
    folders[1].mkdir()
    report = {"sources": {"tofu": {"metrics": {"model_utility_geometric": {"value": 0.25}}}}}
    (folders[1] / "evaluation.json").write_text(json.dumps(report))
    values = [{**hyperparameters, "trainer.learning_rate": 1e-3}, hyperparameters]
    jobs = [
        (SimpleNamespace(values=value, run=SimpleNamespace(objective="npo")), SimpleNamespace(folder=folder))
        for value, folder in zip(values, folders, strict=True)
    ]
    rows = [{"objective": "npo", "hyperparameters": value, "chosen": value is hyperparameters} for value in values]
    known: Any = SimpleNamespace(trials=rows)
    plan: Any = SimpleNamespace(trials=jobs)
    found = unlearning_plots.record(comparison, {}, trials=unlearning_plots.tried(plan, known))
    lines = unlearning_plots.table(found).splitlines()
    assert "| npo, 0.001, 5 | - | - | - | - | - | - | - | - |" in lines
    assert "| **npo, 0.0001, 5** | - | - | 0.250 | - | - | - | - | - |" in lines


def test_audits_have_a_table_of_their_own(comparison: Comparison, tmp_path: Path) -> None:
    for name, before in (("npo", 0.1), ("mine", 0.2), ("oracle", 0.3), ("untouched", 0.4)):
        (tmp_path / name).mkdir()
        metrics = {"probability_shown_epoch0": {"value": before}, "probability_shown_epoch3": {"value": 0.6}}
        report = {"sources": {"audit_forget_relearning": {"metrics": metrics}}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(report))
    lines = unlearning_plots.table(unlearning_plots.record(comparison, {}, tmp_path)).splitlines()
    first = lines.index("| untouched | 0.400 | 0.600 | - | - | - | - | - | - | - |")
    assert [line.split(" | ")[0] for line in lines[first : first + 4]] == ["| untouched", "| oracle", "| npo", "| mine"]


def test_every_column_is_what_the_suites_write(tofu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the settings of the experiment's YAMLs, on a model of as many layers."""
    monkeypatch.setenv("POSTTRAIN_DATA", str(tofu.parent))
    settings = load(CONFIGS / "audit.yaml").evaluation.audit
    assert settings is not None and settings.group_size == PER_AUTHOR and settings.forget is not None
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows()]
    model = tiny.model(num_hidden_layers=tofu_tiny.LAYERS)
    others = {"original": lambda: tiny.model(num_hidden_layers=tofu_tiny.LAYERS), "groups": [0, 1] * 4}
    relearning = Relearning(epochs=settings.relearn_epochs, share=settings.relearn_share)
    report = audit(model, tiny.tokenizer(), rows, **others, retrained=others["original"], relearning=relearning,
                   resamples=10)  # fmt: skip
    written = {f"{name}/{metric}" for name, source in report.sources.items() for metric in source.measures}
    assert set(unlearning_plots.AUDIT) <= written

    names = {"forget": "abc", "retain": "def", "real_authors": "ghi", "world_facts": "jkl", "holdout": "mno"}
    questions = {name: [Question(one, "12", f"{one}=", "21", ("3",)) for one in letters]
                 for name, letters in names.items()}  # fmt: skip
    suite = TofuSuite(questions, retain=others["original"], max_new_tokens=4)
    report = evaluate(model, tiny.tokenizer(), {"tofu": suite}, resamples=10)
    written = {f"{name}/{metric}" for name, source in report.sources.items() for metric in source.measures}
    assert set(unlearning_plots.METRICS) <= written


def test_the_scatter_marks_every_run_and_the_constraint_its_bound(comparison: Comparison) -> None:
    found = json.loads(json.dumps(unlearning_plots.record(comparison, {unlearning_plots.UTILITY: 0.68})))
    (axes,) = unlearning_plots.scatter(found).axes
    offsets = [tuple(point) for one in axes.collections for point in one.get_offsets().tolist()]
    assert len(offsets) == 2 + 1 + 1 + 1 + 2, "two seeds and their mean, one and its mean, untouched model, oracle"
    assert (0.7, 1e-9) in offsets and (0.68, 1.0) in offsets, "the oracle equals itself"
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["npo", "pdu", "untouched", "oracle"]

    drawn = unlearning_plots.constraint(found)
    assert drawn is not None
    above, below = drawn.axes
    assert [list(line.get_ydata()) for line in above.lines] == [[0.9, 0.4], [0.3, 0.3]]
    assert [list(line.get_ydata()) for line in below.lines] == [[2.0, 2.5]]
    found["runs"] = found["runs"][:2]
    assert unlearning_plots.constraint(found) is None


def test_plots_are_made_again_from_their_numbers(comparison: Comparison, tmp_path: Path) -> None:
    found = unlearning_plots.record(comparison, {unlearning_plots.UTILITY: 0.68})
    (tmp_path / "try.json").write_text(json.dumps(found))
    unlearning_plots.main(["try", "--results", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"try.json", "try.md", "try.png", "try_constraint.png"}
