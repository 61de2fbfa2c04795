"""The steps of a training run and of an evaluation, from a resolved configuration to files."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from posttrain import run_record
from posttrain.config import ModelConfig, RunConfig, trainer_config_class
from posttrain.config.resolve import on_cpu
from posttrain.config.unlearning import SUITES
from posttrain.evaluation import Benchmark, HarnessTask, Report, evaluate, harness, plot_pass_at_k, preference
from posttrain.loading import load_model, load_sources, load_tokenizer, location
from posttrain.metrics_log import MetricsLog, plot_curves, read
from posttrain.resources import Resources
from posttrain.sharding import unsharded

logger = logging.getLogger(__name__)

# Engines that hold a part of the weights each, or wrap the model only when training begins: one process cannot run
# their model alone.
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


@dataclass(frozen=True)
class Outcome:
    """What a training run left behind; the reports are None where nothing was evaluated and on other processes."""

    is_main_process: bool
    before: Report | None
    after: Report | None
    paths: Mapping[str, Path]


@dataclass
class Run:
    """A training run that is ready to start."""

    config: RunConfig
    args: Any
    tokenizer: PreTrainedTokenizerBase
    trainer: Any
    sources: Mapping[str, Any]
    checkpoint: str | None

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)


def prepare(config: RunConfig) -> Run:
    """Check the output folder, load everything, and build the trainer.

    Args:
        config: resolved.
    Raises:
        ValueError: no training data, a folder that holds another run, or anything that loading or the trainer refuses.
    """
    from posttrain.trainers.build import build, rows

    # before the model: under ZeRO-3 this is what makes from_pretrained shard while it loads
    args = trainer_config_class(config.method)(**config.trainer)
    set_seed(args.seed)
    checkpoint = _guard(config)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    with PartialState().local_main_process_first():
        data = rows(config, tokenizer)
        sources = load_sources(config.evaluation, tokenizer, config.method)
    trainer = build(config, args, tokenizer, data)
    run = Run(config, args, tokenizer, trainer, sources, checkpoint)
    _check_evaluation(run)
    return run


def train(config: RunConfig) -> Outcome:
    """Train, save and evaluate as a configuration says.

    Args:
        config: resolved.
    """
    run = prepare(config)
    state = run.trainer.accelerator.state
    if state.is_main_process:
        if config.overwrite:
            run_record.clear(run.folder)
        kind, processes = str(state.distributed_type.value), int(state.num_processes)
        run_record.write(config, processes=processes, distributed_type=kind, seed=run.args.seed)
    before = _evaluate_base(run) if run.sources and config.evaluation.before else None
    metrics = run.folder / run_record.METRICS_FILE
    run.trainer.add_callback(MetricsLog(metrics))
    resources = Resources(run.trainer.accelerator.device)
    if run.sources and config.evaluation.every:
        run.trainer.add_callback(_EvaluateDuring(run, resources, config.evaluation.every))
    resources.start()
    run.trainer.train(resume_from_checkpoint=run.checkpoint)
    resources.stop()
    run.trainer.save_model()
    run.trainer.create_model_card(model_name=run.folder.name)
    after = _evaluate_trained(run) if run.sources else None
    paths = {"model": run.folder, "metrics": metrics}
    if state.is_main_process:
        resources.write(run.folder / run_record.RESOURCES_FILE, resumed=run.checkpoint is not None)
        curves = plot_curves(read(metrics), run.folder / run_record.CURVES_FILE)
        paths |= {"training curves": curves} if curves else {}
        paths |= _write_reports(run.folder, before, after)
    run.trainer.accelerator.wait_for_everyone()
    return Outcome(state.is_main_process, before, after, paths)


def evaluate_only(config: RunConfig) -> tuple[Report, Mapping[str, Path]] | None:
    """Evaluate the configuration's model on its evaluation data, on the main process.

    Returns:
        the report and where it was written; None on other processes.
    Raises:
        ValueError: there is no evaluation data, or the folder holds an evaluation already.
    """
    settings = config.evaluation
    if not settings.data and all(getattr(settings, name) is None for name in ("harness", *SUITES)):
        raise ValueError("evaluation.data is missing, and data.eval as well; name a path or a task to evaluate on.")
    folder = Path(config.trainer["output_dir"])
    written = folder / run_record.EVALUATION_FILE
    if written.exists() and not config.overwrite:
        raise ValueError(
            f"trainer.output_dir {str(folder)!r} already holds an evaluation ({written.name}); name another folder, or "
            "set overwrite=true to replace it."
        )
    state: Any = PartialState(cpu=on_cpu())
    if not state.is_main_process:
        return None
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    sources = load_sources(config.evaluation, tokenizer, config.method)
    model = _placed(load_model(config.model), state.device)
    report = _report(model, tokenizer, sources, config, checkpoint=location(config.model.name_or_path))
    folder.mkdir(parents=True, exist_ok=True)
    written = _write_report(folder, report, run_record.EVALUATION_FILE, run_record.EVALUATION_ITEMS_FILE)
    return report, {"evaluation": written} | _plot(folder, None, report)


def _guard(config: RunConfig) -> str | None:
    """The checkpoint to resume from; every process looks before the main one writes anything."""
    folder = config.trainer["output_dir"]
    base = Path(location(config.model.name_or_path)).resolve()
    if config.overwrite and base == Path(folder).resolve():
        raise ValueError(
            f"overwrite is true, and trainer.output_dir {folder!r} holds the model to train; name another folder."
        )
    return run_record.guard_output_dir(folder, resume=config.resume, overwrite=config.overwrite)


def _check_evaluation(run: Run) -> None:
    """Evaluate on nothing, so that a wrong setting is found before the training and not after it."""
    _report(run.trainer.model, run.tokenizer, {}, run.config)
    for source in run.sources.values():
        if isinstance(source, HarnessTask):
            harness.check(source, run.trainer.model)
        elif isinstance(source, Benchmark):
            source.check(run.trainer.model)
    every = run.config.evaluation.every
    if every is not None and every < 1:
        raise ValueError(f"evaluation.every is {every}; give a number of optimizer steps of at least 1, or null.")
    if every is not None and _is_sharded(run):
        engine = run.trainer.accelerator.distributed_type.value
        raise ValueError(
            f"evaluation.every is {every}, and {engine} keeps the model in parts while it trains; set it to null, or "
            "launch on one process or DDP."
        )


def _is_sharded(run: Run) -> bool:
    return run.trainer.accelerator.distributed_type.value in SHARDED


def _evaluate_base(run: Run) -> Report | None:
    """Of the trainer's own model, or loaded anew where the engine keeps that one to itself."""
    return _on_main_process(run, run.config.model if _is_sharded(run) else None)


class _EvaluateDuring(TrainerCallback):
    """Evaluates after every so many steps, but not after the last, which has an evaluation of its own."""

    def __init__(self, run: Run, resources: Resources, every: int) -> None:
        self.run, self.resources, self.every = run, resources, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        started = time.perf_counter()
        with self.resources.paused(), _forward_kept(self.run.trainer.accelerator.unwrap_model(self.run.trainer.model)):
            report = _on_main_process(self.run, None)
        if report is not None:
            path = self.run.folder / run_record.DURING_FILE.format(step=state.global_step)
            path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        self.run.trainer.exclude_from_clock(time.perf_counter() - started)


@contextmanager
def _forward_kept(model: Any) -> Iterator[None]:
    """Put back what unwrapping takes off for good: the forward that mixed precision wrapped."""
    kept = {name: model.__dict__[name] for name in ("forward", "_original_forward") if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(kept)


def _evaluate_trained(run: Run) -> Report | None:
    saved = dataclasses.replace(run.config.model, name_or_path=str(run.folder))
    return _on_main_process(run, saved if _is_sharded(run) else None)


def _on_main_process(run: Run, load: ModelConfig | None) -> Report | None:
    accelerator = run.trainer.accelerator
    report = None
    if accelerator.is_main_process:
        with unsharded(run.args):
            loaded = None if load is None else _placed(load_model(load), accelerator.device)
            model = run.trainer.deployed_model() if loaded is None else loaded
            report = _report(model, run.tokenizer, run.sources, run.config)
            del model
    accelerator.wait_for_everyone()
    return report


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On its device, unless loading has placed it already (a device map, quantised weights)."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return model if placed else model.to(device)  # type: ignore[arg-type]


def _report(
    model: Any, tokenizer: Any, sources: Mapping[str, Any], config: RunConfig, checkpoint: str | None = None
) -> Report:
    options = {
        item.name: getattr(config.evaluation, item.name)
        for item in dataclasses.fields(config.evaluation)
        if item.name not in ("data", "harness", *SUITES, "before", "every")
    }
    reference = partial(_reference, config, model)
    rewards = config.method in ("preference", "binary_feedback")
    beta = preference.reward_beta(config.objective) if rewards else None
    models: dict[str, Any] = {"checkpoint": checkpoint, "reference": reference, "beta": beta}
    return evaluate(model, tokenizer, sources, **options, **models, progress=True)


def _reference(config: RunConfig, model: Any) -> PreTrainedModel:
    """What log-ratios of an evaluation are taken against: the model as it was before training."""
    return _placed(load_model(config.reference_model or config.model), model.device)


def _write_reports(folder: Path, before: Report | None, after: Report | None) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    if before is not None:
        paths["evaluation before"] = _write_report(folder, before, run_record.BEFORE_FILE, run_record.ITEMS_BEFORE_FILE)
    if after is not None:
        paths["evaluation after"] = _write_report(folder, after, run_record.AFTER_FILE, run_record.ITEMS_AFTER_FILE)
        paths |= _plot(folder, before, after)
    return paths


def _write_report(folder: Path, report: Report, name: str, items_name: str) -> Path:
    path = folder / name
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    with (folder / items_name).open("w", encoding="utf-8") as file:
        for item in report.items():
            file.write(json.dumps(item, ensure_ascii=False, default=str) + "\n")
    return path


def _plot(folder: Path, before: Report | None, after: Report) -> dict[str, Path]:
    if all(source.correct is None for source in after.sources.values()):
        return {}
    return {"pass@k": plot_pass_at_k(before, after, folder / run_record.PASS_AT_K_FILE)}
