"""The suites in a whole run: before, during and after training, alone on the command line, and read by comparisons."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli import main
from posttrain.config import from_tree, resolve
from posttrain.experiments.reading import read_base, read_run
from posttrain.metric_direction import direction
from posttrain.pipeline import evaluate_only, train
from tests import tiny


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    sources = {}
    for name, letters in {"forget": "abc", "holdout": "xyz", "retain": "def"}.items():
        rows = [
            {
                "question": one,
                "answer": f"1{number}",
                "paraphrased_answer": f"{number}",
                "perturbed_answer": ["4", "56"],
            }
            for number, one in enumerate(letters)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = {"path": str(tmp_path / f"{name}.jsonl")}
    (tmp_path / "texts.txt").write_text("abcdefghij" * 3)
    return {
        "model": {"name_or_path": str(tmp_path / "base")},
        "data": {"train": {**sources["forget"], "format": "question-answer", "template": "{question}="}},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_strategy": "no", "disable_tqdm": True,
                    "per_device_train_batch_size": 3, "learning_rate": 1e-2, "bf16": False, "report_to": "none",
                    "logging_steps": 1, "activation_checkpointing": False},
        "evaluation": {
            "resamples": 20,
            "every": 2,
            "tofu": {**sources, "template": "{question}=", "max_new_tokens": 4,
                     "retain_model": {"name_or_path": str(tmp_path / "base")}, "cache": str(tmp_path / "cache")},
        },
    }  # fmt: skip


def test_a_training_run_is_measured_before_during_and_after(tree, tmp_path) -> None:
    outcome = train(resolve(from_tree(tree)))
    assert outcome.before is not None and outcome.after is not None
    before, after = (
        one.sources["tofu"].measures["forget_quality_geometric"].estimate for one in (outcome.before, outcome.after)
    )
    assert before.value == 1.0 and after.value <= 1.0

    folder = tmp_path / "run"
    (folder / "done.json").write_text("{}")
    (tmp_path / "base" / "done.json").write_text("{}")
    labels: dict[str, Any] = {"base": "base", "data": "tofu", "seed": 0}
    base = read_base(tmp_path / "base", **labels)
    run = read_run(folder, name="run", objective="nll", hyperparameters={}, before=base, **labels)
    assert run.metrics["tofu/forget_quality_geometric"] == after.value
    assert "tofu/privleak" in run.metrics and "tofu/model_utility_geometric" not in run.metrics
    points = run.during["tofu_forget/probability"]
    assert [step for step, _ in points] == [2, 4] and points[0][1] < points[1][1]
    items = run.items["tofu_forget"]["probability"]
    assert len(items) == 3 and all(map(math.isfinite, items))
    assert sum(items) / 3 == pytest.approx(run.metrics["tofu_forget/probability"])
    assert any((tmp_path / "cache").iterdir())


def test_an_audit_during_training_relearns_on_a_copy(tree, tmp_path) -> None:
    """The trainer's model carries TRL's forward, mixed precision and checkpointing; none may leak into the audit."""
    forget = tree["evaluation"].pop("tofu")["forget"]
    relearning = {"relearn_learning_rate": 1e-2, "relearn_share": 1.0, "relearn_epochs": 2}
    groups = {"group_size": 1, "neighbours": 1}
    tree["evaluation"]["audit"] = {"forget": forget, "template": "{question}=", **groups, **relearning}
    tree["trainer"] |= {"bf16": True, "activation_checkpointing": True}
    outcome = train(resolve(from_tree(tree)))
    during = json.loads((tmp_path / "run" / "evaluation_step_2.json").read_text())["sources"]
    course = [during["audit_forget_relearning"]["metrics"][f"probability_shown_epoch{epoch}"] for epoch in range(3)]
    assert course[0]["value"] < course[1]["value"] < course[2]["value"]
    assert "group_told_layer2" in during["audit_forget_states"]["metrics"]
    # as the saved model alone has it
    tree["model"]["name_or_path"] = str(tmp_path / "run")
    tree["trainer"] |= {"output_dir": str(tmp_path / "alone"), "bf16": False, "use_cpu": True}
    alone = evaluate_only(resolve(from_tree(tree)))
    assert alone is not None and outcome.after is not None
    for source, found in alone[0].sources.items():
        for metric, measure in found.measures.items():
            theirs = outcome.after.sources[source].measures[metric].estimate.value
            assert theirs == pytest.approx(measure.estimate.value, rel=1e-4), f"{source}/{metric}"


def test_a_suite_is_evaluated_alone(tree, tmp_path, capsys) -> None:
    del tree["data"], tree["evaluation"]["every"]
    tree["evaluation"]["data"] = [{"path": "./no-such-file.jsonl"}]
    tree["evaluation"]["muse"] = {"forget": {"path": str(tmp_path / "texts.txt")}, "prefix_tokens": 4,
                                  "continuation_tokens": 6}  # fmt: skip
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["evaluate", str(path), "--suite", "tofu"]) == 0
    printed = capsys.readouterr().out
    assert "forget_quality_geometric" in printed
    # a reason is never left out
    assert "tofu: no model_utility_geometric, evaluation.tofu.real_authors is missing" in printed
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(report["sources"]) == {"tofu", "tofu_forget", "tofu_retain", "tofu_holdout"}
    both = ["evaluate", "--suite", "tofu", "--suite", "muse", str(path), "overwrite=true"]
    assert main(both) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"tofu", "muse", "muse_forget"} <= set(report["sources"])


def test_what_the_file_lacks_is_said(tree, tmp_path, capsys) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["evaluate", str(path), "--suite", "muse"]) == 2
    assert "--suite muse needs the block evaluation.muse" in capsys.readouterr().err
    (tmp_path / "holdout.jsonl").write_bytes((tmp_path / "forget.jsonl").read_bytes())
    assert main(["evaluate", str(path), "--suite", "tofu"]) == 2
    assert "evaluation.tofu.holdout holds 3 of the 3 rows" in capsys.readouterr().err
    (tmp_path / "forget.jsonl").write_text("")
    assert main(["evaluate", str(path), "--suite", "tofu"]) == 2
    assert "evaluation.tofu.forget" in capsys.readouterr().err


def test_wrong_keys_are_named(tree) -> None:
    tree["evaluation"]["tofu"]["forgett"] = {}
    with pytest.raises(ValueError, match=r"evaluation\.tofu\.forgett"):
        from_tree(tree)
    del tree["evaluation"]["tofu"]["forgett"]
    tree["evaluation"]["tofu"]["retain"] = {"limit": 3}
    with pytest.raises(ValueError, match=r"evaluation\.tofu\.retain has neither of path and task"):
        from_tree(tree)


def test_which_way_the_metrics_get_better() -> None:
    assert direction("tofu/forget_quality_geometric") == direction("tofu/model_utility_arithmetic") == 1
    assert direction("tofu/forget_ks_geometric") == -1
    assert direction("audit_forget_relearning/relearning_robustness_probability_shown") == 1
    assert direction("audit_retain_rounding/probability_int4_channel") == 1
    assert direction("audit_forget_rounding/probability_int4_channel") == 0
    assert direction("tofu_retain/probability") == direction("tofu_world_facts/truth_ratio_geometric") == 1
    for metric in ("tofu_forget/probability", "tofu/privleak", "tofu/mia_min_k_auc", "muse_forget/verbmem_rouge_l_f1"):
        assert direction(metric) == 0
