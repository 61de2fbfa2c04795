"""Adds ``shuffled_margin``, the reward margins over other pairs, to annotated pairs, and tells how good they are.

python launch/preference_margins.py ANNOTATED OUTPUT SEED
"""

import json
import random
import sys
from pathlib import Path


def main() -> None:
    annotated, output, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rows = [json.loads(line) for line in annotated.read_text(encoding="utf-8").splitlines()]
    margins = [row["reward_margin"] for row in rows]
    shuffled = random.Random(seed).sample(margins, len(margins))
    for row, margin in zip(rows, shuffled, strict=True):
        row["shuffled_margin"] = margin
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    wrong = sum(row["score_margin"] < 0 for row in rows)
    agreeing = sum((row["score_margin"] > 0) == (row["reward_margin"] > 0) for row in rows)
    found = {"pairs": len(rows), "wrong_labels": wrong, "reward_model_agrees_with_the_truth": agreeing / len(rows)}
    output.with_name(output.name + ".about.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{output.name}: {found}")


if __name__ == "__main__":
    main()
