"""The command line from arguments to files, on a model that trains in seconds."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import objectives
from posttrain.cli import main
from posttrain.cli.list_show import argument_docs, example
from posttrain.config import load
from posttrain.objectives import Loss
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base model, rows, and a configuration that trains the one on the other."""
    path = tmp_path_factory.mktemp("cli")
    tiny.model().save_pretrained(path / "base")
    tiny.tokenizer().save_pretrained(path / "base")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    settings = {
        "model": {"name_or_path": str(path / "base")},
        "data": {"train": {"path": str(path / "rows.jsonl")}},
        "trainer": {
            "output_dir": str(path / "run"),
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "activation_checkpointing": False,
            "disable_tqdm": True,
        },
        "evaluation": {
            "data": [{"path": str(path / "rows.jsonl"), "verifier": "exact", "label": "held-out"}],
            "samples": 2,
            "k": [1, 2],
            "max_new_tokens": 4,
            "resamples": 50,
        },
    }
    (path / "run.yaml").write_text(yaml.safe_dump(settings))
    yield path


def run(folder: Path, *overrides: str, command: str = "train") -> int:
    return main([command, str(folder / "run.yaml"), *overrides])


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def broken(logp: torch.Tensor) -> Loss:
    return Loss(logp * float("nan"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, str]:
    """The output folder of one whole run, and what the run printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(folder) == 0
    return folder / "run", printed.getvalue()


def test_training_leaves_a_model_a_record_metrics_reports_and_plots(trained: tuple[Path, str]) -> None:
    made, printed = trained
    words = ("Before and after", "held-out", "pass@1", "maj@2", "mean_target_probability", str(made / "metrics.jsonl"))
    assert [word for word in words if word not in printed] == []
    for name in ("training_curves.png", "pass_at_k.png", "evaluation_before_items.jsonl"):
        assert (made / name).stat().st_size > 0

    logged = [line for line in lines(made / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert logged[-1]["loss"] < logged[0]["loss"] and "mean_target_probability" in logged[0]

    record = json.loads((made / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__ and record["seed"] == 42 and record["processes"] == 1
    assert record["git"] is None or len(record["git"]["commit"]) == 40
    assert record["hardware"]["cores"] >= 1
    assert load(made / "config.yaml").trainer["max_steps"] == 4

    before, after = (json.loads((made / f"evaluation_{when}.json").read_text()) for when in ("before", "after"))
    nll = [report["sources"]["held-out"]["metrics"]["nll"]["value"] for report in (before, after)]
    assert nll[1] < nll[0]


def test_the_saved_model_is_the_one_that_was_evaluated(
    folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` on the saved folder gives the numbers that `train` printed for it."""
    made, _ = trained
    AutoModelForCausalLM.from_pretrained(made)
    assert AutoTokenizer.from_pretrained(made).eos_token == "<eos>"
    settings = (f"model.name_or_path={made}", f"trainer.output_dir={folder / 'measured'}")
    assert run(folder, *settings, command="evaluate") == 0
    assert "Evaluation" in capsys.readouterr().out
    found = json.loads((folder / "measured" / "evaluation.json").read_text())
    expected = json.loads((made / "evaluation_after.json").read_text())
    for name, estimate in expected["sources"]["held-out"]["metrics"].items():
        assert found["sources"]["held-out"]["metrics"][name]["value"] == pytest.approx(estimate["value"], rel=1e-6), (
            name
        )
    assert run(folder, *settings, command="evaluate") == 2
    assert "already holds an evaluation" in capsys.readouterr().err


def test_a_second_run_is_refused_resumed_or_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "twice"
    quick = ("evaluation.data=[]", f"trainer.output_dir={out}")
    assert run(folder, *quick) == 0
    (out / "evaluation.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    assert run(folder, *quick) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "already holds a run" in said and "overwrite=true" in said

    assert run(folder, *quick, "resume=true", "trainer.max_steps=6") == 0
    logged = [line["step"] for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert logged == [1, 2, 3, 4, 5, 6]
    assert len(json.loads((out / "run.json").read_text())["earlier"]) == 1

    assert run(folder, *quick, "overwrite=true", "trainer.max_steps=2") == 0
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-2"]
    assert not (out / "evaluation.json").exists() and (out / "notes.txt").read_text() == "mine"
    assert len([line for line in lines(out / "metrics.jsonl") if "loss" in line]) == 2


def test_overwriting_spares_the_model_it_starts_from_and_a_run_that_is_not_replaced_after_all(
    folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = trained
    assert run(folder, "overwrite=true", f"model.name_or_path={made}") == 2
    assert "holds the model to train" in capsys.readouterr().err
    assert run(folder, "overwrite=true", "objective=no_such") == 2
    assert (made / "model.safetensors").exists() and (made / "metrics.jsonl").exists()


def test_resuming_from_an_earlier_checkpoint_drops_the_lines_it_repeats(folder: Path) -> None:
    quick = ("evaluation.data=[]", f"trainer.output_dir={folder / 'again'}")
    assert run(folder, *quick) == 0
    whole = lines(folder / "again/metrics.jsonl")
    assert run(folder, *quick, f"resume={folder / 'again/checkpoint-2'}") == 0
    resumed = lines(folder / "again/metrics.jsonl")
    assert [line["step"] for line in resumed if "loss" in line] == [1, 2, 3, 4]
    assert [line["loss"] for line in resumed if "loss" in line] == pytest.approx(
        [line["loss"] for line in whole if "loss" in line], rel=1e-6
    )


def test_evaluating_the_base_first_does_not_change_the_training(folder: Path) -> None:
    losses = []
    for name, before in (("with", "true"), ("without", "false")):
        out = folder / name
        dropout = ("model.attention_dropout=0.3", "trainer.save_strategy=no")
        assert run(folder, f"trainer.output_dir={out}", f"evaluation.before={before}", *dropout) == 0
        losses.append([line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line])
        assert (out / "evaluation_before.json").exists() == (before == "true")
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # peft saves the head whole
def test_adapters_are_trained_saved_and_evaluated(folder: Path) -> None:
    out = folder / "adapter"
    assert run(folder, f"trainer.output_dir={out}", "peft={r: 2, target_modules: [q_proj, lm_head]}") == 0
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()
    settings = (f"model.name_or_path={out}", f"trainer.output_dir={folder / 'adapter_measured'}")
    assert run(folder, *settings, "evaluation.metrics=[likelihood]", command="evaluate") == 0
    after = json.loads((out / "evaluation_after.json").read_text())["sources"]["held-out"]["metrics"]["nll"]["value"]
    found = json.loads((folder / "adapter_measured/evaluation.json").read_text())
    assert found["sources"]["held-out"]["metrics"]["nll"]["value"] == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(("engine", "kind"), [("ddp2_cpu", "MULTI_CPU"), ("zero3_cpu", "DEEPSPEED")])
def test_two_processes_leave_one_set_of_results(
    folder: Path, trained: tuple[Path, str], engine: str, kind: str
) -> None:
    """Only the main process evaluates, under ZeRO-3 with a model of its own; waiting on the other would hang."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    out, config = folder / engine, ROOT / "launch/accelerate" / f"{engine}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
               str(ROOT / "tests/launched_cli.py"), "train", str(folder / "run.yaml"), f"trainer.output_dir={out}",
               "trainer.per_device_train_batch_size=2", "trainer.save_strategy=no"]  # fmt: skip
    # a build lock that another run left behind would hang this one
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (out / "evaluation_after.json").exists(), done.stderr[-4000:]
    record = json.loads((out / "run.json").read_text())
    assert (record["processes"], record["distributed_type"]) == (2, kind)
    losses = [[line["loss"] for line in lines(path / "metrics.jsonl") if "loss" in line] for path in (out, trained[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for when in ("before", "after"):
        one, two = (json.loads((path / f"evaluation_{when}.json").read_text()) for path in (trained[0], out))
        nll = [report["sources"]["held-out"]["metrics"]["nll"]["value"] for report in (one, two)]
        assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    assert done.stdout.count("Before and after") == 1


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (f"trainer.output_dir={folder / 'broken'}", "evaluation.data=[]")
    assert run(folder, *settings, "objective=tests.test_cli:broken") == 1
    assert "objective 'broken' gave the loss nan after 0 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=dtf"], "did you mean 'dft'"),
        (["objective.alfa=1", "objective.name=probability_power"], "did you mean 'alpha'"),
        (["objective=logits_finetuning"], "teacher_ids"),
        (["data.train=null"], "data.train is missing"),
        (["data.train.path=none.jsonl"], "none.jsonl"),
        (["model.name_or_path=./none"], "model.name_or_path is './none'"),
        (["model.dtype=float23"], "did you mean 'float32'"),
        (["model.revison=x"], "did you mean 'model.revision'"),
        (["tokenizer.paddng_side=left"], "did you mean 'tokenizer.padding_side'"),
        (["evaluation.before=false", "evaluation.k=[4]"], "samples=2"),
        (["evaluation.before=false", "evaluation.metrics=[genration]"], "generation"),
        (["evaluation.data.0.verifier=exat"], "did you mean 'exact'"),
        (["resume=true"], "holds no checkpoint"),
        (["resume=none"], "resume is 'none'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, f"trainer.output_dir={folder / 'never'}", *overrides) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("posttrain: ") and words in said
    assert not any((folder / "never").glob("*"))


def test_a_traceback_can_be_had_and_other_errors_propagate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not a valid SaveStrategy"):
        run(folder, "trainer.save_strategy=sometimes")
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="no file here"):
        main(["train", "none.yaml"])


def test_usage_errors_are_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["trian"], ["train"], ["show"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "train" in capsys.readouterr().err


def test_list_prints_everything_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for family, members in objectives.families().items():
        assert family in printed.splitlines()
        for name, function in members.items():
            declaration = function.declaration
            assert any(
                line.split()[0] == name and line.endswith(declaration.formula) and declaration.unit in line
                for line in printed.splitlines()
                if line.strip()
            )


@pytest.mark.parametrize("name", objectives.names())
def test_show_prints_what_one_needs_to_use_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 0
    printed, function = capsys.readouterr().out, objectives.get(name)
    assert function.declaration.formula in printed and function.declaration.paper in printed
    docs = argument_docs(function.__doc__.replace("\n    ", "\n"))
    for parameter in function.__annotations__.keys() - {"return"}:
        assert parameter in printed and docs[parameter] in printed
    shown = yaml.safe_load(example(name, function))["objective"]
    assert (shown.get("forget") or shown.get("retain") or shown)["name"] == name


def test_show_suggests_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "probabilty"]) == 2
    assert "did you mean 'probability'" in capsys.readouterr().err
    assert main(["show", "tests.test_cli:broken"]) == 0
    assert "statistic of the policy, per token" in capsys.readouterr().out


def test_doctor_asks_every_backend_and_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert torch.__version__ in rows["torch"]
    assert "yes" in rows["streamed"].split() and "yes" in rows["dense"].split()
    for package in ("deepspeed", "flash-attn", "triton", "bitsandbytes", "vllm"):
        assert {"yes", "no"} & set(rows[package].split())
    if not torch.cuda.is_available():
        assert "needs a CUDA device" in rows["vllm"]


def test_looking_things_up_does_not_import_the_trainers() -> None:
    code = (
        "import sys; from posttrain.cli import main; main(['list']); main(['show', 'nll']); "
        "sys.exit(sorted({'trl', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_the_arguments_section_is_read_over_several_lines() -> None:
    text = (
        "Summary.\n\nArgs:\n    a, b: both of\n        them.\n    c: alone; not: a name.\nReturns:\n    d: no argument."
    )
    assert argument_docs(text) == {"a": "both of them.", "b": "both of them.", "c": "alone; not: a name."}
    assert argument_docs("Summary.") == {}
