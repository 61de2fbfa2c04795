"""lm-evaluation-harness's tasks on a model in memory, against the model's own log-probabilities."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api import metrics

from posttrain.config import from_tree
from posttrain.evaluation import compare, evaluate, harness
from posttrain.evaluation.harness_results import Leaf, report_of
from posttrain.loading import load_sources
from tests import tiny

ROOT = Path(__file__).parents[2]
INTERVAL = {"resamples": 50, "level": 0.95, "seed": 0}
DOCS = [
    {"word": "abc", "back": "cba", "choices": ["cba", "abc"], "gold": 0},
    {"word": "xyz", "back": "zyx", "choices": ["xyz", "zyx"], "gold": 1},
    {"word": "ab", "back": "ba", "choices": ["ab", "ba"], "gold": 1},
]


def task(folder, name, **settings):
    description = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{word}}=",
        "target_delimiter": "",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(description))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    (path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    choices = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    task(path, "choose", **choices, metric_list=[{"metric": "acc"}, {"metric": "f1"}])
    task(path, "choose_two", **choices, metric_list=[{"metric": "acc"}])
    writing = {"output_type": "generate_until", "doc_to_target": "{{back}}", "metric_list": [{"metric": "exact_match"}]}
    task(path, "write", **writing, generation_kwargs={"until": ["="], "max_gen_toks": 4})
    task(path, "write_much", **writing, generation_kwargs={"until": ["="], "max_gen_toks": 4000})
    task(path, "unsafe", **writing, unsafe_code=True)
    task(path, "broken", **choices, fewshot_split="train", num_fewshot=1)
    task(path, "seen", **writing, doc_to_image="picture")
    task(
        path,
        "read",
        output_type="loglikelihood_rolling",
        doc_to_target="{{word}}={{back}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    group = {"group": "both", "task": ["choose", "choose_two"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    (path / "both.yaml").write_text(yaml.safe_dump(group))
    return path


def loaded(folder, *names, **options):
    return harness.load(tiny.tokenizer(), tasks=names, include_path=str(folder), **options)


def measured(folder, *names, model=None, **options):
    model = tiny.model(dtype=torch.float64) if model is None else model
    sources = loaded(folder, *names, **options)
    return evaluate(model, tiny.tokenizer(), sources, batch_size=2, resamples=50)


def logp(model, text, start):
    """Summed over the characters from `start` on, one sequence at a time."""
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(text))])
    with torch.no_grad():
        found = model(ids).logits[0].log_softmax(-1)
    return sum(float(found[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_choices_are_those_the_model_finds_likelier(folder):
    model = tiny.model(dtype=torch.float64)
    report = measured(folder, "choose", model=model)
    source = report.sources["choose"]
    expected = []
    for doc, item in zip(DOCS, source.items, strict=True):
        prompt = doc["word"] + "="
        scores = [logp(model, prompt + choice, len(prompt)) for choice in doc["choices"]]
        np.testing.assert_allclose([score for score, _ in item["responses"]], scores, rtol=1e-9)
        expected.append(float(np.argmax(scores) == doc["gold"]))
        assert item["acc"] == expected[-1] and item["prompt"] == prompt and item["reference"] == str(doc["gold"])
    estimate = source.measures["acc"].estimate
    assert estimate.value == pytest.approx(np.mean(expected)) and estimate.n == 3
    assert estimate.low <= estimate.value <= estimate.high
    # a corpus metric has a value and an interval, but no items to pair
    assert source.measures["f1"].statistic is None and "f1" not in compare(report, report)["choose"]
    assert compare(report, report)["choose"]["acc"].difference.value == 0
    assert json.loads(json.dumps(report.to_dict()))["sources"]["choose"]["verifier"].startswith("lm-eval ")


def test_perplexities_are_quotients_of_sums(folder):
    model = tiny.model(dtype=torch.float64)
    measures = measured(folder, "read", model=model).sources["read"].measures
    # the harness puts eos in front, as there is no bos
    texts = [f"{doc['word']}={doc['back']}" for doc in DOCS]
    tokenizer = tiny.tokenizer()
    total = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(text))]])
        with torch.no_grad():
            found = model(ids).logits[0].log_softmax(-1)
        total += sum(float(found[place - 1, ids[0, place]]) for place in range(1, ids.shape[1]))
    assert measures["word_perplexity"].estimate.value == pytest.approx(math.exp(-total / 3), rel=1e-6)
    assert measures["bits_per_byte"].estimate.value == pytest.approx(-total / 19 / math.log(2), rel=1e-6)


def test_a_limit_leaves_rows_out_and_says_so(folder):
    source = measured(folder, "write", limit=2).sources["write"]
    assert source.rows == 2 and source.counts == {"rows_left_out": 1}
    assert set(source.measures) == {"exact_match"} and len(source.items[0]["responses"]) == 1


def test_a_group_is_one_source_with_all_its_items(folder):
    source = measured(folder, "both").sources["both"]
    assert source.rows == 6 and {item["task"] for item in source.items} == {"choose", "choose_two"}
    assert source.measures["acc"].estimate.value == pytest.approx(np.mean([item["acc"] for item in source.items]))


def leaf(name, values, aggregation=metrics.mean, filter="none"):
    samples = [
        {"doc_id": index, "filter": filter, "arguments": [("p",)], "target": 1, "filtered_resps": [""],
         "metrics": ["m"], "m": value}
        for index, value in enumerate(values)
    ]  # fmt: skip
    return Leaf(name, {"m": aggregation}, samples, len(values))


@pytest.mark.parametrize(("by_size", "expected"), [(True, 1.0 / 5), (False, (1.0 + 0.0) / 2)])
def test_a_groups_mean_runs_over_items_or_over_tasks(by_size, expected):
    leaves = [leaf("small", [1.0]), leaf("large", [0.0] * 4)]
    report = report_of(leaves, {"m": by_size}, **INTERVAL)
    assert report.measures["m"].estimate.value == pytest.approx(expected)


def test_filters_values_that_are_not_there_and_corpus_metrics_of_a_group():
    assert list(report_of([leaf("a", [1.0], filter="strict")], {}, **INTERVAL).measures) == ["m,strict"]
    some = report_of([leaf("a", [1.0, math.nan, 0.0], metrics.nanmean)], {}, **INTERVAL).measures["m"]
    assert some.estimate.value == 0.5 and some.index.tolist() == [0, 2]
    assert report_of([leaf("a", [0.5, 1.5], metrics.perplexity)], {}, **INTERVAL).measures[
        "m"
    ].estimate.value == pytest.approx(math.exp(-1))
    both = report_of([leaf("a", [1.0], metrics.median), leaf("b", [1.0], metrics.median)], {}, **INTERVAL)
    assert both.measures == {} and "m" in both.not_measured


def test_nothing_is_left_changed(folder):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.padding_side = "right"
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate(model, tokenizer, loaded(folder, "write", "choose"), resamples=20)
    assert model.training and tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, r"evaluation.harness.tasks is empty"),
        ({"tasks": ["chose"]}, r"entry of evaluation.harness.tasks: 'chose'; did you mean 'choose'\?"),
        ({"tasks": ["choose"], "limit": 0}, r"evaluation.harness.limit is 0"),
        ({"tasks": ["choose"], "num_fewshot": -1}, r"evaluation.harness.num_fewshot is -1"),
        ({"tasks": ["choose"], "apply_chat_template": True}, r"apply_chat_template is true, and the tokenizer has no"),
        ({"tasks": ["choose", "choose"]}, r"leads to 'choose' twice"),
        ({"tasks": ["unsafe"]}, r"'unsafe' runs code that the model writes"),
        ({"tasks": ["seen"]}, r"'seen' shows images"),
        ({"tasks": ["broken"]}, r"'broken' cannot be loaded: 'train'"),
        ({"tasks": ["choose"], "include_path": "nowhere"}, r"include_path is 'nowhere', which is no folder here"),
    ],
)
def test_what_cannot_work_is_refused_before_any_model_runs(folder, settings, message, monkeypatch):
    from lm_eval.tasks import TaskManager

    # the harness's own index takes seconds to build
    only_own = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: only_own)
    with pytest.raises(ValueError, match=message):
        harness.load(tiny.tokenizer(), **{"include_path": str(folder), **settings})


def test_a_model_with_too_few_positions_is_refused(folder):
    source = loaded(folder, "write_much")["write_much"]
    with pytest.raises(ValueError, match=r"lets the model write 4000 tokens, and the model has 128 positions"):
        harness.check(source, tiny.model())
    harness.check(loaded(folder, "write")["write"], tiny.model())


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'posttrain\[evaluation\]'"):
        loaded(folder, "choose")


def test_the_shipped_tasks_stand_beside_the_data_of_a_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"tasks": ["choose_reversal", "reverse_made_up_word"], "include_path": "configs/harness", "limit": 3}
    evaluation = {"data": [{"task": "reverse_word", "size": 2}], "harness": settings}
    sources = load_sources(from_tree({"evaluation": evaluation}).evaluation, tiny.tokenizer())
    assert list(sources) == ["reverse_word", "choose_reversal", "reverse_made_up_word"]
    for line in (ROOT / "configs/harness/made_up_words.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["choices"][row["gold"]] == row["reversed"] == row["word"][::-1]
        assert len(set(row["choices"])) == 4
    evaluation["data"][0]["label"] = "choose_reversal"
    with pytest.raises(ValueError, match=r"both have 'choose_reversal'"):
        load_sources(from_tree({"evaluation": evaluation}).evaluation, tiny.tokenizer())
