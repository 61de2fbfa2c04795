"""The README's Python snippets run as they are printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_nothing_is_left_to_fill_in():
    assert len(SNIPPETS) >= 2
    assert "@@" not in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_every_objective_is_in_the_table():
    from posttrain import objectives

    text = README.read_text(encoding="utf-8")
    assert [name for name in objectives.names() if f"`{name}`" not in text] == []
