"""Formats of binary feedback to prompt, completion and label: hand-written rows in, hand-written rows out."""

import itertools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars

from posttrain.config import DataSource
from posttrain.data import binary_formats, sources
from posttrain.data.preparation import number_rows
from posttrain.loading import load_rows
from tests import tiny

USER, TWO, THREE = ({"role": role, "content": content} for role, content in
                    (("user", "1+1"), ("assistant", "2"), ("assistant", "3")))  # fmt: skip
PLAIN = {"prompt": "1+1=", "completion": "2", "label": True}
CHAT = {"prompt": [USER], "completion": [TWO], "label": True}
BOTH_CLASSES = [PLAIN, PLAIN | {"completion": "3", "label": False}]


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def prepared(rows: list[dict[str, Any]], *, streaming: bool = False, **options: Any) -> list[dict[str, Any]]:
    given = number_rows(Dataset.from_list(rows))
    return list(
        binary_formats.prepare(given.to_iterable_dataset() if streaming else given, key="data.train", **options)
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (PLAIN | {"weight": 0.5}, {}, PLAIN | {"weight": 0.5}),
        (CHAT, {}, CHAT),
        (PLAIN | {"label": 1}, {}, PLAIN),
        (PLAIN | {"label": 0.0}, {}, PLAIN | {"label": False}),
        ({"q": "1+1", "completion": "2", "label": True}, {"template": "{q}="}, PLAIN | {"q": "1+1"}),
        (
            {"messages": [USER, TWO, USER, THREE], "label": False},
            {},
            {"prompt": [USER, TWO, USER], "completion": [THREE], "label": False},
        ),
        (
            {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}], "label": True},
            {},
            CHAT,
        ),
        (
            {"instruction": "1+1", "output": "2", "label": True, "id": 7},
            {},
            PLAIN | {"prompt": "Instruction:\n1+1\nResponse:\n", "id": 7},
        ),
        ({"instruction": "1+1", "input": "", "response": "2", "label": True}, {"chat": True}, CHAT),
        (PLAIN | {"text": "a", "score": 2}, {}, PLAIN | {"score": 2}),
    ],
)
def test_rows_become_a_prompt_a_completion_and_a_label(
    row: dict[str, Any], options: dict[str, Any], expected: dict[str, Any], streaming: bool
) -> None:
    (found,) = prepared([row], streaming=streaming, **options)
    assert found == expected | {"row_number": 0}
    assert type(found["label"]) is bool


PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "options", "prompt", "chosen", "rejected"),
    [
        (PAIR, {}, "1+1=", "2", "3"),
        (
            {"instruction": "1+1", "chosen": "2", "rejected": "3"},
            {"format": "instruction", "chat": True},
            [USER],
            [TWO],
            [THREE],
        ),
        ({"conversations": [USER], "chosen": TWO, "rejected": THREE}, {"format": "sharegpt"}, [USER], [TWO], [THREE]),
        (
            {"chosen": "Human: a\n\nAssistant: 2", "rejected": "Human: a\n\nAssistant: 3"},
            {},
            "Human: a\n\nAssistant:",
            " 2",
            " 3",
        ),
        ({"prompt": "1+1=", "answers": ["2", "3"], "scores": [1, 0]}, {}, "1+1=", "2", "3"),
    ],
)
def test_pairs_are_taken_apart(
    row: dict[str, Any], options: dict[str, Any], prompt: Any, chosen: Any, rejected: Any, streaming: bool
) -> None:
    rows = sorted(prepared([row], streaming=streaming, **options), key=lambda found: not found["label"])
    assert [(found["prompt"], found["completion"], found["label"], found["row_number"]) for found in rows] == [
        (prompt, chosen, True, 0), (prompt, rejected, False, 0)
    ]  # fmt: skip
    assert not {"chosen", "rejected"} & set(rows[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_either_completion_become_the_rows_own(streaming: bool) -> None:
    row = PAIR | {"chosen_score": 2, "rejected_score": 0.5, "model_chosen": "a", "model_rejected": "b", "id": 7}
    chosen, rejected = sorted(prepared([row], streaming=streaming), key=lambda found: not found["label"])
    common = {"prompt": "1+1=", "id": 7, "row_number": 0, "score_margin": 1.5}
    assert chosen == common | {"completion": "2", "label": True, "score": 2, "model": "a"}
    assert rejected == common | {"completion": "3", "label": False, "score": 0.5, "model": "b"}


def test_a_swapped_pair_swaps_its_labels() -> None:
    rows = prepared([PAIR | {"chosen_score": 0.5, "rejected_score": 2}], inverted="swap")
    assert {row["completion"]: (row["label"], row["score"]) for row in rows} == {"3": (True, 2), "2": (False, 0.5)}


MANY = [{"prompt": f"{number}=", "chosen": "good", "rejected": "bad"} for number in range(200)]


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_taken_apart_are_shuffled_by_the_seed(streaming: bool) -> None:
    rows = prepared(MANY, streaming=streaming, shuffle_seed=3)
    assert len(rows) == 400 and Counter(row["label"] for row in rows) == {True: 200, False: 200}
    numbers = [row["row_number"] for row in rows]
    # by chance two rows in 400 follow each other; adjacent by construction would be 200
    assert sum(first == second for first, second in itertools.pairwise(numbers)) < 12
    batches = [[row["label"] for row in rows[start : start + 20]] for start in range(0, 400, 20)]
    assert all(0 < sum(batch) < 20 for batch in batches)
    assert rows == prepared(MANY, streaming=streaming, shuffle_seed=3)
    assert rows != prepared(MANY, streaming=streaming, shuffle_seed=4)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([PLAIN], {"format": "text"}, "Unknown data.train.format: 'text'"),
        ([{"prompt": "a", "completion": "b", "lable": True}], {}, "needs .*'label'.*did you mean 'lable'"),
        ([{"text": "a", "label": True}], {}, "reads as format 'text', which has no prompt and completion"),
        ([{"question": "a", "label": True}], {}, "fit no format"),
        ([PLAIN, PLAIN | {"label": None}], {}, "row 1: label is None; give true or false, or 1 or 0"),
        ([PLAIN | {"label": "true"}], {}, "row 0: label is 'true'"),
        ([PLAIN | {"label": 2}], {}, "row 0: label is 2"),
        ([PLAIN | {"label": -1}], {}, "row 0: label is -1"),
        ([{"messages": [USER], "label": True}], {}, "row 0: the conversation does not end with"),
        ([{"messages": [USER, TWO, USER], "label": True}], {}, "row 0: the conversation does not end with"),
        ([{"messages": [TWO], "label": True}], {}, "row 0: the conversation does not end with"),
        ([PLAIN | {"completion": None}], {"format": "prompt-completion"}, "row 0: completion is missing"),
        ([PAIR | {"label": True}], {}, "a column 'label', and there is one already"),
        (
            [PAIR | {"chosen_score": 1, "rejected_score": 0, "score": 3}],
            {},
            "a column 'score', and there is one already",
        ),
        (
            [PAIR | {"chosen_a": 1, "rejected_a": 0, "a_chosen": 3, "a_rejected": 3}],
            {},
            "a column 'a', and there is one",
        ),
    ],
)
def test_what_does_not_fit_is_named(rows: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        prepared(rows, **options)
    assert "data.train" in str(caught.value)


def test_empty_completions_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert len(prepared([*BOTH_CLASSES, PLAIN | {"completion": " "}])) == 2
    assert caplog.messages == ["Skipped 1 of 3 rows of data.train, each because its completion is empty: rows 2."]


def test_both_classes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        prepared([*BOTH_CLASSES, PLAIN])
    assert "2 desirable and 1 undesirable rows in data.train." in caplog.messages


@pytest.mark.parametrize("streaming", [False, True])
def test_one_class_alone_is_warned_about(caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    prepared([PLAIN] * 150, streaming=streaming)
    (said,) = caplog.messages
    shown = "100 desirable and 0 undesirable rows in the streamed data.train so far: one class alone"
    assert said.startswith(
        shown if streaming else "150 desirable and 0 undesirable rows in data.train: one class alone"
    )


def test_a_source_is_read_by_the_method(tmp_path: Path) -> None:
    Dataset.from_list(MANY).to_json(tmp_path / "a.jsonl")
    source = DataSource(path=str(tmp_path / "a.jsonl"), limit=50, shuffle_seed=5)
    rows = load_rows(source, tiny.tokenizer(), key="data.train", method="binary_feedback")
    assert set(rows.column_names) == {"prompt", "completion", "label", "row_number"} and len(rows) == 100
    assert rows[:] == Dataset.from_list(prepared(MANY[:50], shuffle_seed=5))[:]


@pytest.mark.skipif("POSTTRAIN_DATA" not in os.environ, reason="POSTTRAIN_DATA is not set")
@pytest.mark.parametrize(
    ("name", "desirable", "undesirable"),
    [
        ("demo/kto_en_demo.json", 150, 150),
        ("demo/dpo_en_demo.json", 300, 300),
        ("graded/webgpt.test.json", 901, 901),
        ("short_pairs/instruction-data-with-preference.json", 1094, 1094),
    ],
)
def test_real_feedback_is_read_in_full(name: str, desirable: int, undesirable: int) -> None:
    source = DataSource(path=str(Path(os.environ["POSTTRAIN_DATA"], "preference", name)))
    rows = binary_formats.prepare(sources.load(source))
    assert Counter(rows["label"]) == {True: desirable, False: undesirable}
