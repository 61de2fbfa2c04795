"""The configuration: what is accepted, what is refused and in which words."""

import logging
from pathlib import Path

import pytest
import torch
import yaml

from posttrain.config import (
    DataSource,
    EvaluationSource,
    KernelConfig,
    from_tree,
    load,
    peft_config,
    resolve,
    trainer_config_class,
)
from posttrain.config.values import convert, expand, read_yaml
from posttrain.experiments import grid, schema
from posttrain.suggest import nearest, unknown

BASE = """
data:
  train: {path: rows.jsonl, columns: {answer: completion}}
trainer:
  learning_rate: 1e-4
  save_strategy: no
evaluation:
  data: [{path: a.jsonl}, {task: addition, size: 20, split: test}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_values_arrive_with_their_types(file: Path) -> None:
    config = load(file)
    assert config.data.train == DataSource(path="rows.jsonl", columns={"answer": "completion"})
    assert config.data.eval is None
    assert config.trainer == {"learning_rate": 0.0001, "save_strategy": "no"}
    assert config.evaluation.data == [
        EvaluationSource(path="a.jsonl"),
        EvaluationSource(task="addition", size=20, split="test"),
    ]
    assert (config.method, config.objective, config.peft) == ("supervised", "nll", None)


def test_overrides_reach_every_depth(file: Path) -> None:
    config = load(
        file,
        [
            "model.name_or_path=some/model",
            "model.revision=main",
            "evaluation.data.1.limit=5",
            "evaluation.k=[1, 2]",
            "trainer.learning_rate=2e-5",
            "trainer.max_length=null",
            "peft.r=4",
            "data.eval={path: b.csv, limit: 3}",
            "kernel={budget: 1e9, one_pass: false}",
            "objective=focal",
            "objective.gamma=1.5",
        ],
    )
    assert config.model.name_or_path == "some/model"
    assert config.model.options == {"revision": "main"}
    assert config.evaluation.data is not None and config.evaluation.data[1].limit == 5
    assert config.evaluation.k == [1, 2]
    assert config.trainer["learning_rate"] == 2e-5 and config.trainer["max_length"] is None
    assert config.peft == {"r": 4}
    assert config.kernel == KernelConfig(budget=1_000_000_000, one_pass=False)
    assert config.data.eval == DataSource(path="b.csv", limit=3)
    assert config.objective == {"name": "focal", "gamma": 1.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.x=1", ["'modle'", "did you mean 'model'"]),
        ("data.train.pth=x", ["'data.train.pth'", "did you mean 'data.train.path'"]),
        ("evaluation.data.1.tsk=x", ["'evaluation.data.1.tsk'", "did you mean 'evaluation.data.1.task'"]),
        ("evaluation.sample=4", ["'evaluation.sample'", "did you mean 'evaluation.samples'"]),
        ("trainer.learing_rate=1", ["'trainer.learing_rate'", "did you mean 'trainer.learning_rate'"]),
        ("peft.lora_alfa=1", ["'peft.lora_alfa'", "did you mean 'peft.lora_alpha'"]),
        ("peft.peft_type=LORRA", ["did you mean 'LORA'"]),
        ("method=supervisd", ["did you mean 'supervised'"]),
        ("reference=cache", ["did you mean 'cached'"]),
        ("trainer.max_steps=1.5", ["trainer.max_steps is 1.5", "a whole number"]),
        ("trainer.packing=yes", ["trainer.packing is 'yes'", "true or false"]),
        ("trainer.learning_rate=fast", ["trainer.learning_rate is 'fast'", "a number"]),
        ("kernel.bugdet=1", ["'kernel.bugdet'", "did you mean 'kernel.budget'"]),
        ("kernel.backend=3", ["kernel.backend is 3", "text"]),
        ("kernel.budget=-1", ["kernel.budget is -1", "bytes, auto or null"]),
        ("kernel.budget=512MB", ["kernel.budget is '512MB'", "bytes, auto or null"]),
        ("kernel.gradient_tolerance=1", ["kernel.gradient_tolerance is 1", "without 1"]),
        ("kernel.gradient_tolerance=.nan", ["kernel.gradient_tolerance is nan"]),
        ("kernel.one_pass=yes", ["kernel.one_pass is 'yes'", "auto, true or false"]),
        ("evaluation.k=8", ["evaluation.k is 8", "a list"]),
        ("evaluation.k=[one]", ["evaluation.k.0 is 'one'", "a whole number"]),
        ("evaluation.before=1", ["evaluation.before is 1", "true or false"]),
        ("data.train.columns=[a]", ["data.train.columns is ['a']", "keys and values"]),
        ("data.train.limit=0", ["data.train.limit is 0", "at least 1"]),
        ("data.train.task=addition", ["both of path and task"]),
        ("data.eval.limit=3", ["data.eval has neither of path and task"]),
        ("data.train.size=3", ["data.train.size is 3", "no meaning for a path"]),
        ("data.eval={task: addition}", ["data.eval.size is null"]),
        ("data.eval={task: addition, size: 3, streaming: true}", ["data.eval.streaming is True"]),
        ("evaluation.data.7.limit=3", ["list of 2", "'7'"]),
        ("method.x=3", ["method is 'supervised'"]),
        ("trainer", ["'trainer' is not of the form"]),
        ("trainer.=3", ["not of the form"]),
        ("objective={name: [}", ["not valid YAML"]),
    ],
)
def test_a_mistake_is_named_with_its_key(file: Path, override: str, words: list[str]) -> None:
    setup = ["method=supervised"] if override.startswith("method.") else []
    with pytest.raises(ValueError) as caught:
        load(file, [*setup, override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_environment_variables_are_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", "/somewhere")
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    config = load(file, ["data.train.path=${SOME_DATA}/rows.jsonl"])
    assert config.data.train is not None and config.data.train.path == "/somewhere/rows.jsonl"
    with pytest.raises(ValueError, match=r"data\.train\.path .*NO_SUCH_VARIABLE is not set"):
        load(file, ["data.train.path=${NO_SUCH_VARIABLE}/rows.jsonl"])


@pytest.mark.parametrize("text", ["- a", "only text"])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="expected keys and values"):
        load(tmp_path / "x.yaml")


def test_a_missing_file_and_contradictions_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="no file here"):
        load(file.with_name("none.yaml"))
    with pytest.raises(ValueError, match="resume and overwrite"):
        load(file, ["resume=true", "overwrite=true"])


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("")
    assert load(tmp_path / "x.yaml") == from_tree({})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("1.", 1.0),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        (".inf", float("inf")),
        ("1e", "1e"),
        ("'1'", "1"),
        ("v1.2.3", "v1.2.3"),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    found = read_yaml(text, "text")
    assert found == value and type(found) is type(value)


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' stands twice, again in line 3"):
        read_yaml("a: 1\nb: 2\na: 3\n", "text")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-4", float, 1e-4),
        ("1e-4", float | None, 1e-4),
        (None, float | None, None),
        ("8", int | str | None, "8"),
        (8, int | str | None, 8),
        ("1e3", int, 1000),
        (100.0, int, 100),
        (10, float, 10),
        ({"a": 1}, dict | str | None, {"a": 1}),
        (["a"], None | str | list[str], ["a"]),
    ],
)
def test_values_are_fitted_to_plain_annotations(value: object, annotation: object, expected: object) -> None:
    found = convert(value, annotation, "key")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("value", "annotation"), [(True, int), (1, bool), (2.5, int), ("x", float), (3, str)])
def test_values_of_another_type_are_refused(value: object, annotation: object) -> None:
    with pytest.raises(ValueError, match="key is"):
        convert(value, annotation, "key")


def test_the_resolved_configuration_survives_a_round_trip(file: Path) -> None:
    overrides = [
        "peft.r=4",
        "kernel.budget=auto",
        "model.revision=main",
        "teacher.name_or_path=big",
        "objective=[{name: nll, weight: 0.5}]",
    ]
    config = resolve(load(file, overrides), name="run")
    assert from_tree(read_yaml(config.to_yaml(), "text")) == config
    # and for those who read it with a YAML 1.1 reader
    assert from_tree(yaml.safe_load(config.to_yaml())) == config


def test_tokens_are_not_written(file: Path) -> None:
    text = load(file, ["trainer.hub_token=secret-1", "model.token=secret-2", "tokenizer.token=secret-3"]).to_yaml()
    assert "secret" not in text and "hub_token: null" in text


def test_resolve_fills_in_and_leaves_the_loaded_one_alone(file: Path) -> None:
    loaded = load(file, ["evaluation.data=null", "data.eval={path: b.jsonl, limit: 3}"])
    config = resolve(loaded, name="quick")
    assert config.trainer["output_dir"] == "runs/quick"
    assert config.evaluation.data == [EvaluationSource(path="b.jsonl", limit=3)]
    assert "output_dir" not in loaded.trainer and loaded.evaluation.data is None
    assert resolve(load(file, ["evaluation.data=[]", "data.eval={path: b.jsonl}"])).evaluation.data == []


def test_the_cpu_is_told_to_trl_unless_the_user_has(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="posttrain"):
        config = resolve(load(file))
    assert (config.trainer["use_cpu"], config.trainer["bf16"]) == (True, False)
    assert caplog.messages == ["Training on the CPU: trainer.use_cpu=true, trainer.bf16=false."]
    assert resolve(load(file, ["trainer.bf16=true"])).trainer["bf16"] is True

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert "bf16" not in resolve(load(file)).trainer
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve(load(file)).trainer["bf16"] is False


def test_trainer_keys_build_trls_configuration(file: Path, tmp_path: Path) -> None:
    config = resolve(load(file, [f"trainer.output_dir={tmp_path}", "trainer.use_cpu=true", "trainer.bf16=false"]))
    args = trainer_config_class(config.method)(**config.trainer)
    assert args.learning_rate == 1e-4 and args.save_strategy == "no"


def test_peft_keys_build_the_named_configuration(file: Path) -> None:
    from peft import IA3Config, LoraConfig

    found = peft_config(load(file, ["peft={r: 4, target_modules: all-linear}"]).peft)
    assert isinstance(found, LoraConfig) and found.r == 4 and found.task_type == "CAUSAL_LM"
    assert isinstance(peft_config(load(file, ["peft={peft_type: ia3}"]).peft), IA3Config)
    assert peft_config(None) is None


ROOT = Path(__file__).parents[1]


# configs/harness holds tasks in lm-evaluation-harness's own format; a comparison alone has several objectives
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "harness")
COMPARISONS = [path for path in FILES if "objectives" in yaml.safe_load(path.read_text(encoding="utf-8"))]
RUNS = [path for path in FILES if path not in COMPARISONS]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_configuration_of_the_project_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_DATA", "data")
    resolve(load(path), name=path.stem)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_of_the_project_has_runs_that_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_DATA", "data")
    config = schema.load(path)
    # seeds differ in a number alone
    for run in (run for run in grid.expand(config) if run.seed == config.seeds[0]):
        resolve(from_tree(expand(run.tree)), name=run.name)


def test_the_nearest_name_is_suggested() -> None:
    assert nearest("learing_rate", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("optimizer_settings.lr", ["lr", "seed"]) == "lr"
    assert nearest("DFT", ["dft", "nll"]) == "dft"
    assert nearest("xyz", ["learning_rate"]) is None
    assert unknown("objective", "nl", ["nll"]) == "Unknown objective: 'nl'; did you mean 'nll'? Known: nll."
    assert unknown("key", "a", []) == "Unknown key: 'a'; there is none to choose from, leave it out."
    assert "Similar ones among 100" in unknown("key", "k1", [f"k{number}" for number in range(100)])


def test_a_reference_that_nobody_reads_is_refused():
    with pytest.raises(ValueError, match="the supervised trainer has no reference model"):
        from_tree({"reference": "model"})
