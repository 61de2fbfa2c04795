"""A second completion for prompts: a refusal each, drawn once."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from posttrain.config import DataSource
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.sources import columns_of, load


def read_refusals(source: DataSource, *, key: str = "data.refusal") -> list[str]:
    """Texts from a plain text file, one a line (.txt, or lines that are no JSON), or from a data source's rows.

    Raises:
        ValueError: no such file, no text in it, or rows whose columns do not tell which one holds the texts.
    """
    path = Path(source.path or "").expanduser()
    if source.path and path.is_file() and path.suffix in (".txt", ".jsonl"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines and not lines[0].startswith("{"):
            return [json.loads(line) if line.startswith('"') else line for line in lines][: source.limit]
    rows = load(source, key=key)
    names = columns_of(rows)
    column = next((name for name in ("completion", "text") if name in names), names[0] if len(names) == 1 else None)
    if column is None:
        raise ValueError(f"{key} has the columns {names}; name the one with the texts `completion` by {key}.columns.")
    return [str(row[column]) for row in rows]


def with_refusals(rows: Dataset, numbers: Sequence[int], refusals: Sequence[str], *, seed: int) -> Dataset:
    """The prompts of the rows of these numbers, each with a refusal in place of its completion.

    Args:
        rows: with ``prompt`` (text or messages), ``completion`` and their number.
        numbers: of the rows wanted, in this order.
        refusals: texts to draw from, one a row and the same for a row in every epoch.
        seed: of the draw, in which a row's own number alone counts: other rows may come, go and change places.

    Raises:
        ValueError: rows without a prompt, or no refusals.
    """
    if "prompt" not in rows.column_names:
        raise ValueError("a term asks for refusals, and the rows hold no `prompt` to give them to; split the rows.")
    if not refusals:
        raise ValueError("data.refusal holds no text; give at least one refusal.")
    position = {number: index for index, number in enumerate(rows[ROW_NUMBER])}
    chosen = rows.select([position[number] for number in numbers])
    drawn = [random.Random(f"{seed} {number}").choice(refusals) for number in numbers]

    def answer(row: dict[str, Any], index: int) -> dict[str, Any]:
        if isinstance(row["prompt"], str):
            space = " " if row["completion"][:1] == " " else ""
            return {"completion": space + drawn[index]}
        return {"completion": [{"role": "assistant", "content": drawn[index]}]}

    return chosen.map(answer, with_indices=True)
