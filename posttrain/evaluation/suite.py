"""One call that evaluates a model on named row sets."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.evaluation import bootstrap, preference, verifiers, vllm
from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.generation import Sampling, complete
from posttrain.evaluation.harness import HarnessTask, run
from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.likelihood import Likelihood, likelihood
from posttrain.evaluation.passk import maj_at_k, pass_at_k
from posttrain.evaluation.plan import ACCEPTS, Plan
from posttrain.evaluation.progress import Advance, bar
from posttrain.evaluation.report import Measure, Report, SourceReport
from posttrain.evaluation.rows import Row, is_pair, prompt_ids, prompt_of, reference_of, require


@dataclass(frozen=True, eq=False)
class Source:
    """A row set to evaluate on.

    Args:
        rows: a `datasets.Dataset` or dictionaries, see `posttrain.evaluation.rows`.
        task: the procedural task that made the rows, if one did.
        verifier: `auto`, `exact`, `math` or `task`, see `verifiers.resolve`.
    """

    rows: Iterable[Row]
    task: str | None = None
    verifier: str = "auto"


@dataclass
class _Findings:
    """A source's results while they are gathered; measures are (statistic, row numbers)."""

    items: list[dict[str, Any]]
    measures: dict[str, tuple[bootstrap.Statistic, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    verifier: str | None = None
    correct: Any = None
    reliability: list[dict[str, float | int | None]] = field(default_factory=list)
    probability_histogram: list[int] = field(default_factory=list)


def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Source | HarnessTask | Benchmark | Iterable[Row]],
    *,
    metrics: Sequence[str] = ("generation", "likelihood"),
    samples: int = 8,
    k: Sequence[int] = (1, 8),
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    max_length: int | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    backend: str = "transformers",
    checkpoint: str | None = None,
    reference: Callable[[], CausalLM] | None = None,
    beta: float | None = None,
    progress: bool = False,
) -> Report:
    """Measure a model on every source; a source that allows only one kind of metric is measured in that one.

    `generation` gives pass@k, and maj@k for k > 1 (with temperature 0 and one sample pass@1 is greedy exact match),
    `likelihood` nll (nats/token), perplexity, mean_target_probability, token_accuracy, entropy (nats) and
    expected_calibration_error; for `preference` see `preference.Pairs`. Intervals are bootstrap percentiles over rows.

    Args:
        model, tokenizer: any Hugging Face causal language model, plain or PEFT; both come back as they were.
        sources: name -> `Source`, its rows, a task from `harness.load`, or a `Benchmark` (reported as several sources).
        metrics: any of `generation`, `likelihood` and `preference`.
        samples, temperature, top_p, max_new_tokens, batch_size, seed: see `generation.Sampling`; each k <= `samples`.
        max_length: longest row whose likelihood is measured, in tokens; None takes the model's positions.
        resamples, level: of the bootstrap intervals, seeded with `seed`.
        backend: what samples: `transformers`, or `vllm` where it is installed.
        checkpoint: the model's folder or hub name, which `vllm` loads.
        reference, beta: of `preference`: loads its reference; `preference.reward_beta`, None without calibration.
        progress: show progress bars.

    Raises:
        ValueError: a setting out of range; a source without rows or whose rows allow none of the metrics.
        ImportError: a verifier's package, or vllm where it is the backend, is not installed.
    """
    sampling = Sampling(samples, temperature, top_p, max_new_tokens, batch_size, seed)
    last = (max_length, resamples, level, progress, backend, checkpoint, reference, beta)
    plan = Plan(tuple(metrics), sampling, tuple(sorted(set(k))), *last)
    results: dict[str, SourceReport] = {}
    options: dict[str, Any] = {"batch_size": batch_size, "resamples": resamples, "level": level, "seed": seed}
    for name, source in sources.items():
        if isinstance(source, HarnessTask):
            results[name] = run(model, tokenizer, source, **options)
        elif isinstance(source, Benchmark):
            results |= source.run(model, tokenizer, **options, progress=progress)
        else:
            rows = source if isinstance(source, Source) else Source(source)
            results[name] = _evaluate_source(model, tokenizer, name, rows, plan)
    benchmarks = {name: source.settings for name, source in sources.items() if isinstance(source, Benchmark)}
    settings = {"metrics": list(metrics), **asdict(sampling), "k": list(plan.k), "max_length": max_length}
    return Report({**settings, "backend": backend, **options, **benchmarks}, results)


def _evaluate_source(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, name: str, source: Source, plan: Plan
) -> SourceReport:
    rows = list(source.rows)
    kinds = _measurable(name, rows, plan.metrics)
    found = _Findings([{"prompt": prompt_of(row), "reference": reference_of(row)} for row in rows])
    if "generation" in kinds:
        with bar(plan.progress, f"{name}: generation", len(rows) * plan.sampling.samples) as advance:
            _generation(model, tokenizer, rows, source, plan, found, advance)
    if "likelihood" in kinds:
        with bar(plan.progress, f"{name}: likelihood", len(rows)) as advance:
            size, limit = plan.sampling.batch_size, plan.max_length
            scored = likelihood(model, tokenizer, rows, batch_size=size, max_length=limit, progress=advance)
            _likelihood(scored, found)
    if "preference" in kinds:
        with bar(plan.progress, f"{name}: preference", 4 * len(rows)) as advance:
            _preference(model, tokenizer, rows, plan, found, advance)
    interval = partial(bootstrap.estimate, resamples=plan.resamples, level=plan.level, seed=plan.sampling.seed)
    measures = {
        metric: Measure(statistic, index, interval(statistic)) for metric, (statistic, index) in found.measures.items()
    }
    return SourceReport(
        rows=len(rows),
        fingerprint=rows_fingerprint(rows),
        verifier=found.verifier,
        measures=measures,
        counts=found.counts,
        not_measured={kind: f"it needs {ACCEPTS[kind][1]}" for kind in plan.metrics if kind not in kinds},
        items=found.items,
        correct=found.correct,
        reliability=found.reliability,
        probability_histogram=found.probability_histogram,
    )


def _measurable(name: str, rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """The kinds of metric that the source's rows allow; a mixture of rows that do and do not is an error."""
    if not rows:
        raise ValueError(f"Source {name!r} has no rows to evaluate on.")
    kinds = [kind for kind in metrics if any(map(ACCEPTS[kind][0], rows))]
    for kind in kinds or metrics:
        accepted, description = ACCEPTS[kind]
        require(rows, f"{kind} on source {name!r}", description, accepted)
    return kinds


def _generation(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    source: Source,
    plan: Plan,
    found: _Findings,
    advance: Advance,
) -> None:
    """Sample, judge, and note pass@k and maj@k."""
    with verifiers.resolve(source.verifier, rows, source.task) as verifier:
        prompts = [prompt_ids(tokenizer, prompt, row) for row in rows if (prompt := prompt_of(row)) is not None]
        if plan.backend == "vllm" and plan.checkpoint is not None:
            completions = vllm.complete(plan.checkpoint, tokenizer, prompts, plan.sampling)
        else:
            completions = complete(model, tokenizer, prompts, plan.sampling, progress=advance)
        verdicts = [[verifier(text, row) for text in texts] for row, texts in zip(rows, completions.texts, strict=True)]
        found.counts["unjudged_completions"] = verifier.unjudged
        found.verifier = verifier.name
    found.counts["truncated_prompts"] = completions.truncated_prompts
    found.counts["unfinished_completions"] = completions.unfinished
    answers = [[verdict.answer for verdict in one] for one in verdicts]
    correct = np.array([[verdict.correct for verdict in one] for one in verdicts])
    found.correct = correct
    index = np.arange(len(rows))
    values = {f"pass@{size}": pass_at_k(correct, size) for size in plan.k}
    values |= {f"maj@{size}": maj_at_k(answers, correct, size) for size in plan.k if size > 1}
    found.measures.update({name: (bootstrap.mean(one), index) for name, one in values.items()})
    for row, (item, texts) in enumerate(zip(found.items, completions.texts, strict=True)):
        item.update(completions=texts, answers=answers[row], correct=correct[row].tolist())
        item.update({name: float(one[row]) for name, one in values.items()})


def _likelihood(scored: Likelihood, found: _Findings) -> None:
    """Note the likelihood metrics and every scored row's own numbers."""
    found.measures.update({name: (statistic, scored.index) for name, statistic in scored.statistics().items()})
    found.counts["truncated_rows"] = scored.truncated
    found.counts["skipped_rows"] = len(scored.skipped)
    found.reliability = scored.reliability()
    found.probability_histogram = scored.histogram.tolist()
    for place, row in enumerate(scored.index):
        tokens = int(scored.tokens[place])
        found.items[row].update(
            tokens=tokens,
            nll=scored.nll[place] / tokens,
            mean_target_probability=scored.target_probability[place] / tokens,
            token_accuracy=scored.correct[place] / tokens,
            entropy=scored.entropy[place] / tokens,
        )


def _preference(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    plan: Plan,
    found: _Findings,
    advance: Advance,
) -> None:
    """Note the metrics of pairs and every pair's own numbers."""
    if plan.reference is None:
        raise ValueError("preference takes log-ratios against a reference model; pass reference, which loads it.")
    options: dict[str, Any] = {"beta": plan.beta, "batch_size": plan.sampling.batch_size, "max_length": plan.max_length}
    scored = preference.score_pairs(model, plan.reference(), tokenizer, rows, progress=advance, **options)
    found.measures.update(scored.statistics())
    found.counts["truncated_completions"] = scored.truncated
    found.counts["skipped_pairs"] = scored.skipped
    for row, numbers in scored.items():
        found.items[row].update(numbers)


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """Digest of the rows' text."""
    columns = ["prompt", "completion", "answer", "messages", "text"]
    columns += ["chosen", "rejected"] if any(map(is_pair, rows)) else []
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.get(column) for column in columns], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
