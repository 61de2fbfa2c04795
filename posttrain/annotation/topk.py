"""``teacher-topk``: the teacher's likeliest tokens beside each token of the data."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from posttrain.annotation.writing import check_output, write
from posttrain.config import RunConfig, TokenizerConfig
from posttrain.data.collation import ROW_NUMBER
from posttrain.loading import load_model, load_rows, load_tokenizer
from posttrain.modeling import StatisticsGroup, VocabRequest
from posttrain.prepared import given_rows, prepare_rows, refuse_processes
from posttrain.run_record import versions
from posttrain.side import Side


def teacher_topk(
    model: nn.Module, dataset: Dataset, collator: Any, *, k: int = 5, batch_size: int = 8, progress: bool = True
) -> Dataset:
    """Add ``teacher_ids`` and ``teacher_ids_logp`` (nats), the teacher's ``k`` likeliest next tokens.

    Both run beside ``input_ids``: the entry at position t speaks of the token at t; it is empty where t is not trained.

    Args:
        model: the teacher, attached with `posttrain.modeling.attach`, in eval mode.
        dataset: tokenised rows with ``input_ids`` and ``labels``, not packed.
        collator: a `posttrain.data.collation.CompletionCollator` without columns.
        k: at most the vocabulary.
        batch_size: rows per forward.
        progress: show a progress bar.

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary's size.
    """
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"annotation.k is {k}; give a number between 1 and the teacher's vocabulary of {vocabulary}.")
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    ids: list[list[list[int]]] = []
    logps: list[list[list[float]]] = []
    with torch.no_grad():
        for batch in track(loader, description="Asking the teacher", disable=not progress):
            side: Side = batch["side"].to(device)
            request = VocabRequest(side.target_index, side.targets, (StatisticsGroup(("topk_logp", "topk_ids"), k=k),))
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            found = model(**inputs, vocab_request=request).statistics[0]
            length = batch["input_ids"].shape[1]
            for column, name in ((ids, "topk_ids"), (logps, "topk_logp")):
                column.extend(
                    _beside_tokens(found[name].tolist(), side, length, batch["attention_mask"].sum(1).tolist())
                )
    return dataset.add_column("teacher_ids", ids).add_column("teacher_ids_logp", logps)


def _beside_tokens(entries: list[list[Any]], side: Side, length: int, row_lengths: list[int]) -> list[list[list[Any]]]:
    rows: list[list[list[Any]]] = [[[] for _ in range(tokens)] for tokens in row_lengths]
    for position, entry in zip(side.target_index.tolist(), entries, strict=True):
        row, before = divmod(position, length)
        rows[row][before + 1] = entry
    return rows


def annotate_teacher_topk(config: RunConfig) -> Path:
    """Run `teacher_topk` over a configuration's training data and write the rows with their tokens.

    The rows are tokenised by the trainer that will read them, so that every entry stands beside its own token.

    Raises:
        ValueError: no ``teacher``, no ``annotation.output``, a streamed set, or a teacher with another tokenizer.
    """
    settings = config.annotation
    tokenizer = _check_annotation(config)
    assert config.teacher is not None and config.data.train is not None and settings.output is not None
    rows = load_rows(config.data.train, tokenizer, key="data.train")
    if not isinstance(rows, Dataset):
        raise ValueError("data.train.streaming is true; annotation writes every row once, so set it to false.")
    prepared = prepare_rows(config, load_model(config.teacher, key="teacher"), rows, tokenizer)
    found = teacher_topk(
        prepared.model, prepared.dataset, prepared.collator, k=settings.k, batch_size=settings.batch_size
    )
    kept = given_rows(rows, found[ROW_NUMBER])
    for name in ("input_ids", "labels", "teacher_ids", "teacher_ids_logp"):
        kept = kept.remove_columns(name) if name in kept.column_names else kept
        kept = kept.add_column(name, found[name])
    about = {
        "annotation": "teacher-topk",
        "k": settings.k,
        "teacher": config.teacher.name_or_path,
        "tokenizer": config.tokenizer.name_or_path or config.model.name_or_path,
        "rows": len(kept),
        "versions": versions(),
    }
    return write(kept, settings.output, about)


def _check_annotation(config: RunConfig) -> Any:
    """The tokenizer that model and teacher share, once everything that can be refused early is known to be right."""
    settings = config.annotation
    if config.teacher is None or config.data.train is None or settings.output is None:
        missing = next(
            key
            for key, value in {
                "teacher": config.teacher, "data.train": config.data.train, "annotation.output": settings.output,
            }.items()
            if value is None
        )  # fmt: skip
        raise ValueError(f"{missing} is missing; `annotate teacher-topk` needs a teacher, training data and an output.")
    check_output(settings.output)
    refuse_processes("annotate")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    if load_tokenizer(TokenizerConfig(), config.teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher {config.teacher.name_or_path!r} has another vocabulary than model {config.model.name_or_path!r}; "
            "its token ids would mean other tokens, so take a teacher with the same tokenizer."
        )
    return tokenizer
