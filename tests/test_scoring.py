"""Likelihood-ratio columns against the two models' own logits."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from posttrain.cli import main
from posttrain.config import from_tree, resolve
from posttrain.data.collation import CompletionCollator
from posttrain.modeling import attach
from posttrain.scoring import log_likelihoods, score, score_columns
from tests import tiny

TOKENISED = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6], "row_number": 0},
    {"input_ids": [7, 8], "labels": [-100, 8], "row_number": 1},
    {"input_ids": [9, 10, 11], "labels": [9, 10, 11], "row_number": 2},
]


def dense(model, ids, places):
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[place - 1, ids[place]]) for place in places)


def test_sums_are_those_of_the_logits():
    model = tiny.model(dtype=torch.float64).eval()
    expected = [
        (dense(model, [3, 4, 5, 6], [2, 3]), dense(model, [3, 4, 5, 6], [1, 2, 3])),
        (dense(model, [7, 8], [1]),) * 2,
        (dense(model, [9, 10, 11], [1, 2]),) * 2,
    ]
    attach(model)
    found = log_likelihoods(
        model, Dataset.from_list(TOKENISED), CompletionCollator(pad_token_id=0), batch_size=2, progress=False
    )
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-10)


def test_columns_by_hand():
    base = np.array([-4.0, -1.0, -6.0]), np.array([-9.0, -1.0, -6.0])
    tuned = np.array([-1.0, -1.5, -6.0]), np.array([-3.0, -1.5, -6.0])
    found = score_columns(base, tuned, Dataset.from_list(TOKENISED))
    assert found["trained_tokens"] == [2, 1, 2]
    assert found["learnability"] == [3.0, -0.5, 0.0] and found["mean_learnability"] == [1.5, -0.5, 0.0]
    # the prompt counts here: 3, 1 and 2 tokens behind the first
    assert found["ood_score"] == [-6.0, 0.5, 0.0] and found["mean_ood_score"] == [-2.0, 0.5, 0.0]


def test_a_broken_model_is_named():
    model = tiny.model()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    attach(model)
    with pytest.raises(ValueError, match="gives row 0 of the data a log-probability of NaN"):
        log_likelihoods(model, Dataset.from_list(TOKENISED), CompletionCollator(pad_token_id=0), progress=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny.model(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": {"path": str(folder / "rows.jsonl")}},
        "scoring": {"output": str(folder / "scored.parquet"), "batch_size": 3},
        "trainer": {"output_dir": str(folder / "tuned"), "use_cpu": True, "bf16": False},
    }


def test_from_a_configuration_to_columns(tree, tmp_path):
    written, rows = score(resolve(from_tree(tree)))
    loaded = load_dataset("parquet", data_files=str(written), split="train", cache_dir=str(tmp_path))
    assert loaded["score"] == [row["score"] for row in tiny.rows()]
    base, tuned, tokenizer = tiny.model(seed=0).eval(), tiny.model(seed=1).eval(), tiny.tokenizer()
    for row in loaded:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(row["prompt"])
        trained, everything = range(start, len(ids)), range(1, len(ids))
        assert row["trained_tokens"] == len(row["completion"]) + 1
        assert row["learnability"] == pytest.approx(dense(tuned, ids, trained) - dense(base, ids, trained), abs=1e-4)
        assert row["ood_score"] == pytest.approx(dense(base, ids, everything) - dense(tuned, ids, everything), abs=1e-4)
        assert row["mean_ood_score"] == pytest.approx(row["ood_score"] / (len(ids) - 1))
    assert len(rows) == 8 and "2404.08679" in (written.parent / f"{written.name}.about.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "data.train is missing"),
        ({"scoring": {}}, "scoring.output is missing"),
        ({"scoring": {"output": "rows.csv"}}, r"scoring.output is 'rows.csv'; give a file that ends in .jsonl"),
        ({"trainer": {"output_dir": "nothing/here"}}, "'nothing/here' holds no model; train this configuration first"),
    ],
)
def test_what_is_missing_is_named(tree, changes, message):
    with pytest.raises(ValueError, match=message):
        score(resolve(from_tree({**tree, **changes})))


def test_other_vocabularies_columns_and_the_base_itself_are_refused(tree, tmp_path):
    tiny.model(vocab_size=50).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    scoring = {"output": str(tmp_path / "x.jsonl"), "finetuned": {"name_or_path": str(tmp_path / "other")}}
    with pytest.raises(ValueError, match="has a vocabulary of 50 and the model one of"):
        score(resolve(from_tree({**tree, "scoring": scoring})))
    columns = {"columns": {"score": "ood_score"}}
    with pytest.raises(ValueError, match="has the column 'ood_score' already"):
        score(resolve(from_tree({**tree, "scoring": scoring, "data": {"train": {**tree["data"]["train"], **columns}}})))
    itself = {**tree["trainer"], "output_dir": tree["model"]["name_or_path"]}
    with pytest.raises(ValueError, match=r"name the base as model.name_or_path"):
        score(resolve(from_tree({**tree, "scoring": {"output": str(tmp_path / "x.jsonl")}, "trainer": itself})))


def test_the_command_prints_where_the_scores_lie(tree, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps({**tree, "scoring": {"output": str(tmp_path / "scored.jsonl")}}))
    assert main(["score", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "mean_learnability" in printed and "scored.jsonl" in printed
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 8
    assert main(["score", str(tmp_path / "run.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err
