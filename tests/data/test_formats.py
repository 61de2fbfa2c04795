"""Formats to what TRL reads: hand-written rows in, hand-written rows out."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from trl import apply_chat_template

from posttrain.config import DataSource
from posttrain.data import formats, sources
from posttrain.data.preparation import number_rows
from tests import tiny

USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()


def prepared(rows: list[dict[str, Any]], *, streaming: bool = False, **options: Any) -> list[dict[str, Any]]:
    given = number_rows(Dataset.from_list(rows))
    found = formats.prepare(given.to_iterable_dataset() if streaming else given, key="data.train", **options)
    return [{name: value for name, value in row.items() if name != "row_number"} for row in found]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "a", "completion": "b", "score": 1.5}, {}, {"prompt": "a", "completion": "b", "score": 1.5}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {}, {"prompt": [USER], "completion": [ASSISTANT]}),
        ({"messages": [USER, ASSISTANT], "label": 1}, {}, {"messages": [USER, ASSISTANT], "label": 1}),
        ({"messages": [USER, ASSISTANT], "prompt": "1+1"}, {}, {"messages": [USER, ASSISTANT]}),
        (
            {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}], "id": 7},
            {},
            {"messages": [USER, ASSISTANT], "id": 7},
        ),
        (
            {"conversations": [USER, ASSISTANT], "system": "Add."},
            {},
            {"messages": [{"role": "system", "content": "Add."}, USER, ASSISTANT]},
        ),
        ({"text": "abc", "weight": 2}, {}, {"text": "abc", "weight": 2}),
        ({"input_ids": [1, 2], "labels": [1, 2]}, {}, {"input_ids": [1, 2], "labels": [1, 2]}),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            {},
            {"prompt": "Instruction:\nAdd.\nInput:\n1+1\nResponse:\n", "completion": "2"},
        ),
        (
            {"instruction": "Add.", "response": "2"},
            {},
            {"prompt": "Instruction:\nAdd.\nResponse:\n", "completion": "2"},
        ),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            {"chat": True},
            {"prompt": [{"role": "user", "content": "Add.\n\n1+1"}], "completion": [ASSISTANT]},
        ),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            {"template": "{instruction} {input}=", "chat": True},
            {"prompt": "Add. 1+1=", "completion": "2"},
        ),
        (
            {"question": "1+1", "completion": "2", "level": 3},
            {"template": "Q: {question} ({level}) {{}}\nA:"},
            {"prompt": "Q: 1+1 (3) {}\nA:", "question": "1+1", "completion": "2", "level": 3},
        ),
        (
            {"prompt": "1+1", "completion": "2"},
            {"template": "{prompt}="},
            {"prompt": "1+1=", "completion": "2"},
        ),
        ({"prompt": 1.5, "completion": 51.0}, {}, {"prompt": "1.5", "completion": "51"}),
        ({"prompt": "a", "answer": "b"}, {"training": False}, {"prompt": "a", "answer": "b"}),
        ({"prompt": "a", "completion": ""}, {"training": False}, {"prompt": "a", "completion": ""}),
    ],
)
def test_rows_become_what_trl_reads(
    row: dict[str, Any], options: dict[str, Any], expected: dict[str, Any], streaming: bool
) -> None:
    assert prepared([row], streaming=streaming, **options) == [expected]


def test_grade_school_maths_needs_only_a_renaming_and_a_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "How many?", "answer": "1+1=2\\n#### 2"}\n')
    source = DataSource(path=str(tmp_path / "a.jsonl"), columns={"answer": "completion"}, template="Q: {question}\nA:")
    rows = formats.prepare(sources.load(source), template=source.template)
    assert (rows[0]["prompt"], rows[0]["completion"]) == ("Q: How many?\nA:", "1+1=2\n#### 2")


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"question": "a", "answer": "b"}], {}, r"columns \['question', 'answer'\], which fit no format"),
        ([{"prompt": "a", "answer": "b"}], {}, "fit no format"),
        ([{"prompt": "a", "competion": "b"}], {"format": "prompt-completion"}, "did you mean 'competion'"),
        ([{"prompt": "a", "completion": "b"}], {"format": "mesages"}, "did you mean 'messages'"),
        ([{"prompt": "a", "completion": "b"}], {"format": "scored"}, "format 'scored' is for several scored answers"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{promt}"}, "template needs the column 'promt'"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prompt"}, "is no format string"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{}"}, "name a column"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prompt.upper}"}, "name a column"),
        ([{"text": "a"}], {"template": "{text}", "format": "text"}, "has no prompt to fill"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, "data.train, row 1: completion is missing"),
        ([{"prompt": "a", "completion": "b"}, {"completion": "a"}], {}, "data.train, row 1: prompt is missing"),
        ([{"prompt": "a", "completion": [ASSISTANT]}], {}, "row 0: of prompt and completion one is text"),
        ([{"messages": [USER, ASSISTANT]}, {"messages": []}], {}, r"row 1: messages is \[\]"),
        ([{"messages": [{"role": "user"}]}], {}, r"row 0: message 0 of messages has the keys \['role'\]"),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], {}, "row 0: message 1 .* no content"),
        ([{"instruction": "a", "output": None}, {"instruction": "a", "output": "b"}], {}, "row 0: output is missing"),
        ([{"text": True}], {}, "row 0: text is True"),
    ],
)
def test_what_does_not_fit_is_named(rows: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        prepared(rows, **options)
    assert "data.train" in str(caught.value)


EMPTY = [
    {"prompt": "a", "completion": "1"},
    {"prompt": "b", "completion": ""},
    {"prompt": "c", "completion": " \n"},
    {"prompt": "d", "completion": "2"},
]


def test_empty_completions_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        assert [row["prompt"] for row in prepared(EMPTY)] == ["a", "d"]
    assert caplog.messages == ["Skipped 2 of 4 rows of data.train, each because its completion is empty: rows 1, 2."]


def test_empty_completions_of_a_stream_are_reported_as_they_come(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        assert [row["prompt"] for row in prepared(EMPTY, streaming=True)] == ["a", "d"]
    assert len(caplog.messages) == 1 and "Skipped 1 rows of the streamed data.train" in caplog.messages[0]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "completion"),
        ({"messages": [USER]}, "completion"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": " "}]}, "completion"),
        ({"text": ""}, "text"),
    ],
)
def test_rows_with_nothing_to_train_are_never_all_that_is_left(row: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"data.train has no row left: all 2 were skipped, each because its {what} is"):
        prepared([row, row])


def test_the_plain_chat_template_closes_turns_and_leaves_prompts_open() -> None:
    tokenizer = tiny.tokenizer()
    formats.ensure_chat_template(tokenizer)
    row = apply_chat_template({"messages": [USER, ASSISTANT]}, tokenizer)
    assert row["text"] == "User:\n1+1\nAssistant:\n2<eos>\n"
    opened = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert opened == "User:\n1+1\nAssistant:\n" and row["text"].startswith(opened)


def test_the_plain_chat_template_marks_what_the_assistant_says() -> None:
    tokenizer = tiny.tokenizer()
    formats.ensure_chat_template(tokenizer)
    found = tokenizer.apply_chat_template(
        [USER, ASSISTANT, USER, ASSISTANT], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.convert_ids_to_tokens(marked) == ["2", "<eos>", "2", "<eos>"]


def test_a_chat_template_of_the_tokenizers_own_stays() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    formats.ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == "{{ messages }}"


def test_rows_of_messages_are_told_from_text() -> None:
    def rows(row: dict[str, Any]) -> Dataset:
        return Dataset.from_list([row])

    assert formats.holds_messages(rows({"messages": [USER]}))
    assert formats.holds_messages(rows({"prompt": [USER], "completion": [ASSISTANT]}))
    assert not formats.holds_messages(rows({"prompt": "a", "completion": "b"}))
    assert not formats.holds_messages(rows({"text": "a"}))
