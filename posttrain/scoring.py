"""Likelihood-ratio columns: what fine-tuning made likelier, for choosing data and for finding rows out of place."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from posttrain.annotation import check_output, write
from posttrain.config import RunConfig
from posttrain.data.collation import ROW_NUMBER
from posttrain.loading import load_model, load_rows, load_tokenizer, trained_model
from posttrain.modeling import StatisticsGroup, VocabRequest, attach
from posttrain.prepared import given_rows, prepare_rows, refuse_processes
from posttrain.run_record import versions
from posttrain.side import Side

Array = npt.NDArray[Any]

COLUMNS = ("trained_tokens", "base_logp", "finetuned_logp", "learnability", "mean_learnability", "ood_score",
           "mean_ood_score")  # fmt: skip
PAPERS = {
    "learnability": "arXiv:2406.17711 (learner's loss minus reference's); arXiv:2206.07137 (reducible loss)",
    "ood_score": "arXiv:2404.08679 (minus the log-likelihood ratio of fine-tuned and base)",
}


def log_likelihoods(
    model: nn.Module, dataset: Any, collator: Any, *, batch_size: int = 8, description: str = "", progress: bool = True
) -> tuple[Array, Array]:
    """Log-probability of every row's trained tokens and of all its tokens but the first.

    Args:
        model: attached, in eval mode.
        dataset: rows with ``input_ids`` and ``labels``, not packed; each has at least one trained token.
        collator: a `posttrain.data.collation.CompletionCollator` without columns.

    Returns:
        (rows,) each, in nats, summed.

    Raises:
        ValueError: the model gives a row a log-probability that is not finite.
    """

    def collate(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[bool]]:
        trained = [label != -100 for row in rows for label in row["labels"][1:]]
        return collator([{**row, "labels": row["input_ids"]} for row in rows]), trained

    device = next(model.parameters()).device
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    trained_sums: list[Array] = []
    whole_sums: list[Array] = []
    for batch, trained in track(loader, description=description, disable=not progress):
        side: Side = batch["side"].to(device)
        request = VocabRequest(side.target_index, side.targets, (StatisticsGroup(("logp",)),))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logp = model(**inputs, vocab_request=request).statistics[0]["logp"].double().cpu().numpy()
        owner = np.repeat(np.arange(side.rows), side.lengths.cpu().numpy())
        trained_sums.append(np.bincount(owner, np.where(trained, logp, 0.0), minlength=side.rows))
        whole_sums.append(np.bincount(owner, logp, minlength=side.rows))
    whole = np.concatenate(whole_sums)
    if not np.isfinite(whole).all():
        row = dataset[ROW_NUMBER][int(np.argmin(np.isfinite(whole)))]
        raise ValueError(
            f"the model gives row {row} of the data a log-probability of NaN or infinity; check its weights."
        )
    return np.concatenate(trained_sums), whole


def score_columns(base: tuple[Array, Array], finetuned: tuple[Array, Array], dataset: Any) -> dict[str, list[Any]]:
    """The columns of `COLUMNS` from two models' `log_likelihoods`.

    ``learnability`` is the base's loss minus the fine-tuned model's on the trained tokens: how much there was to learn
    and was learnt. ``ood_score`` is the log-likelihood ratio of base and fine-tuned over all tokens but the first,
    prompt included: high where fine-tuning helped least, out of its distribution. Both in nats, summed and per token.
    """
    tokens = np.array([sum(label != -100 for label in labels[1:]) for labels in dataset["labels"]])
    lengths = np.array([len(ids) - 1 for ids in dataset["input_ids"]])
    learnability, ood = finetuned[0] - base[0], base[1] - finetuned[1]
    values = (tokens, base[0], finetuned[0], learnability, learnability / tokens, ood, ood / lengths)
    return {name: value.tolist() for name, value in zip(COLUMNS, values, strict=True)}


def score(config: RunConfig) -> tuple[Path, Dataset]:
    """Score the configuration's training data by its model and the fine-tuned one, and write rows and columns.

    Returns:
        the file, and the rows with their columns.

    Raises:
        ValueError: no data or output, a streamed set, no fine-tuned model, one with another vocabulary, or data that
            have such columns already.
    """
    settings = config.scoring
    finetuned = trained_model(config, settings.finetuned, key="scoring.finetuned")
    if config.data.train is None or settings.output is None:
        missing = "data.train" if config.data.train is None else "scoring.output"
        raise ValueError(f"{missing} is missing; `score` needs rows to score and a .jsonl or .parquet file to write.")
    check_output(settings.output, key="scoring.output")
    refuse_processes("score")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    rows = load_rows(config.data.train, tokenizer, key="data.train")
    if not isinstance(rows, Dataset):
        raise ValueError("data.train.streaming is true; scores are written for every row once, so set it to false.")
    taken = [name for name in COLUMNS if name in rows.column_names]
    if taken:
        raise ValueError(f"data.train has the column {taken[0]!r} already; rename it with data.train.columns.")
    prepared = prepare_rows(config, load_model(config.model), rows, tokenizer)
    size, collator, dataset = settings.batch_size, prepared.collator, prepared.dataset
    base = log_likelihoods(prepared.model, dataset, collator, batch_size=size, description="Asking the base")
    vocabulary = prepared.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    prepared.model.to("cpu")
    other: Any = load_model(finetuned, key="scoring.finetuned")
    theirs = other.config.get_text_config().vocab_size
    if theirs != vocabulary:
        raise ValueError(
            f"scoring.finetuned has a vocabulary of {theirs} and the model one of {vocabulary}; a likelihood "
            "ratio needs one and the same tokenizer."
        )
    attach(other)
    other = other.to(prepared.device).eval()
    tuned = log_likelihoods(other, dataset, collator, batch_size=size, description="Asking the fine-tuned model")
    kept = given_rows(rows, dataset[ROW_NUMBER])
    for name, values in score_columns(base, tuned, dataset).items():
        kept = kept.add_column(name, values)
    about = {
        "scores": PAPERS,
        "unit": "nats",
        "base": config.model.name_or_path,
        "finetuned": finetuned.name_or_path,
        "rows": len(kept),
        "versions": versions(),
    }
    return write(kept, settings.output, about, key="scoring.output"), kept


def summary(rows: Dataset) -> list[tuple[str, str, str, str, str]]:
    """Score, mean, 5 %, 50 % and 95 % quantile over the rows, as text."""
    table = []
    for name in ("learnability", "mean_learnability", "ood_score", "mean_ood_score"):
        values = np.asarray(rows[name], dtype=np.float64)
        numbers = (values.mean(), *np.quantile(values, (0.05, 0.5, 0.95)))
        low, middle, high = (f"{number:.4g}" for number in numbers[1:])
        table.append((name, f"{numbers[0]:.4g}", low, middle, high))
    return table
