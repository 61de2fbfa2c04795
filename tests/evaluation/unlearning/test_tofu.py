"""The suite on a tiny model, against its own parts and itself."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import decoders

from posttrain.config import DataSource, ModelConfig, TofuConfig, TokenizerConfig
from posttrain.evaluation import comparison_table, evaluate
from posttrain.evaluation.unlearning import TofuSuite, read_questions
from posttrain.evaluation.unlearning.build import tofu_suite
from posttrain.evaluation.unlearning.findings import Findings, Interval
from posttrain.evaluation.unlearning.summary import _balance
from posttrain.loading import load_model, load_tokenizer
from tests import tiny

OPTIONS = {"batch_size": 5, "resamples": 50, "level": 0.9, "seed": 0}


def rows(letters: str, *, perturbed: int = 3, paraphrase: bool = True) -> list[dict[str, object]]:
    found = []
    for index, letter in enumerate(letters):
        row: dict[str, object] = {"question": letter + "xy"[: index % 2], "answer": str(100 + 37 * index)}
        if paraphrase:
            row["paraphrased_answer"] = str(7 + 11 * index)
        if perturbed:
            row["perturbed_answer"] = [str(13 * index + other) for other in range(perturbed)]
        found.append(row)
    return found


def questions(*given, **options):
    return read_questions(rows(*given, **options), template="{question}=", chat=False, key="data")


DATA = {
    "forget": questions("abcdef"),
    "retain": questions("ghijk"),
    "real_authors": questions("lmno", paraphrase=False),
    "world_facts": questions("pqrs", paraphrase=False),
    "holdout": questions("tuvwxyz", paraphrase=False, perturbed=0),
}


def trained(seed: int = 0):
    """Knows the rows to forget and to retain."""
    model, tokenizer = tiny.model(seed=seed), tiny.tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = [one.row(one.answer) for name in ("forget", "retain") for one in DATA[name]]
    texts = [row["prompt"] + row["completion"] + "<eos>" for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(100):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def memorised():
    return trained()


@pytest.fixture(scope="module")
def suite():
    return TofuSuite(DATA, retain=lambda: tiny.model(seed=4), reference=tiny.model, max_new_tokens=6)


@pytest.fixture(scope="module")
def report(memorised, suite):
    tokenizer = tiny.tokenizer()
    # without spaces between the characters, so that a number stays one word
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return evaluate(memorised, tokenizer, {"tofu": suite}, **OPTIONS)


def value(report, name: str) -> float:
    source, _, metric = name.partition("/")
    return report.sources[source].measures[metric].estimate.value


def test_every_metric_of_every_data_set_is_there(report) -> None:
    common = {"probability", "extraction_strength", "exact_memorization"}
    told = common | {"rouge_l_recall", "truth_ratio_geometric", "truth_ratio_arithmetic"}
    assert {name: set(one.measures) for name, one in report.sources.items()} == {
        "tofu": {
            *(f"forget_{what}_{mean}" for what in ("quality", "ks") for mean in ("geometric", "arithmetic")),
            *(f"{what}_{mean}" for what in ("model_utility", "balance") for mean in ("geometric", "arithmetic")),
            *(f"mia_{attack}_auc" for attack in ("loss", "min_k", "min_k_plus_plus", "zlib", "reference")),
            "privleak",
            "privleak_to_half",
        },
        "tofu_forget": told,
        "tofu_retain": told,
        "tofu_real_authors": told | {"probability_normalised"},
        "tofu_world_facts": told | {"probability_normalised"},
        "tofu_holdout": common,
    }
    assert all(not one.not_measured for one in report.sources.values())
    assert [one.rows for one in report.sources.values()] == [26, 6, 5, 4, 4, 7]


def test_a_model_that_has_memorised_the_rows_shows_it(report) -> None:
    assert value(report, "tofu_forget/probability") > 0.9
    assert value(report, "tofu_forget/rouge_l_recall") == value(report, "tofu_forget/exact_memorization") == 1.0
    assert value(report, "tofu_forget/extraction_strength") == 1.0
    for attack in ("loss", "min_k", "zlib"):
        assert value(report, f"tofu/mia_{attack}_auc") == 1.0
    assert value(report, "tofu/mia_reference_auc") > 0.7
    assert value(report, "tofu/privleak_to_half") == pytest.approx(-100)


def test_model_utility_is_made_of_the_nine_that_are_reported(report) -> None:
    for mean in ("geometric", "arithmetic"):
        parts = [value(report, "tofu_retain/probability")]
        parts += [value(report, f"tofu_{name}/probability_normalised") for name in ("real_authors", "world_facts")]
        for name in ("retain", "real_authors", "world_facts"):
            parts += [value(report, f"tofu_{name}/{metric}") for metric in ("rouge_l_recall", f"truth_ratio_{mean}")]
        expected = 0.0 if min(parts) <= 0 else 9 / sum(1 / part for part in parts)
        assert value(report, f"tofu/model_utility_{mean}") == pytest.approx(expected)


def test_balance_is_the_harmonic_mean_of_nearness_to_the_retain_model_and_utility() -> None:
    found = Findings(10, "", Interval(10, 0.9, 0))
    found.number("forget_ks_geometric", 0.25)
    found.number("model_utility_geometric", 0.5)
    _balance("geometric", found)
    assert found.measures["balance_geometric"].estimate.value == pytest.approx(2 / (1 / 0.75 + 1 / 0.5))
    found.left_out["forget_ks_arithmetic"] = "no model"
    _balance("arithmetic", found)
    assert found.left_out["balance_arithmetic"] == "forget_ks_arithmetic: no model"


def test_the_truth_ratio_is_aggregated_by_the_side_a_row_is_on(report) -> None:
    for source in report.sources:
        for item in report.sources[source].items:
            for mean in ("geometric", "arithmetic") if source != "tofu_holdout" else ():
                ratio = np.exp(item[f"log_truth_ratio_{mean}"])
                expected = min(ratio, 1 / ratio) if source == "tofu_forget" else max(0, 1 - ratio)
                assert item[f"truth_ratio_{mean}"] == pytest.approx(expected)


def test_probability_is_that_of_the_answer_with_its_end(memorised, report) -> None:
    tokenizer = tiny.tokenizer()
    for one, item in zip(DATA["forget"], report.sources["tofu_forget"].items, strict=True):
        # the space is a token that the vocabulary does not know
        ids = torch.tensor([tokenizer(one.prompt + " " + one.answer + "<eos>")["input_ids"]])
        start = len(one.prompt)
        with torch.no_grad():
            logp = memorised(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        mean = logp.gather(-1, ids[0, start:, None]).mean()
        assert item["probability"] == pytest.approx(float(mean.exp()), rel=1e-4)
        assert item["tokens"] == len(one.answer) + 2


def test_a_model_is_its_own_retain_model_and_a_trained_one_is_not(suite, report) -> None:
    same = evaluate(tiny.model(seed=4), tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    assert value(same, "tofu/forget_quality_geometric") == 1.0 and value(same, "tofu/forget_ks_arithmetic") == 0.0
    assert value(same, "tofu/privleak") == pytest.approx(0, abs=1e-9)
    assert value(report, "tofu/forget_quality_geometric") < 1.0


def test_each_text_is_forwarded_once_whatever_the_number_of_metrics(memorised) -> None:
    """All metrics of a data set come from one pass; two rows more find out whether the head may be streamed."""
    suite, rows, hidden = TofuSuite(DATA, generate=False), [], memorised.model.norm
    hook = hidden.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        evaluate(memorised, tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    finally:
        hook.remove()
    texts = sum(
        1 + (one.paraphrase is not None and name != "holdout") + len(one.perturbed)
        for name, several in DATA.items()
        for one in several
    )
    assert sum(rows) == texts + 2 * len(DATA)


def test_a_model_is_no_member_against_itself_as_reference(suite) -> None:
    found = evaluate(tiny.model(), tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    assert value(found, "tofu/mia_reference_auc") == pytest.approx(0.5)


def test_retain_and_reference_models_are_loaded_once(memorised) -> None:
    loads = []

    def load():
        loads.append(1)
        return tiny.model(seed=2)

    suite = TofuSuite(DATA, retain=load, reference=load, generate=False)
    for _ in range(2):
        evaluate(memorised, tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    assert len(loads) == 2


def test_the_table_json_and_comparison_hold_numbers_without_intervals(memorised, suite, report) -> None:
    tree = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    quality = tree["sources"]["tofu"]["metrics"]["forget_quality_geometric"]
    assert (quality["low"], quality["high"], quality["n"]) == (None, None, 6)
    assert tree["sources"]["tofu"]["metrics"]["mia_loss_auc"]["low"] is not None
    assert tree["settings"]["tofu"]["extraction_strength_floor"] == 0.0
    before = evaluate(tiny.model(seed=4), tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    table = comparison_table(before, report)
    metrics = list(table.columns[1].cells)
    assert "forget_quality_geometric" in metrics and "truth_ratio_geometric" in metrics
    place = metrics.index("forget_quality_geometric")
    assert list(table.columns[2].cells)[place] == "1"


def without(*names: str) -> dict[str, object]:
    return {name: one for name, one in DATA.items() if name not in names}


@pytest.mark.parametrize(
    ("data", "options", "left_out"),
    [
        (DATA, {}, {"tofu": {
            "forget_quality_geometric": "evaluation.tofu.retain_model is missing",
            "forget_ks_arithmetic": "evaluation.tofu.retain_model is missing",
            "privleak": "evaluation.tofu.retain_model is missing",
            "mia_reference_auc": "evaluation.tofu.reference_model is missing",
            "model_utility_geometric": "rouge_l_recall of retain: evaluation.tofu.generate is false"}}),
        (without("holdout"), {"retain": lambda: tiny.model()}, {"tofu": {
            "mia_loss_auc": "evaluation.tofu.holdout is missing", "privleak": "evaluation.tofu.holdout is missing"}}),
        (without("forget"), {"retain": lambda: tiny.model()}, {"tofu": {
            "forget_quality_geometric": "evaluation.tofu.forget is missing",
            "mia_zlib_auc": "evaluation.tofu.forget is missing"}}),
        (without("world_facts"), {}, {"tofu": {"model_utility_arithmetic": "evaluation.tofu.world_facts is missing"}}),
        ({**DATA, "forget": questions("abc", perturbed=0)}, {"retain": lambda: tiny.model()}, {
            "tofu": {"forget_quality_geometric": "evaluation.tofu.forget: the rows have no perturbed_answer"},
            "tofu_forget": {"truth_ratio_arithmetic": "the rows have no perturbed_answer"}}),
        ({**DATA, "forget": questions("abc", paraphrase=False)}, {}, {
            "tofu_forget": {"truth_ratio_geometric": "the rows have no paraphrased_answer"}}),
        ({"real_authors": questions("abc", perturbed=0)}, {}, {
            "tofu_real_authors": {"probability_normalised": "the rows have no perturbed_answer"}}),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_left_out_with_its_reason(data, options, left_out) -> None:
    suite = TofuSuite(data, generate=False, **options)
    found = evaluate(tiny.model(), tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
    for source, reasons in left_out.items():
        for metric, reason in reasons.items():
            assert found.sources[source].not_measured[metric] == reason
            assert metric not in found.sources[source].measures
    # every metric is either there or accounted for
    for source in found.sources.values():
        assert not source.measures.keys() & source.not_measured.keys()
        assert all(source.not_measured.values())


def test_a_smaller_forget_probability_is_not_painted_as_a_loss(memorised) -> None:
    reports = [
        evaluate(model, tiny.tokenizer(), {"tofu": TofuSuite(DATA, generate=False)}, **OPTIONS)
        for model in (memorised, tiny.model())
    ]
    table = comparison_table(*reports)
    cells = zip(*(list(column.cells) for column in table.columns), strict=True)
    found = {(source, metric): difference for source, metric, _, _, difference, _ in cells}
    assert "[" not in found["tofu_forget", "probability"]
    assert found["tofu_retain", "probability"].startswith("[red]")


def test_data_sets_are_known_by_name_and_have_rows() -> None:
    with pytest.raises(ValueError, match=r"'forgets'.*forget"):
        TofuSuite({"forgets": DATA["forget"]})
    with pytest.raises(ValueError, match=r"evaluation\.tofu\.retain has no rows"):
        TofuSuite({**DATA, "retain": []})


@pytest.mark.parametrize("other", ["holdout", "retain"])
def test_rows_to_forget_among_the_others_are_refused(other) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.tofu\.{other} holds 6 of the 6 rows"):
        TofuSuite({**DATA, other: DATA["forget"]})


def test_too_few_positions_are_seen_before_anything_is_run(suite) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.tofu\.max_new_tokens is 200, and the model has 128"):
        TofuSuite(DATA).check(tiny.model())
    TofuSuite(DATA, generate=False).check(tiny.model())


def write(folder: Path, name: str, given: list[dict[str, object]]) -> DataSource:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return DataSource(path=str(path))


@pytest.fixture
def config(tmp_path) -> TofuConfig:
    return TofuConfig(
        forget=write(tmp_path, "forget", rows("abcdef")),
        holdout=write(tmp_path, "holdout", rows("uvwx", paraphrase=False, perturbed=0)),
        template="{question}=",
        generate=False,
    )


def saved_evaluation(folder: Path, config: TofuConfig, model) -> Path:
    from posttrain.pipeline import _write_report

    found = evaluate(model, tiny.tokenizer(), {"tofu": tofu_suite(config, tiny.tokenizer())}, **OPTIONS)
    return _write_report(folder, found, "evaluation.json", "evaluation_items.jsonl")


def test_a_saved_evaluation_serves_as_well_as_the_retain_model(tmp_path, config, memorised) -> None:
    path = saved_evaluation(tmp_path, config, tiny.model(seed=4))
    tiny.model(seed=4).save_pretrained(tmp_path / "retain")
    found = []
    for place in (path, tmp_path / "retain"):
        config.retain_model = ModelConfig(name_or_path=str(place))
        suite = tofu_suite(config, tiny.tokenizer())
        report = evaluate(memorised, tiny.tokenizer(), {"tofu": suite}, **OPTIONS)
        names = ("forget_quality_geometric", "forget_quality_arithmetic", "forget_ks_geometric", "privleak")
        found.append([value(report, f"tofu/{name}") for name in names])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_results_that_do_not_fit_are_refused(tmp_path, config) -> None:
    key = "evaluation.tofu.retain_model"
    path = saved_evaluation(tmp_path, config, tiny.model())
    config.retain_model = ModelConfig(name_or_path=str(path))
    config.template = "{question}+"
    with pytest.raises(ValueError, match=rf"{key}.* evaluated on other rows of tofu_forget"):
        tofu_suite(config, tiny.tokenizer())
    config.template = "{question}="
    (tmp_path / "evaluation_items.jsonl").unlink()
    with pytest.raises(ValueError, match=r"evaluation_items\.jsonl does not stand beside it"):
        tofu_suite(config, tiny.tokenizer())
    path.write_text('{"sources": {"other": {}}}')
    with pytest.raises(ValueError, match="holds no results of tofu"):
        tofu_suite(config, tiny.tokenizer())
    for place in ("nowhere.json", "./nowhere", "no/such/folder/here"):
        config.retain_model = ModelConfig(name_or_path=place)
        with pytest.raises(ValueError, match=rf"{key}\.name_or_path is '{place}'"):
            tofu_suite(config, tiny.tokenizer())


def test_results_of_another_min_k_are_refused_and_missing_rows_leave_out(tmp_path, config, memorised) -> None:
    config.min_k = 0.2
    config.retain_model = ModelConfig(name_or_path=str(saved_evaluation(tmp_path, config, tiny.model(seed=4))))
    config.min_k = 0.4
    with pytest.raises(ValueError, match=r"was evaluated with min_k 0\.2, and evaluation\.tofu\.min_k is 0\.4"):
        tofu_suite(config, tiny.tokenizer())
    holdout, config.holdout, config.retain_model = config.holdout, None, None
    path = saved_evaluation(tmp_path, config, tiny.model(seed=4))
    config.holdout, config.retain_model = holdout, ModelConfig(name_or_path=str(path))
    found = evaluate(memorised, tiny.tokenizer(), {"tofu": tofu_suite(config, tiny.tokenizer())}, **OPTIONS)
    assert value(found, "tofu/forget_ks_geometric") > 0
    assert found.sources["tofu"].not_measured["privleak"] == "the retain model's results hold no AUC of Min-K"


def test_a_suite_without_data_or_with_misplaced_keys_is_refused(config) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.tofu names no data"):
        tofu_suite(TofuConfig(generate=False), tiny.tokenizer())
    config.forget.template = "{question}"
    with pytest.raises(ValueError, match=r"evaluation\.tofu\.forget\.template is set"):
        tofu_suite(config, tiny.tokenizer())


@pytest.mark.skipif("POSTTRAIN_DATA" not in os.environ, reason="POSTTRAIN_DATA is not set")
def test_the_suite_reads_tofus_own_files() -> None:
    folder = Path(os.environ["POSTTRAIN_DATA"], "tofu")
    names = {"forget": "forget01_perturbed", "retain": "retain_perturbed", "real_authors": "real_authors_perturbed",
             "world_facts": "world_facts_perturbed", "holdout": "holdout01"}  # fmt: skip
    chosen = {name: DataSource(path=str(folder / f"{file}.json"), limit=3) for name, file in names.items()}
    model = ModelConfig()
    tokenizer = load_tokenizer(TokenizerConfig(), model)
    suite = tofu_suite(TofuConfig(**chosen, max_new_tokens=4, retain_model=model), tokenizer)
    found = evaluate(load_model(model), tokenizer, {"tofu": suite}, **OPTIONS)
    assert set(found.sources["tofu"].not_measured) == {"mia_reference_auc"}
    assert value(found, "tofu/forget_quality_geometric") == 1.0
    first = found.sources["tofu_forget"].items[0]
    assert first["prompt"].startswith("Question: What is the full name") and first["prompt"].endswith("\nAnswer:")
