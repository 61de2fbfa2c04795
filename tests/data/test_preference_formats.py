"""Formats of pairs to prompt, chosen and rejected: hand-written rows in, hand-written rows out."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars

from posttrain.config import DataSource, from_tree
from posttrain.config.load import check_source
from posttrain.data import formats, preference_formats, sources
from posttrain.data.preparation import number_rows
from posttrain.loading import load_rows
from tests import tiny

SYSTEM = {"role": "system", "content": "Add."}
USER, TWO, THREE = ({"role": role, "content": content} for role, content in
                    (("user", "1+1"), ("assistant", "2"), ("assistant", "3")))  # fmt: skip
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
CHAT = {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]}


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()


def prepared(rows: list[dict[str, Any]], *, streaming: bool = False, **options: Any) -> list[dict[str, Any]]:
    given = number_rows(Dataset.from_list(rows))
    return list(
        preference_formats.prepare(given.to_iterable_dataset() if streaming else given, key="data.train", **options)
    )


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "row_number"} for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (PAIR | {"id": 7}, {}, PAIR | {"id": 7}),
        (CHAT | {"weight": 0.5}, {}, CHAT | {"weight": 0.5}),
        ({"prompt": 1.0, "chosen": 2, "rejected": 3}, {}, {"prompt": "1", "chosen": "2", "rejected": "3"}),
        (PAIR | {"completion": "x", "messages": [USER], "text": "y"}, {}, PAIR),
        ({"q": "1+1", "chosen": "2", "rejected": "3"}, {"template": "{q}="}, PAIR | {"q": "1+1"}),
        ({"chosen": [SYSTEM, USER, TWO], "rejected": [SYSTEM, USER, THREE]}, {}, CHAT | {"prompt": [SYSTEM, USER]}),
        ({"prompt": "1+1", "chosen": [USER, TWO], "rejected": [USER, THREE]}, {}, CHAT),
        ({"prompt": [USER], "chosen": [USER, TWO], "rejected": [USER, THREE]}, {}, CHAT),
        (
            {"chosen": [USER, TWO, USER, TWO], "rejected": [USER, TWO, SYSTEM, TWO]},
            {},
            {"prompt": [USER], "chosen": [TWO, USER, TWO], "rejected": [TWO, SYSTEM, TWO]},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "1+1"}], "system": "Add.",
                "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"},
            },
            {},
            CHAT | {"prompt": [SYSTEM, USER]},
        ),
        ({"messages": [USER], "chosen": TWO, "rejected": THREE}, {}, CHAT),
        ({"conversations": [USER], "chosen": "2", "rejected": "3"}, {}, CHAT),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2", "chosen": "2", "rejected": "3"},
            {},
            PAIR | {"prompt": "Instruction:\nAdd.\nInput:\n1+1\nResponse:\n", "output": "2"},
        ),
        (
            {"instruction": "1+1", "input": "", "chosen": "2", "rejected": "3"},
            {"chat": True},
            CHAT,
        ),
        (
            {"instruction": "1+1", "input": "", "chosen": "2", "rejected": "3"},
            {"chat": True, "template": "{instruction}="},
            PAIR,
        ),
        (
            {"chosen": "\n\nHuman: 1+1\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1\n\nAssistant: 3"},
            {},
            {"prompt": "\n\nHuman: 1+1\n\nAssistant:", "chosen": " 2", "rejected": " 3"},
        ),
        (
            {
                "chosen": "Add.\n\nHuman: 1+1\n\nAssistant: 2\n\nHuman: 1+1\n\nAssistant: 2",
                "rejected": "Add.\n\nHuman: 1+1\n\nAssistant: 2\n\nHuman: 1+1\n\nAssistant: 3",
            },
            {"chat": True},
            CHAT | {"prompt": [SYSTEM, USER, TWO, USER]},
        ),
        (
            # only chosen goes on after the answer
            {"chosen": "Human: a\n\nAssistant: 2\n\nHuman: b\n\nAssistant: 4", "rejected": "Human: a\n\nAssistant: 3"},
            {},
            {"prompt": "Human: a\n\nAssistant:", "chosen": " 2\n\nHuman: b\n\nAssistant: 4", "rejected": " 3"},
        ),
    ],
)  # fmt: skip
def test_rows_become_prompts_and_two_completions(
    row: dict[str, Any], options: dict[str, Any], expected: dict[str, Any], streaming: bool
) -> None:
    assert plain(prepared([row], streaming=streaming, **options)) == [expected]


GRADED = {
    "text": [f"## Human:\n1+1\n\n## Assistant:\n{answer}" for answer in "2453"],
    "score": [2.0, 1, None, 0.5],
    "id": 7,
}


@pytest.mark.parametrize("streaming", [False, True])
def test_two_scored_answers_are_a_pair_in_the_order_given(streaming: bool) -> None:
    row = {"text": GRADED["text"][:2][::-1], "score": [1.0, 2.0]}
    assert prepared([row], streaming=streaming) == [
        {
            "prompt": "## Human:\n1+1\n\n## Assistant:\n", "chosen": "4", "rejected": "2", "row_number": 0,
            "chosen_score": 1, "rejected_score": 2, "score_margin": -1,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            "all",
            [("2", "4", 1), ("2", "5", None), ("2", "3", 1.5), ("4", "5", None), ("4", "3", 0.5), ("5", "3", None)],
        ),
        ("best_worst", [("2", "3", 1.5)]),
    ],
)
def test_several_scored_answers_give_all_pairs_or_the_widest(
    pairs: str, expected: list[tuple[str, str, float | None]], streaming: bool
) -> None:
    rows = prepared([GRADED, GRADED], streaming=streaming, pairs=pairs, chat=True)
    found = [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["score_margin"]) for row in rows]
    assert found == 2 * expected
    assert {row["id"] for row in rows} == {7}
    assert [row["row_number"] for row in rows] == [0] * len(expected) + [1] * len(expected)
    assert all(row["prompt"] == [USER] for row in rows)


@pytest.mark.parametrize(
    ("row", "options", "prompt", "chosen"),
    [
        ({"prompt": "1+1=", "answers": ["2", "3"]}, {}, "1+1=", "2"),
        ({"prompt": [USER], "responses": ["2", "3"]}, {}, [USER], [TWO]),
        ({"prompt": [USER], "answers": [[TWO], [THREE]]}, {}, [USER], [TWO]),
        ({"instruction": "1+1", "completions": ["2", "3"]}, {"chat": True}, [USER], [TWO]),
        ({"q": "1+1", "answers": ["2", "3"]}, {"template": "{q}="}, "1+1=", "2"),
    ],
)
def test_scored_answers_may_have_their_prompt_beside_them(
    row: dict[str, Any], options: dict[str, Any], prompt: Any, chosen: Any
) -> None:
    (found,) = prepared([row | {"scores": [1, 0]}], **options)
    assert (found["prompt"], found["chosen"]) == (prompt, chosen)


def test_rows_with_one_answer_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    one = {"prompt": "1+1=", "answers": ["2", "3"], "scores": [1.0, None]}
    two = {"prompt": "1+1=", "answers": ["2", "3"], "scores": [1.0, 2.0]}
    assert [row["row_number"] for row in prepared([one, two], pairs="best_worst")] == [1]
    assert (
        "Skipped 1 of 2 rows of data.train, each because it has fewer than two scored answers: rows 0." in caplog.text
    )


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"question": "a", "chosen": "b"}], {}, r"columns \['question', 'chosen'\], which fit no format of pairs"),
        ([PAIR], {"format": "preferense"}, "did you mean 'preference'"),
        ([{"prompt": "a", "chosen": "b", "rejcted": "c"}], {"format": "preference"}, "did you mean 'rejcted'"),
        ([{"chosen": "b", "rejected": "c"}], {"format": "sharegpt"}, "needs the column 'conversations'"),
        ([PAIR], {"format": "scored"}, "needs a column of answers and one of their scores"),
        ([PAIR], {"format": "dialogue", "template": "{prompt}"}, "has no prompt to fill"),
        ([PAIR], {"template": "{promt}"}, "template needs the column 'promt'"),
        ([PAIR, {"prompt": "a", "chosen": "b"}], {}, "row 1: rejected is missing"),
        ([PAIR, PAIR | {"prompt": None}], {}, "row 1: prompt is missing"),
        ([CHAT | {"prompt": "1+1"}], {}, "row 0: of the prompt and its completions one is text"),
        ([{"prompt": "2+2", "chosen": [USER, TWO], "rejected": [USER, THREE]}], {}, "row 0: prompt is not what"),
        ([{"chosen": [USER, TWO], "rejected": [SYSTEM, TWO]}], {}, "row 0: .* no prompt in common"),
        ([{"chosen": "a", "rejected": "b"}], {}, "row 0: .* no turn 'Assistant:' in common"),
        ([{"chosen": "Assistant: a", "rejected": "Assistant: b"}], {"chat": True}, "row 0: nothing stands before"),
        (
            [{"conversations": [USER], "chosen": {"role": "assistant"}, "rejected": TWO}],
            {},
            "row 0: message 0 of chosen",
        ),
        ([{"prompt": "a", "answers": ["b", "c"], "scores": [1.0]}], {}, "row 0: .* no lists of one length"),
        ([{"prompt": "a", "answers": ["b", "c"], "scores": ["1", "2"]}], {}, "row 0: scores holds '1'"),
        ([{"prompt": "a", "answers": ["b", None], "scores": [1, 2]}], {}, "row 0: answer 1 of answers is missing"),
    ],
)
def test_what_does_not_fit_is_named(rows: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        prepared(rows, **options)
    assert "data.train" in str(caught.value)


SKIPPED = [PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": " \n"}, PAIR | {"rejected": "2"}, PAIR]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_and_equal_completions_are_skipped_and_counted(caplog: pytest.LogCaptureFixture, streaming: bool) -> None:
    assert [row["row_number"] for row in prepared(SKIPPED, streaming=streaming)] == [0, 4]
    empty, equal = caplog.messages
    assert empty.startswith("Skipped 1 rows of the streamed" if streaming else "Skipped 2 of 5 rows of data.train")
    assert "completion is empty" in empty and "chosen and rejected are equal" in equal
    if not streaming:
        assert "rows 1, 2." in empty and "Skipped 1 of 3 rows" in equal and "rows 3." in equal


def test_pairs_of_one_row_are_counted_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "a", "answers": ["b", "b", "c"], "scores": [1, 1, 2]}
    assert len(prepared([row])) == 2
    assert "Skipped 1 of 3 rows of data.train, each because chosen and rejected are equal: rows 0." in caplog.messages


def test_pairs_of_messages_give_the_tokenizer_a_chat_template(tmp_path: Path) -> None:
    Dataset.from_list([CHAT, CHAT]).to_json(tmp_path / "a.jsonl")
    tokenizer = tiny.tokenizer()
    source = DataSource(path=str(tmp_path / "a.jsonl"), limit=1)
    rows = load_rows(source, tokenizer, key="data.train", method="preference")
    assert len(rows) == 1 and formats.holds_messages(rows) and tokenizer.chat_template is not None


def test_settings_of_pairs_are_checked_with_the_configuration() -> None:
    for name, wrong in (("pairs", "best"), ("inverted", "swop"), ("ties", "swap")):
        with pytest.raises(ValueError, match=rf"Unknown data\.train\.{name}: '{wrong}'"):
            check_source(DataSource(path="a", **{name: wrong}), "data.train")  # type: ignore[arg-type]
    for name, value in (("inverted", "swap"), ("shuffle_seed", 1)):
        with pytest.raises(ValueError, match=rf"data\.eval\.{name} is .* no meaning for the method supervised"):
            from_tree({"data": {"eval": {"path": "a", name: value}}})


def real(name: str, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[Any, str]:
    if "POSTTRAIN_DATA" not in os.environ:
        pytest.skip("POSTTRAIN_DATA is not set")
    source = DataSource(path=str(Path(os.environ["POSTTRAIN_DATA"], "preference", name)))
    with caplog.at_level(logging.INFO, logger="posttrain"):
        rows = preference_formats.prepare(sources.load(source), **options)
    return rows, caplog.text


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("name", "kept", "log"),
    [
        ("short_pairs/instruction-data-with-preference.json", 1094, "Skipped 6 of 1100 rows of data"),
        ("harmless/harmless-base-test.jsonl.gz", 2308, "Skipped 4 of 2312 rows of data"),
        ("demo/dpo_en_demo.json", 300, ""),
    ],
)
def test_real_pairs_are_read_in_full(
    name: str, kept: int, log: str, chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows, logged = real(name, caplog, chat=chat)
    assert len(rows) == kept and log in logged
    assert formats.holds_messages(rows) == (chat or name.startswith("demo"))
    assert {"prompt", "chosen", "rejected"} <= set(rows.column_names)


@pytest.mark.usefixtures("own_cache")
def test_real_graded_pairs_hold_ties_and_inverted_ones(caplog: pytest.LogCaptureFixture) -> None:
    rows, logged = real("graded/webgpt.test.json", caplog)
    assert len(rows) == 901
    margins = rows["score_margin"]
    assert (margins.count(0), sum(margin < 0 for margin in margins)) == (245, 308)
    assert (
        "245 of 901 rows of data have equal scores" in logged and "308 of 901 rows of data score the rejected" in logged
    )
    assert all(prompt.endswith("\n\n## Assistant:\n") for prompt in rows["prompt"])
