"""What a comparison found: one result a run, as the report and the statistics read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "failed", "missing"]
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run, or one evaluation of a base before any training.

    Whatever a run lacks is absent from its mappings (or None): a gap, never zero.

    Args:
        name: of the run, unique in the comparison; also its folder's.
        objective: label of the objective, with its grid's values, such as ``power(alpha=2)``; ``base`` for a base.
        base, data: labels of the comparison's ``bases`` and ``data``.
        seed: of the training.
        hyperparameters: what sets this run apart: the objective's own settings by name, tuned, varied and overridden
            keys in full (``trainer.learning_rate``).
        status: ``missing`` is a run that has not ended yet.
        error: one line on why it failed.
        folder: where its files are.
        metrics: ``source/metric`` -> value on the test data after training.
        items: source -> metric -> one value per test item, in the order of the rows; NaN where the item has none.
            Per-token metrics are means over the item's ``tokens``, which stand beside them as a metric of their own, as
            do ``samples`` and ``samples_correct`` where completions were sampled.
        curves: logged metric -> (optimizer step, value), oldest first.
        during: ``source/metric`` -> (optimizer step, value) on the test data; step 0 is the base, the last is the
            evaluation after training. Empty unless ``evaluation.every`` is set.
        reliability: source -> one row a confidence bin: ``low``, ``high``, ``count``, ``confidence`` and ``accuracy``,
            the last two None in an empty bin.
        probability_histogram: source -> test tokens by the probability of the target, in equal bins over [0, 1].
        pass_at_k: source -> k -> pass@k for every k up to the number of samples.
        seconds: of training, without loading and evaluation; None where it ran in several parts.
        peak_memory_bytes: of training in the main process: allocated on the device, or resident where there is none.
    """

    name: str
    objective: str
    base: str
    data: str
    seed: int
    folder: Path
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "missing"
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    curves: Mapping[str, Points] = field(default_factory=dict)
    during: Mapping[str, Points] = field(default_factory=dict)
    reliability: Mapping[str, Sequence[Mapping[str, float | int | None]]] = field(default_factory=dict)
    probability_histogram: Mapping[str, Sequence[int]] = field(default_factory=dict)
    pass_at_k: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison, as `posttrain.experiments.report.write_report` takes it.

    Args:
        question: in the user's words.
        settings: what the runs share and how they were made: ``run`` (the configuration all runs start from, without
            what the comparison replaces), ``objectives``, ``seeds``, ``steps`` (``base/data`` -> optimizer steps) and,
            where given, ``budget``, ``bases``, ``data``, ``vary``, ``tune`` and ``overrides_for``.
        runs: in the order of the grid: base, data, objective, seed.
        before: (base, data) -> the base's own evaluation, as far as there is one.
        trials: of tuning: ``objective``, ``base``, ``data``, ``hyperparameters``, ``metric``, ``value`` (None for a
            failure), ``status``, ``error`` and ``chosen``.
        command: to repeat it.
        versions, hardware: name -> text, of the machine the runs ran on.
        date: ISO date of the last run.
    """

    question: str
    settings: Mapping[str, Any]
    runs: Sequence[RunResult]
    before: Mapping[tuple[str, str], RunResult] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
