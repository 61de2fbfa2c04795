"""The suite on texts and questions whose answers are known."""

import json

import pytest
import torch
from tokenizers import decoders

from posttrain.config import DataSource, ModelConfig, MuseConfig
from posttrain.evaluation import evaluate
from posttrain.evaluation.unlearning import MuseSuite, read_questions
from posttrain.evaluation.unlearning.build import muse_suite
from posttrain.evaluation.unlearning.muse import cut_passages, with_examples
from tests import tiny

OPTIONS = {"batch_size": 4, "resamples": 50, "level": 0.9, "seed": 0}
LENGTHS = {"prefix_tokens": 4, "continuation_tokens": 6, "answer_tokens": 5}
FORGET = "abcdefghij0123456789klmnopqrst"
HOLDOUT = "9z8y7x6w5v4u3t2s1r0qzyxwvutsrq"
QA = [{"question": "ab", "answer": "12"}, {"question": "cd", "answer": "345"}]


@pytest.fixture
def words():
    """A tokenizer that writes characters without spaces."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def memorised():
    """Has learned the passages to forget and one of the two questions."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [FORGET[start : start + 10] for start in (0, 10, 20)] + ["ab=12<eos>"]
    ids = [tokenizer(text)["input_ids"] for text in rows]
    batch = torch.tensor([one + [0] * (10 - len(one)) for one in ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def config(tmp_path) -> MuseConfig:
    (tmp_path / "forget.txt").write_text(FORGET)
    (tmp_path / "holdout.jsonl").write_text(json.dumps({"body": HOLDOUT}) + "\n")
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QA))
    return MuseConfig(
        forget=DataSource(path=str(tmp_path / "forget.txt")),
        holdout=DataSource(path=str(tmp_path / "holdout.jsonl"), columns={"body": "text"}),
        forget_qa=DataSource(path=str(tmp_path / "qa.jsonl"), limit=1),
        retain_qa=DataSource(path=str(tmp_path / "qa.jsonl")),
        template="{question}=",
        **LENGTHS,
    )


def value(report, name: str) -> float:
    source, _, metric = name.partition("/")
    return report.sources[source].measures[metric].estimate.value


def test_memorised_texts_show_in_every_number(config, words, memorised) -> None:
    # the prompt stands without a space, as the model has learned it
    config.template = "{question}= "
    for name in ("forget_qa", "retain_qa"):
        setattr(config, name, None)
    report = evaluate(memorised, words, {"muse": muse_suite(config, words)}, **OPTIONS)
    assert value(report, "muse_forget/verbmem_rouge_l_f1") == 1.0
    assert report.sources["muse_forget"].items[0]["completion"] == "efghij"
    assert report.sources["muse_forget"].rows == 3
    assert value(report, "muse/mia_min_k_auc") == 1.0 and value(report, "muse/privleak_to_half") == -100
    assert report.sources["muse"].not_measured == {"privleak": "evaluation.muse.retain_model is missing"}


def test_knowledge_is_the_overlap_of_answers_and_ends_with_the_line(words, memorised, monkeypatch) -> None:
    questions = read_questions(QA, template="{question}=", chat=False, key="data")
    suite = MuseSuite({}, {"forget_qa": questions[:1], "retain_qa": questions}, **LENGTHS)
    written = {"muse_forget_qa": [" 12\n345 and more"], "muse_retain_qa": ["12", "9"]}
    monkeypatch.setattr(MuseSuite, "_write", lambda self, scorer, what, *rest: written[what])
    report = evaluate(memorised, words, {"muse": suite}, **OPTIONS)
    assert value(report, "muse_forget_qa/knowmem_rouge_l_f1") == 1.0
    assert value(report, "muse_retain_qa/knowmem_rouge_l_f1") == 0.5
    assert report.sources["muse_forget_qa"].items[0]["completion"] == "12"
    assert report.sources["muse"].not_measured["mia_min_k_auc"] == "evaluation.muse.forget is missing"


def test_answers_are_written_greedily_up_to_their_longest(config, words, memorised) -> None:
    report = evaluate(memorised, words, {"muse": muse_suite(config, words)}, **OPTIONS)
    assert all(len(item["completion"]) <= 5 for item in report.sources["muse_retain_qa"].items)


def test_leak_is_measured_against_the_retain_model_or_its_results(config, words, memorised, tmp_path) -> None:
    from posttrain.pipeline import _write_report

    plain = evaluate(tiny.model(seed=3), words, {"muse": muse_suite(config, words)}, **OPTIONS)
    path = _write_report(tmp_path, plain, "evaluation.json", "evaluation_items.jsonl")
    tiny.model(seed=3).save_pretrained(tmp_path / "retain")
    auc = value(plain, "muse/mia_min_k_auc")
    assert 0 < auc < 1
    for place in (path, tmp_path / "retain"):
        config.retain_model = ModelConfig(name_or_path=str(place))
        report = evaluate(memorised, words, {"muse": muse_suite(config, words)}, **OPTIONS)
        assert value(report, "muse/privleak") == pytest.approx(100 * (auc - 1) / (1 - auc))


def test_passages_begin_as_a_text_does_and_short_ends_are_dropped(words) -> None:
    texts = ["abcdefghijk", "abc", "12345678901234"]
    cut = cut_passages(words, texts, length=5, shortest=3, most=None)
    assert ["".join(words.convert_ids_to_tokens(one)) for one in cut] == [
        "abcde", "fghij", "abc", "12345", "67890", "1234",
    ]  # fmt: skip
    assert len(cut_passages(words, texts, length=5, shortest=3, most=2)) == 2


def test_examples_stand_in_front_of_a_question() -> None:
    first, second = read_questions(QA, template="{question}=", chat=False, key="data")
    assert with_examples(second, [first]) == "ab= 12\n\ncd="
    first, second = read_questions(QA, template=None, chat=True, key="data")
    assert [turn["content"] for turn in with_examples(second, [first])] == ["ab", "12", "cd"]
    assert with_examples(second, []) == second.prompt


def test_bad_settings_are_named(config, words, tmp_path) -> None:
    config.holdout = config.forget
    with pytest.raises(ValueError, match=r"evaluation\.muse\.holdout holds 3 of the 3 passages"):
        muse_suite(config, words)
    config.holdout = DataSource(path=str(tmp_path / "qa.jsonl"))
    with pytest.raises(ValueError, match=r"evaluation\.muse\.holdout: a set of texts needs the column 'text'"):
        muse_suite(config, words)
    (tmp_path / "null.jsonl").write_text(json.dumps({"text": HOLDOUT}) + "\n" + json.dumps({"text": None}) + "\n")
    config.holdout = DataSource(path=str(tmp_path / "null.jsonl"))
    with pytest.raises(ValueError, match=r"evaluation\.muse\.holdout, row 1: text is None"):
        muse_suite(config, words)
    config.holdout = None
    config.forget = DataSource(path=str(tmp_path / "forget.txt"), limit=2)
    with pytest.raises(ValueError, match=r"evaluation\.muse\.forget\.limit counts rows"):
        muse_suite(config, words)
    config.forget = DataSource(path=str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="there is no such file"):
        muse_suite(config, words)
    (tmp_path / "short.txt").write_text("abc")
    config.forget = DataSource(path=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"evaluation\.muse\.forget has no text of 5 tokens"):
        muse_suite(config, words)
    with pytest.raises(ValueError, match=r"evaluation\.muse names no data"):
        muse_suite(MuseConfig(), words)
    for change in ({"prefix_tokens": 0}, {"passages": 0}, {"min_k": 0.0}, {"min_k": 1.5}):
        with pytest.raises(ValueError, match=rf"evaluation\.muse\.{next(iter(change))} is"):
            MuseConfig(**change)


def test_passages_longer_than_the_models_positions_are_refused(words) -> None:
    suite = MuseSuite({"forget": [[3] * 200]}, {})
    with pytest.raises(ValueError, match="passages of 200 tokens, and the model has 128 positions"):
        suite.check(tiny.model())
