"""What a run reads: models, tokenizers and sources of rows."""

from dataclasses import dataclass, field
from typing import Any

# Marks a field that takes every key its dataclass does not know; in the YAML they stand beside the others.
REST = {"rest": True}


@dataclass(kw_only=True)
class ModelConfig:
    """``model:`` and ``teacher:``; whatever is not named here goes to ``from_pretrained``.

    Args:
        name_or_path: a hub name, a folder, or ``tiny-base`` for the embedded base.
        dtype: of the weights: ``float32``, ``bfloat16``, ``float16``, ``float64`` or ``auto`` (as they were saved).
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None takes transformers' choice.
    """

    name_or_path: str = "tiny-base"
    dtype: str = "float32"
    attn_implementation: str | None = None
    options: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclass(kw_only=True)
class TokenizerConfig:
    """``tokenizer:``; None as ``name_or_path`` takes the model's, the rest goes to ``from_pretrained``."""

    name_or_path: str | None = None
    options: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclass(kw_only=True)
class DataSource:
    """Rows from a file, a hub set or a procedural task.

    Args:
        path: .json, .jsonl, .csv or .parquet (also .gz), a folder of ``save_to_disk``, or a hub name.
        name: configuration of a hub set.
        split: of a hub set, a saved folder or a task; a file has none and takes only a slice such as ``[:100]``.
        task: procedural task, instead of ``path``.
        size, seed, task_options: of a task: rows, integer, settings of the task's generator.
        format: ``auto`` or one of ``FORMATS`` of `posttrain.data.formats`, `preference_formats` or `binary_formats`.
        columns: existing name -> new name, applied first.
        template: the prompt as a format string over the columns, such as ``"Question: {question}\\nAnswer:"``.
        limit: at most this many rows, from the start.
        streaming: read rows when they are needed instead of all at first.
        pairs: made of several scored answers: ``all``, or ``best_worst`` for one pair a row.
        inverted: what becomes of pairs whose scores contradict chosen and rejected: ``keep``, ``swap``, ``skip`` or
            ``error``.
        ties: what becomes of pairs with equal scores: ``keep`` or ``skip``.
        shuffle_seed: of the order of pairs that are taken apart for binary feedback.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    task: str | None = None
    size: int | None = None
    seed: int | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    limit: int | None = None
    streaming: bool = False
    pairs: str = "all"
    inverted: str = "keep"
    ties: str = "keep"
    shuffle_seed: int = 0


@dataclass(kw_only=True)
class EvaluationSource(DataSource):
    """A data source to evaluate on.

    Args:
        verifier: ``auto``, ``exact``, ``math`` or ``task``.
        label: the name in tables; None takes the task's or the file's name.
    """

    verifier: str = "auto"
    label: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """``data:``: what to train on, and what ``eval_loss`` is measured on.

    Args:
        train, eval: of every method but unlearning.
        forget, retain: of unlearning.
        refusal: rows whose ``completion`` (or ``text``) are refusals; each row to forget gets one of them.
        retain_per_forget: rows to retain drawn beside each row to forget.
        refusal_template: a short text that stands over a forget answer's positions, for terms that ask for it.
        allow_overlap: rows that stand in both are counted and kept instead of refused.
    """

    train: DataSource | None = None
    eval: DataSource | None = None
    forget: DataSource | None = None
    retain: DataSource | None = None
    refusal: DataSource | None = None
    retain_per_forget: float = 1.0
    refusal_template: str | None = None
    allow_overlap: bool = False
