"""From a configuration to a recommendation: what is printed, written, and refused."""

import json

import pytest
import torch
from datasets import Dataset

from posttrain.cli import main
from posttrain.config import load
from posttrain.diagnosis import advice
from posttrain.diagnosis.run import sample_rows
from posttrain.evaluation.bootstrap import Estimate
from tests import tiny

PAIRS = [
    {"prompt": f"{letter}=", "chosen": "12" * (1 + index % 2), "rejected": "3", "score_chosen": 1, "score_rejected": 0}
    for index, letter in enumerate("abcdef")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diagnose")
    tiny.model().save_pretrained(path / "base")
    tiny.tokenizer().save_pretrained(path / "base")
    for name, rows in (("rows", tiny.rows()), ("pairs", PAIRS)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("rows", "pairs"):
        settings = {
            "model": {"name_or_path": str(path / "base")},
            "data": {"train": {"path": str(path / f"{name}.jsonl")}},
            "trainer": {"output_dir": str(path / f"out-{name}"), "use_cpu": True, "bf16": False, "max_length": 64,
                        "per_device_train_batch_size": 4},
            "objective": {"name": "focal", "gamma": 3.0},
            "diagnosis": {"rows": 6},
        }  # fmt: skip
        (path / f"{name}.yaml").write_text(json.dumps(settings))
    return path


def test_a_diagnosis_of_rows(folder, capsys):
    assert main(["diagnose", str(folder / "rows.yaml")]) == 0
    printed = capsys.readouterr().out
    words = ("mean target probability", "on the capability continuum", "tolerance 0.001", "two-pass", "focal(gamma=3)")
    assert [word for word in words if word not in printed] == []
    out = folder / "out-rows"
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["rows"] == 6 and sum(found["target_probability"]["histogram"]["counts"]) == found["tokens"]
    assert (out / "diagnosis.png").stat().st_size > 1000
    start = load(out / "start.yaml")
    assert start.objective == found["advice"]["objective"] and start.trainer["max_length"] == 64
    assert start.diagnosis.rows == 256 and "2510.00526" in (out / "start.yaml").read_text()

    assert main(["diagnose", str(folder / "rows.yaml")]) == 2
    assert "already holds a diagnosis" in capsys.readouterr().err
    # a run may begin in the same folder, from the file that was written
    assert main(["train", str(out / "start.yaml"), "trainer.max_steps=1", "evaluation.data=[]"]) == 0


def test_the_mean_is_that_of_the_tokens_that_training_counts(folder):
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in tiny.rows()]
    assert (
        main(["diagnose", str(folder / "rows.yaml"), "diagnosis.rows=100", "diagnosis.costs=false", "overwrite=true"])
        == 0
    )
    found = json.loads((folder / "out-rows" / "diagnosis.json").read_text())
    model, tokenizer, probabilities = tiny.model().eval(), tiny.tokenizer(), []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0].softmax(-1)
        probabilities += [float(p[place - 1, ids[place]]) for place in range(len(row["prompt"]), len(ids))]
    assert found["tokens"] == len(probabilities) and "predicted" not in found
    assert found["target_probability"]["mean"] == pytest.approx(sum(probabilities) / len(probabilities), rel=1e-4)
    share = sum(p < 0.01 for p in probabilities) / len(probabilities)
    assert found["silenced"]["probability"] == pytest.approx(share)


def test_a_diagnosis_of_pairs(folder, capsys):
    assert main(["diagnose", str(folder / "pairs.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "base prefers the chosen" in printed and "scores contradict the label" in printed
    out = folder / "out-pairs"
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["pairs"]["length"]["chosen_longer"] == 1.0 and "simpo" in found["advice"]["reason"]
    start = load(out / "start.yaml")
    assert start.method == "preference" and start.objective == found["advice"]["objective"]
    assert main(["train", str(out / "start.yaml"), "trainer.max_steps=1", "evaluation.data=[]"]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=null"], "data.train is missing"),
        (["diagnosis.rows=0"], "diagnosis.rows is 0"),
        (["diagnosis.batch_size=0"], "diagnosis.batch_size is 0"),
        (["diagnosis.row=5"], "did you mean 'diagnosis.rows'"),
    ],
)
def test_bad_settings_are_named(folder, overrides, message, capsys):
    assert main(["diagnose", str(folder / "rows.yaml"), "overwrite=true", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_sample_is_drawn_or_a_streams_beginning():
    rows = Dataset.from_list([{"x": value} for value in range(20)])
    drawn = sample_rows(rows, 5, seed=1)["x"]
    assert len(set(drawn)) == 5 and drawn != sorted(drawn) and drawn == sample_rows(rows, 5, seed=1)["x"]
    assert sample_rows(rows, 50, seed=1) is rows
    assert sample_rows(rows.to_iterable_dataset(), 3, seed=1)["x"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("mean", "region", "objective"),
    [(0.7, "strong", "probability"), (0.3, "intermediate", "nll"), (0.05, "weak", "nll")],
)
def test_the_continuum(mean, region, objective):
    found = advice.supervised(Estimate(mean, mean - 0.01, mean + 0.01, 100))
    assert (found.region, found.objective, found.paper) == (region, objective, "arXiv:2510.00526")
    assert "interval holds" not in found.reason
    assert "interval holds 0.5" in advice.supervised(Estimate(0.52, 0.45, 0.6, 10)).reason


def test_a_pairs_advice_names_what_stands_out():
    calm = {"shared_prefix": 0.1, "length": {"chosen_longer": 0.5, "difference": {"low": -1.0}}}
    assert advice.preference(calm).paper == "arXiv:2305.18290"
    noisy = {**calm, "shared_prefix": 0.8, "scores": {"disagree": 0.1, "ties": 0.05}}
    found = advice.preference(noisy)
    assert "mmpo: in 15% of the pairs" in found.reason and "dpop: the answers of a pair share 80%" in found.reason
    assert found.paper == "arXiv:2410.03145; arXiv:2402.13228"
