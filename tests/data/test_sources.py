"""Reading rows: every kind of place, and what is said where nothing can be read."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars

from posttrain.config import DataSource
from posttrain.data import sources
from posttrain.data.collation import ROW_NUMBER

ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(path: Path | str, **options: Any) -> Any:
    return sources.load(DataSource(path=str(path), **options), key="data.train")


def plain(rows: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != ROW_NUMBER} for row in rows]


def write(folder: Path, name: str) -> Path:
    path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith(".parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    elif name.endswith(".csv"):
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    else:
        text = lines if ".jsonl" in name else json.dumps(ROWS)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_files_of_every_kind_give_the_same_numbered_rows(tmp_path: Path, name: str, streaming: bool) -> None:
    rows = load(write(tmp_path, name), streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert plain(rows) == ROWS
    assert [row[ROW_NUMBER] for row in rows] == [0, 1, 2, 3, 4]
    assert sources.columns_of(rows) == ["question", "answer"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit_and_a_slice_cut_from_the_start(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path, "a.jsonl")
    assert plain(load(path, limit=2, streaming=streaming)) == ROWS[:2]
    assert plain(load(path, limit=50, streaming=streaming)) == ROWS
    if not streaming:
        assert plain(load(path, split="test[:3]")) == ROWS[:3]


def test_a_saved_folder_is_read_by_split(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert plain(load(tmp_path / "one")) == ROWS
    assert isinstance(load(tmp_path / "one", streaming=True), IterableDataset)
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "many")
    assert plain(load(tmp_path / "many", split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"data\.train\.split.*'tset'; did you mean 'test'"):
        load(tmp_path / "many", split="tset")


def test_columns_are_renamed_and_may_be_swapped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    assert sources.columns_of(load(path, columns={"answer": "completion"})) == ["question", "completion"]
    swapped = load(path, columns={"answer": "question", "question": "answer"})
    assert plain(swapped)[0] == {"question": "a0", "answer": "q0"}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"anser": "completion"}, r"'anser', which is no column; did you mean 'answer'\? .*\['question', 'answer'\]"),
        ({"answer": "question"}, "'question', which is a column already"),
        ({"answer": "x", "question": "x"}, "two columns the same name"),
    ],
)
def test_a_wrong_renaming_is_refused(tmp_path: Path, columns: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(write(tmp_path, "a.jsonl"), columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("none/", None, "no such file or folder"),
        ("empty.jsonl", "", "is empty"),
        ("none.json", "[]", "cannot be read|has no rows"),
        ("broken.jsonl", '{"a": 1}\n{"a"\n', "cannot be read: .+"),
        ("rows.txt", "text", "expected a file that ends in .json"),
    ],
)
def test_an_unreadable_place_is_named(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert "data.train" in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_do_not_fit_the_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train\.name is 'main', which only a hub set has"):
        load(write(tmp_path, "a.jsonl"), name="main")
    with pytest.raises(ValueError, match="neither of path and task"):
        sources.load(DataSource(), key="data.train")


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="would ask the hub; set HF_HUB_OFFLINE=1")
def test_a_hub_set_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.train\.path 'no-such/set' cannot be read"):
        load("no-such/set")


def test_a_task_gives_its_rows() -> None:
    pytest.importorskip("reasoning_gym", reason="the evaluation extra is not installed")
    source = DataSource(task="addition", size=4, seed=1, split="test")
    rows = sources.load(source)
    assert len(rows) == 4 and {"prompt", "completion", "answer", "metadata"} <= set(sources.columns_of(rows))
    assert plain(rows) == plain(sources.load(source))
    with pytest.raises(ValueError, match=r"data\.eval: .*did you mean 'addition'"):
        sources.load(DataSource(task="adition", size=4), key="data.eval")
