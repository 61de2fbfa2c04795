"""What a model that never saw the rows to forget scores on them: measured once, or read from an earlier evaluation."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.unlearning.metrics import MEANS
from posttrain.evaluation.unlearning.tokens import Array

LoadModel = Callable[[], CausalLM]


@dataclass(frozen=True, eq=False)
class RetainResults:
    """Results of a retain model.

    Args:
        log_truth_ratio: kind of mean -> (items,) of the rows to forget; empty where the rows allow none.
        auc: of Min-K, rows to forget against rows held out; None without these.
    """

    log_truth_ratio: Mapping[str, Array] = field(default_factory=dict)
    auc: float | None = None


def read_results(
    path: str | Path, suite: str, fingerprints: Mapping[str, str], key: str, *, min_k: float
) -> RetainResults:
    """Results from the .json of an evaluation and the items beside it.

    A source that was not evaluated then leaves out what needs it.

    Args:
        path: such as ``evaluation.json``, with ``evaluation_items.jsonl`` beside it.
        suite: ``tofu`` or ``muse``.
        fingerprints: source -> of its rows, which must be those that were evaluated then.
        key: where the path stands in the configuration, for messages.
        min_k: share of an answer's tokens that Min-K looks at, which must be that of then.

    Raises:
        ValueError: no such file or items, no results of the suite in it, or results on other rows or of another Min-K.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{key} is {str(path)!r}, and there is no such file; name a model or an evaluation's .json.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    sources: dict[str, Any] = found.get("sources", {})
    if suite not in sources:
        raise ValueError(f"{key} {str(path)!r} holds no results of {suite}; evaluate the retain model on it first.")
    for source, fingerprint in fingerprints.items():
        if source in sources and sources[source].get("fingerprint") != fingerprint:
            raise ValueError(
                f"{key} {str(path)!r} was evaluated on other rows of {source} (or with another template); evaluate the "
                "retain model with the same evaluation settings."
            )
    auc = sources[suite]["metrics"].get("mia_min_k_auc", {}).get("value")
    share = found.get("settings", {}).get(suite, {}).get("min_k")
    if auc is not None and share != min_k:
        raise ValueError(
            f"{key} {str(path)!r} was evaluated with min_k {share}, and evaluation.{suite}.min_k is {min_k}; evaluate "
            "the retain model with the same evaluation settings."
        )
    return RetainResults(_ratios(file, f"{suite}_forget", key), auc)


def _ratios(file: Path, source: str, key: str) -> dict[str, Array]:
    items = file.with_name(f"{file.stem}_items.jsonl")
    if not items.is_file():
        raise ValueError(f"{key} is {file.name}, and {items.name} does not stand beside it; keep the two together.")
    with items.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["source"] == source]
    names = {mean: f"log_truth_ratio_{mean}" for mean in MEANS}
    return {
        mean: np.array([row[name] for row in rows])
        for mean, name in names.items()
        if rows and all(name in row for row in rows)
    }
