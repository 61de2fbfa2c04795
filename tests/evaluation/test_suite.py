import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from posttrain.evaluation import Source, compare, comparison_table, evaluate, generate, likelihood, plot_pass_at_k
from posttrain.evaluation.generation import Completions
from tests import tiny

PROMPTS = ["abc=", "a", "12+34=", "xyz", "0?", "b"]
SMALL = {"samples": 4, "k": [1, 4], "max_new_tokens": 6, "resamples": 200}


def rendered(table) -> str:
    console = Console(width=200, file=io.StringIO(), no_color=True)
    console.print(table)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def trained():
    """The tiny model after a few steps on ROWS."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        for row in ROWS:
            ids = tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


ROWS = [{"prompt": prompt, "completion": str(index)} for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def before():
    return evaluate(tiny.model().eval(), tiny.tokenizer(), {"digits": Source(ROWS, verifier="exact")}, **SMALL)


@pytest.fixture(scope="module")
def after(trained):
    return evaluate(trained, tiny.tokenizer(), {"digits": Source(ROWS, verifier="exact")}, **SMALL)


def test_greedy_pass_at_1_is_exact_match(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6)
    # The model's own answers for the first two rows, something else for the others.
    rows = [
        {"prompt": prompt, "answer": texts[0] if index < 2 else "never"}
        for index, (prompt, texts) in enumerate(zip(PROMPTS, greedy, strict=True))
    ]
    options = {**SMALL, "samples": 1, "k": [1], "temperature": 0.0}
    report = evaluate(model, tokenizer, {"own": Source(rows, verifier="exact")}, metrics=["generation"], **options)
    found = report.to_dict()["sources"]["own"]
    assert set(found["metrics"]) == {"pass@1"}
    assert found["metrics"]["pass@1"]["value"] == pytest.approx(2 / 6) and found["metrics"]["pass@1"]["n"] == 6
    assert [item["correct"] for item in report.items()] == [[True]] * 2 + [[False]] * 4


def test_report_holds_every_metric_as_json(before):
    found = json.loads(json.dumps(before.to_dict(), allow_nan=False))
    metrics = found["sources"]["digits"]["metrics"]
    assert list(metrics) == [
        "pass@1", "pass@4", "maj@4", "nll", "perplexity", "mean_target_probability", "token_accuracy", "entropy",
        "expected_calibration_error",
    ]  # fmt: skip
    for name in set(metrics) - {"expected_calibration_error"}:  # whose bootstrap is biased upwards
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert found["settings"]["samples"] == 4 and found["sources"]["digits"]["verifier"] == "exact"
    assert sum(bin["count"] for bin in found["sources"]["digits"]["reliability"]) == 12


def test_samples_become_pass_and_majority_by_hand(model, tokenizer, monkeypatch):
    texts = [["7", "3", "3", "3"], ["7", "7", "3", "3"], ["3"] * 4]
    monkeypatch.setattr("posttrain.evaluation.suite.complete", lambda *_, **__: Completions(texts, 0, 5))
    rows = [{"prompt": "a", "answer": "7"}] * 3
    report = evaluate(model, tokenizer, {"x": Source(rows, verifier="exact")}, samples=4, k=[1, 2, 4], resamples=50)
    values = {name: measure.estimate.value for name, measure in report.sources["x"].measures.items()}
    assert values["pass@1"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    assert values["pass@2"] == pytest.approx((1 / 2 + 5 / 6 + 0) / 3)
    assert values["pass@4"] == pytest.approx(2 / 3)
    assert values["maj@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert values["maj@4"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert report.sources["x"].counts["unfinished_completions"] == 5


def test_items_add_up_to_the_metrics(before):
    items = [json.loads(json.dumps(item)) for item in before.items()]
    assert [(item["source"], item["row"], item["prompt"]) for item in items] == [
        ("digits", index, prompt) for index, prompt in enumerate(PROMPTS)
    ]
    metrics = before.to_dict()["sources"]["digits"]["metrics"]
    tokens = [item["tokens"] for item in items]
    assert tokens == [2] * 6
    nll = sum(item["nll"] * item["tokens"] for item in items) / sum(tokens)
    assert metrics["nll"]["value"] == pytest.approx(nll)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(nll))
    assert metrics["pass@1"]["value"] == pytest.approx(np.mean([item["correct"] for item in items]))
    assert all(len(item["completions"]) == len(item["answers"]) == 4 for item in items)


def test_training_shows_as_a_paired_difference(before, after):
    found = compare(before, after)["digits"]
    assert found["nll"].difference.high < 0 < found["mean_target_probability"].difference.low
    assert found["pass@1"].difference.value == pytest.approx(found["pass@1"].after.value - found["pass@1"].before.value)
    assert found["pass@1"].difference.low > 0
    text = rendered(comparison_table(before, after))
    assert "pass@1" in text and "difference" in text and "95 % interval" in text
    assert rendered(after.table()).count("digits") >= 9


def test_the_same_model_differs_by_nothing(before):
    for found in compare(before, before)["digits"].values():
        assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)


def test_other_rows_are_not_compared(before, model, tokenizer):
    other = evaluate(model, tokenizer, {"digits": ROWS[:3]}, metrics=["likelihood"], resamples=50)
    with pytest.raises(ValueError, match="'digits' holds other rows"):
        compare(before, other)
    renamed = evaluate(model, tokenizer, {"else": ROWS}, metrics=["likelihood"], resamples=50)
    with pytest.raises(ValueError, match="share no source"):
        compare(before, renamed)


def test_rows_skipped_on_one_side_leave_the_comparison(model, tokenizer):
    rows = [{"prompt": "a" * length, "completion": "1"} for length in (9, 2, 3)]
    whole = evaluate(model, tokenizer, {"x": rows}, metrics=["likelihood"], resamples=50)
    cut = evaluate(model, tokenizer, {"x": rows}, metrics=["likelihood"], resamples=50, max_length=6)
    assert cut.sources["x"].counts == {"truncated_rows": 1, "skipped_rows": 1}
    assert "1 skipped rows (3 rows in all)" in rendered(cut.table())
    found = compare(whole, cut)["x"]["nll"]
    assert (found.before.n, found.after.n, found.difference.n) == (3, 2, 2)
    assert [found.difference.value, found.difference.low, found.difference.high] == pytest.approx([0] * 3, abs=1e-6)


def test_sources_may_allow_one_kind_of_metric_alone(model, chat_tokenizer):
    chat = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "1"}]}] * 2
    sources = {
        "text": [{"text": "abc"}, {"text": "0123"}],
        "answers": Source([{"prompt": "a", "answer": "b"}], verifier="exact"),
        "chat": Source(Dataset.from_list(chat), verifier="exact"),
    }
    report = evaluate(model, chat_tokenizer, sources, **SMALL)
    measured = {name: set(source.measures) for name, source in report.sources.items()}
    assert measured["text"] == set(likelihood(model, chat_tokenizer, [{"text": "abc"}]).statistics())
    assert measured["answers"] == {"pass@1", "pass@4", "maj@4"}
    assert measured["chat"] == measured["text"] | measured["answers"]
    assert "no generation, it needs a prompt" in rendered(report.table())
    assert [item["prompt"] for item in report.items()][3] == chat[0]["messages"][:1]


def test_numbers_do_not_depend_on_the_batch_size(exact_model, tokenizer):
    one, many = (
        evaluate(exact_model, tokenizer, {"digits": Source(ROWS, verifier="exact")}, **SMALL, batch_size=size)
        for size in (1, 64)
    )
    for first, second in zip(one.items(), many.items(), strict=True):
        assert first["completions"] == second["completions"]
        assert first["nll"] == pytest.approx(second["nll"], rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["generatoin"]}, "did you mean 'generation'"),
        ({"metrics": []}, "metrics is empty"),
        ({"samples": 4, "k": [8]}, r"between 1 and samples=4, found \[8\]"),
        ({"k": []}, r"found \[\]"),
        ({"temperature": 0.0}, "temperature 0 is greedy, so samples=8"),
        ({"level": 95.0}, "level"),
        ({"max_new_tokens": 500}, "leaves no room"),
    ],
)
def test_bad_settings_are_named(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, {"x": Source(ROWS, verifier="exact")}, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "'x' has no rows"),
        ([{"question": "a"}], r"row 0 has the columns \['question'\]"),
        ([*ROWS, {"prompt": "a", "completion": None}], r"row 6 has the columns \['prompt'\]"),
    ],
)
def test_bad_rows_are_named(model, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, {"x": Source(rows, verifier="exact")}, max_new_tokens=4)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pass_at_k_is_drawn(before, after, tmp_path, suffix):
    path = plot_pass_at_k(before, after, tmp_path / f"pass.{suffix}")
    alone = plot_pass_at_k(None, after, tmp_path / f"alone.{suffix}")
    assert path.stat().st_size > 5000 and alone.stat().st_size > 5000
    assert path.read_bytes() != alone.read_bytes()


def test_pass_at_k_needs_completions(model, tokenizer, tmp_path):
    report = evaluate(model, tokenizer, {"x": ROWS}, metrics=["likelihood"], resamples=50)
    with pytest.raises(ValueError, match="no source was evaluated by generation"):
        plot_pass_at_k(None, report, tmp_path / "x.png")
