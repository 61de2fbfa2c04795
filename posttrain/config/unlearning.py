"""What unlearning is measured on (``evaluation.tofu:``, ``muse:``, ``audit:``), and ``assistant:``."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.config.inputs import DataSource, ModelConfig

# Keys of ``evaluation`` that are suites of unlearning.
SUITES = ("tofu", "muse", "audit")


@dataclass(kw_only=True)
class AssistantConfig:
    """``assistant:``: train an assistant instead of the model, for its logits to be taken off the model's.

    Unlearning from logit difference (arXiv:2406.08607): the assistant learns what is to be forgotten and nothing of
    what is to stay, so the objective is the other way round. What is saved is the model with its assistant.

    Args:
        layers: of the model, that the assistant begins as.
        alpha: weight of the assistant's logits.
        filter: share of the model's likeliest tokens beyond which the assistant's logits count as 0; 0 for none.
    """

    layers: int = 8
    alpha: float = 0.8
    filter: float = 0.01


@dataclass(kw_only=True)
class TofuConfig:
    """``evaluation.tofu:``: the metrics of TOFU (arXiv:2401.06121) and of later work on rows of questions and answers.

    Rows have the columns ``question`` and ``answer`` and, for the truth ratio, ``paraphrased_answer`` and
    ``perturbed_answer`` (a list); other names are renamed by ``columns``. What a missing source, column or model leaves
    out is said in the report.

    Args:
        forget, retain: the questions to forget, and some of those to keep (TOFU takes the first 400 of all).
        real_authors, world_facts: general knowledge; the answer stands in for its paraphrase.
        holdout: questions like those to forget that no model has seen, for membership inference.
        template: the prompt as a format string over ``question``; None takes the tokenizer's chat template, else
            ``"Question: {question}\\nAnswer:"``. Training must use the same: format ``question-answer`` does.
        retain_model: trained without the forget rows. ``name_or_path`` is a model, or the .json of an earlier
            evaluation of it on the same rows.
        reference_model: for membership inference by comparison.
        generate: write answers for ROUGE, which takes the most time; model utility needs it.
        max_new_tokens: longest answer written, in tokens.
        min_k: share of an answer's least likely tokens that Min-K and Min-K++ look at.
        cache: folder that keeps per-token statistics by model weights and rows; None keeps nothing.

    Raises:
        ValueError: a number outside its range.
    """

    forget: DataSource | None = None
    retain: DataSource | None = None
    real_authors: DataSource | None = None
    world_facts: DataSource | None = None
    holdout: DataSource | None = None
    template: str | None = None
    retain_model: ModelConfig | None = None
    reference_model: ModelConfig | None = None
    generate: bool = True
    max_new_tokens: int = 200
    min_k: float = 0.4
    cache: str | None = None

    def __post_init__(self) -> None:
        _check(self, "evaluation.tofu")


@dataclass(kw_only=True)
class MuseConfig:
    """``evaluation.muse:``: memorisation of texts and of what they say, as MUSE (arXiv:2407.06460) measures it.

    Args:
        forget, holdout: texts: a .txt file, or rows with a column ``text``; cut into passages.
        forget_qa, retain_qa: rows with ``question`` and ``answer``, about the texts to forget and about others.
        examples: rows with ``question`` and ``answer`` that stand in front of each question; None for none.
        template: as in `TofuConfig`.
        retain_model: trained without the texts to forget, or the .json of an earlier evaluation of it.
        prefix_tokens: of a passage, that the model is given.
        continuation_tokens: of a passage, that it is to continue with.
        answer_tokens: longest answer to a question, in tokens.
        passages: at most this many of each set of texts, from the start; None takes all.
        min_k: share of a passage's least likely tokens that Min-K looks at.
        cache: as in `TofuConfig`.

    Raises:
        ValueError: a number outside its range.
    """

    forget: DataSource | None = None
    holdout: DataSource | None = None
    forget_qa: DataSource | None = None
    retain_qa: DataSource | None = None
    examples: DataSource | None = None
    template: str | None = None
    retain_model: ModelConfig | None = None
    prefix_tokens: int = 128
    continuation_tokens: int = 128
    answer_tokens: int = 32
    passages: int | None = None
    min_k: float = 0.4
    cache: str | None = None

    def __post_init__(self) -> None:
        _check(self, "evaluation.muse")


@dataclass(kw_only=True)
class AuditConfig:
    """``evaluation.audit:``: whether what was forgotten comes back, by fine-tuning, by rounding, or by a look inside.

    Rows are questions and answers as in `TofuConfig`.

    Args:
        forget: what was to be forgotten.
        retain: some of what was to stay, for what rounding does to it; None leaves that out.
        template: as in `TofuConfig`.
        original: the model before unlearning.
        retrained: trained without the rows to forget; it relearns as the unlearned model does.
        group: column that says whom or what a row is about, which its nearest neighbours are to tell.
        group_size: the same, where so many rows in a row belong together (TOFU's authors have 20 each).
        neighbours: that vote.
        relearn_epochs: of fine-tuning on the rows that are shown; 0 leaves relearning out.
        relearn_share: of the rows to forget that are shown; the others show what comes back with them.
        relearn_learning_rate: of AdamW.
        relearn_batch_size: rows a step.

    Raises:
        ValueError: a number outside its range, or both ``group`` and ``group_size``.
    """

    forget: DataSource | None = None
    retain: DataSource | None = None
    template: str | None = None
    original: ModelConfig | None = None
    retrained: ModelConfig | None = None
    group: str | None = None
    group_size: int | None = None
    neighbours: int = 5
    relearn_epochs: int = 3
    relearn_share: float = 0.5
    relearn_learning_rate: float = 2e-5
    relearn_batch_size: int = 8

    def __post_init__(self) -> None:
        _check_counts(self, "evaluation.audit", besides=("relearn_epochs", "relearn_share", "relearn_learning_rate"))
        if self.relearn_epochs < 0:
            raise ValueError(f"evaluation.audit.relearn_epochs is {self.relearn_epochs}; give a number of at least 0.")
        if not 0 < self.relearn_share <= 1:
            raise ValueError(f"evaluation.audit.relearn_share is {self.relearn_share}; give a share above 0, up to 1.")
        if not self.relearn_learning_rate > 0:
            raise ValueError(
                f"evaluation.audit.relearn_learning_rate is {self.relearn_learning_rate}; give a number above 0."
            )
        if self.group is not None and self.group_size is not None:
            raise ValueError("evaluation.audit has both group and group_size; give one of them.")


def sources_of(suite: TofuConfig | MuseConfig | AuditConfig | None) -> Iterator[tuple[str, DataSource]]:
    """The data sources that a suite names, by key; of None none."""
    for item in () if suite is None else dataclasses.fields(suite):
        value = getattr(suite, item.name)
        if isinstance(value, DataSource):
            yield item.name, value


def _check(suite: TofuConfig | MuseConfig, key: str) -> None:
    _check_counts(suite, key, besides=("min_k",))
    if not 0 < suite.min_k <= 1:
        raise ValueError(f"{key}.min_k is {suite.min_k}; give a share above 0 and up to 1.")


def _check_counts(suite: Any, key: str, *, besides: tuple[str, ...]) -> None:
    for item in dataclasses.fields(suite):
        value = getattr(suite, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and item.name not in besides and value < 1:
            raise ValueError(f"{key}.{item.name} is {value}; give a number of at least 1.")
