"""Rows of the reproductions that no procedural task gives: answers in an unknown form, and answers that are wrong.

- spelled_addition: sums whose digits are spelled out, "one zero eight" for 108. The base adds well and has never seen
  such an answer, so that it finds the targets all but impossible: the weak end of the capability continuum.
- noisy_subtraction: a share of the completions is that of another problem with another answer. The same rows are
  corrupted at 20 % and at 40 %, the latter and more.
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from posttrain.data import procedural

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_ROWS = 6400
TEST_ROWS = 200
NOISE_PERCENT = (20, 40)

Row = dict[str, str]


def spelled(row: Mapping[str, str]) -> Row:
    """An addition row with its answer's digits as words."""
    answer = " ".join(DIGITS[int(digit)] for digit in row["answer"])
    return {"prompt": row["prompt"], "completion": answer, "answer": answer}


def corrupted(rows: list[Row], percent: int, seed: int) -> list[Row]:
    """The rows with `percent` of the completions wrong; a lower share corrupts a subset of a higher one's rows."""
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    result = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    for index in order[: len(rows) * percent // 100]:
        wrong = rng.choice(rows)["completion"]
        while wrong == rows[index]["completion"]:
            wrong = rng.choice(rows)["completion"]
        result[index]["completion"] = wrong
    return result


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sums = procedural.generate("addition", seed=100, split="train")
    write(folder / "spelled_addition_train.jsonl", map(spelled, islice(sums, TRAIN_ROWS)))
    tests = procedural.make("addition", size=TEST_ROWS, seed=7, split="test")
    write(folder / "spelled_addition_test.jsonl", map(spelled, tests))
    differences = list(islice(procedural.generate("subtraction", seed=100, split="train"), TRAIN_ROWS))
    for percent in NOISE_PERCENT:
        write(folder / f"noisy_subtraction_{percent}.jsonl", corrupted(differences, percent, seed=1))


if __name__ == "__main__":
    main()
