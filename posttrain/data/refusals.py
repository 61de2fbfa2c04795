"""A second completion for prompts: a refusal each, drawn once."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from posttrain.data.collation import ROW_NUMBER


def with_refusals(rows: Dataset, numbers: Sequence[int], refusals: Sequence[str], *, seed: int) -> Dataset:
    """The prompts of the rows of these numbers, each with a refusal in place of its completion.

    Args:
        rows: with ``prompt`` (text or messages), ``completion`` and their number.
        numbers: of the rows wanted, in this order.
        refusals: texts to draw from, one a row and the same for a row in every epoch.
        seed: of the draw.

    Raises:
        ValueError: rows without a prompt, or no refusals.
    """
    if "prompt" not in rows.column_names:
        raise ValueError("a term asks for refusals, and the rows hold no `prompt` to give them to; split the rows.")
    if not refusals:
        raise ValueError("data.refusal holds no text; give at least one refusal.")
    position = {number: index for index, number in enumerate(rows[ROW_NUMBER])}
    chosen = rows.select([position[number] for number in numbers])
    generator = random.Random(seed)
    drawn = [generator.choice(refusals) for _ in range(len(chosen))]

    def answer(row: dict[str, Any], index: int) -> dict[str, Any]:
        if isinstance(row["prompt"], str):
            space = " " if row["completion"][:1] == " " else ""
            return {"completion": space + drawn[index]}
        return {"completion": [{"role": "assistant", "content": drawn[index]}]}

    return chosen.map(answer, with_indices=True)
