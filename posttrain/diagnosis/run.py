"""The steps of ``posttrain diagnose``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from posttrain.config import RunConfig, peft_config, trainer_config_class
from posttrain.data import formats, sources
from posttrain.data.sources import Rows
from posttrain.diagnosis import advice as advising
from posttrain.diagnosis import cost, pairs, report
from posttrain.diagnosis.sample import TokenSample, quantiles, read_sample
from posttrain.diagnosis.silence import candidates, silenced
from posttrain.evaluation import bootstrap
from posttrain.evaluation.bootstrap import Estimate
from posttrain.loading import load_model, load_rows, load_tokenizer
from posttrain.prepared import PreparedRows, prepare_rows, refuse_processes
from posttrain.run_record import hardware, versions


@dataclass(frozen=True)
class Diagnosis:
    """What was found, as the JSON holds it, the recommendation, and the files."""

    found: Mapping[str, Any]
    advice: advising.Advice
    paths: Mapping[str, Path]


def diagnose(config: RunConfig) -> Diagnosis:
    """Look at a sample of the training data with the base model and write what was found.

    Args:
        config: resolved.

    Raises:
        ValueError: no training data, a sample of no rows, an earlier diagnosis in the folder, or what loading and the
            trainer refuse.
    """
    settings = config.diagnosis
    if config.data.train is None:
        raise ValueError("data.train is missing; name a path or a task to look at.")
    for name, value in (("rows", settings.rows), ("batch_size", settings.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"diagnosis.{name} is {value}; give a number of at least 1.")
    folder = Path(config.trainer["output_dir"])
    report.check_folder(folder, overwrite=config.overwrite)
    refuse_processes("diagnose")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    given = sources.load(config.data.train, key="data.train")
    columns = sources.columns_of(given)
    about = {"model": config.model.name_or_path, "seed": settings.seed, "versions": versions(), "hardware": hardware()}
    if pairs.is_preference(columns):
        found, advice = _of_pairs(config, tokenizer, given)
    else:
        rows = sample_rows(load_rows(config.data.train, tokenizer, key="data.train"), settings.rows, settings.seed)
        found, advice = _of_tokens(config, prepare_rows(config, load_model(config.model), rows, tokenizer))
    recommended = {"advice": dataclasses.asdict(advice)}
    return Diagnosis(found, advice, report.write(folder, {**about, **found, **recommended}, advice, config))


def sample_rows(rows: Rows, count: int, seed: int) -> Dataset:
    """At most ``count`` rows: drawn without replacement, or a stream's first."""
    if isinstance(rows, Dataset):
        return rows if len(rows) <= count else rows.shuffle(seed=seed).select(range(count))
    return Dataset.from_list(list(rows.take(count)))


def _of_tokens(config: RunConfig, prepared: PreparedRows) -> tuple[dict[str, Any], advising.Advice]:
    size = config.diagnosis.batch_size or prepared.args.per_device_train_batch_size
    sample = read_sample(prepared, batch_size=size)
    mean = mean_probability(sample)
    advice = advising.supervised(mean)
    probability = sample.logp.exp().clamp_max(1.0).numpy()
    counts, edges = np.histogram(probability, report.BINS, range=(0.0, 1.0))
    objectives = candidates(config.objective)
    found: dict[str, Any] = {
        "rows": len(sample.lengths),
        "tokens": sample.logp.shape[0],
        "target_probability": {
            "mean": mean.value,
            "low": mean.low,
            "high": mean.high,
            "quantiles": quantiles(probability),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "region": advice.region,
        "silenced": {one.label: silenced(one, sample.logp, sample.side) for one in objectives},
        "rows_dropped_by_tolerance": {f"{tolerance:g}": share for tolerance, share in sample.dropped.items()},
    }
    if config.diagnosis.costs:
        found["predicted"] = _costs(config, prepared, sample, objectives)
    return found, advice


def mean_probability(sample: TokenSample) -> Estimate:
    """Mean target probability over tokens, with a bootstrap interval over sequences."""
    owner = np.repeat(np.arange(len(sample.lengths)), sample.lengths.numpy())
    sums = np.bincount(owner, sample.logp.exp().numpy())
    return bootstrap.estimate(bootstrap.ratio(sums, sample.lengths.numpy()))


def _costs(config: RunConfig, prepared: PreparedRows, sample: TokenSample, objectives: list[Any]) -> dict[str, Any]:
    unit = cost.seconds_per_unit(sample.hidden, sample.head, sample.targets)
    trained = _trained(config, prepared.model)
    head = prepared.model.get_output_embeddings().weight  # type: ignore[operator]
    shapes = cost.shapes_of(
        prepared.model,
        sample,
        prepared.args,
        trainable=sum(parameter.numel() for parameter in trained),
        head_trains=any(parameter is head for parameter in trained),
    )
    steps = [step for one in objectives for step in cost.predict(one, sample, shapes, unit, prepared.device)]
    return {
        "note": "a prediction for one device: time of a few tokens scaled by units of work, memory from shapes",
        "shapes": dataclasses.asdict(shapes),
        "seconds_per_unit": unit,
        "backbone_seconds_per_token": sample.backbone_seconds,
        "steps": [dataclasses.asdict(step) for step in steps],
    }


def _trained(config: RunConfig, model: Any) -> list[torch.nn.Parameter]:
    """What training would change; with ``peft:`` the model is wrapped here, after all else was measured."""
    if config.peft is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config(config.peft))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _of_pairs(config: RunConfig, tokenizer: Any, given: Rows) -> tuple[dict[str, Any], advising.Advice]:
    rows = sample_rows(given, config.diagnosis.rows, config.diagnosis.seed)
    first = rows[0]
    if isinstance(first["chosen"], list):
        formats.ensure_chat_template(tokenizer)
    args = trainer_config_class(config.method)(**config.trainer)
    model: Any = load_model(config.model).to(args.device)
    size = config.diagnosis.batch_size or args.per_device_train_batch_size
    found = pairs.diagnose_pairs(model, tokenizer, list(rows), batch_size=size, max_length=args.max_length)
    return {"rows": len(rows), "pairs": found}, advising.preference(found)
