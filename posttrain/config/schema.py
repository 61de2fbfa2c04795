"""The dataclasses behind the YAML; keys and field names are the same."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from posttrain.config.annotation import AnnotationConfig
from posttrain.config.inputs import DataConfig, EvaluationSource, ModelConfig, TokenizerConfig
from posttrain.config.unlearning import AssistantConfig, AuditConfig, MuseConfig, TofuConfig

# What must not be written beside the results.
SECRET_KEYS = frozenset({"hub_token", "push_to_hub_token", "token"})


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """``kernel:``: how the statistics of the vocabulary are computed; no setting but the tolerance changes a gradient.

    Args:
        backend: ``auto``, or one that `posttrain.kernels.vocab_statistics` names.
        budget: bytes of memory for logits: kept for the backward instead of computed anew, or in one pass held at a
            time. ``auto`` takes a share of the device's memory, None keeps nothing.
        gradient_tolerance: share of the gradient's norm, from 0 up to (not including) 1, within which the backward may
            leave out tokens that hardly count; the logged ``gradient_tolerance/*`` bound what was left out.
        one_pass: form the gradients in the forward, which saves a quarter of the work and holds the head's gradient in
            float32 until the backward. ``auto`` does it wherever each term of the objective looks at one token at a
            time and its denominator is known before the forward; true refuses to start where that is not so.

    Raises:
        ValueError: a value that is none of these.
    """

    backend: str = "auto"
    budget: int | str | None = None
    gradient_tolerance: float = 0.0
    one_pass: bool | str = "auto"

    def __post_init__(self) -> None:
        budget, tolerance = self.budget, self.gradient_tolerance
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0
        if not (whole or budget is None or budget == "auto"):
            raise ValueError(f"kernel.budget is {budget!r}; give a whole number of bytes, auto or null.")
        number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool) and math.isfinite(tolerance)
        if not number or not 0 <= tolerance < 1:
            raise ValueError(f"kernel.gradient_tolerance is {tolerance!r}; give a number from 0 up to 1, without 1.")
        if not (isinstance(self.one_pass, bool) or self.one_pass == "auto"):
            raise ValueError(f"kernel.one_pass is {self.one_pass!r}; give auto, true or false.")


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """``diagnostics:``: what `posttrain.trainers.PreferenceTrainer` watches at evaluations beside the loss.

    Args:
        patience: evaluations in a row at which the chosen completions may become less likely before a warning.
        entanglement_batches: of the evaluation data, on which the gradients of the chosen and of the rejected
            log-probability are compared; each costs two backward passes and two gradients' memory. 0 leaves it out;
            null takes 2 where these gradients fit into a sixteenth of the memory.

    Raises:
        ValueError: a value that is no whole number of at least 0.
    """

    patience: int = 3
    entanglement_batches: int | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"diagnostics.{item.name} is {value!r}; give a whole number of at least 0.")


@dataclass(kw_only=True)
class HarnessConfig:
    """``evaluation.harness:``: tasks of lm-evaluation-harness, beside ``evaluation.data``.

    Args:
        tasks: names of its tasks, groups or tags, or of those in ``include_path``.
        include_path: folder of task YAMLs of one's own.
        limit: at most this many items of each task; below 1 a share.
        num_fewshot: examples in the prompt; None takes the task's own number.
        apply_chat_template: write prompts by the tokenizer's chat template.
        confirm_run_unsafe_code: allow tasks that run the code a model writes.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False


@dataclass(kw_only=True)
class EvaluationConfig:
    """``evaluation:``: settings of `posttrain.evaluation.evaluate`, which the main process runs alone.

    The other processes wait, at most ``trainer.ddp_timeout`` seconds.

    Args:
        data: None takes ``data.eval``.
        tofu, muse, audit: how much is left of what was to be forgotten; of the settings here they take
            ``batch_size`` and those of the bootstrap.
        harness: tasks of lm-evaluation-harness; ``metrics``, ``samples`` and what else concerns sampling is not theirs.
        metrics: kinds of metric, see `posttrain.evaluation.evaluate`; None takes ``generation`` and ``likelihood``, and
            for preference and binary feedback ``preference`` too.
        backend: what samples: ``transformers``, or ``vllm`` (where installed) under ``posttrain evaluate``.
        before: ``train`` evaluates the base as well, for the before/after table.
        every: ``train`` also evaluates after every so many optimizer steps, into ``evaluation_step_N.json``.
    """

    data: list[EvaluationSource] | None = None
    harness: HarnessConfig | None = None
    tofu: TofuConfig | None = None
    muse: MuseConfig | None = None
    audit: AuditConfig | None = None
    backend: str = "transformers"
    metrics: list[str] | None = None
    samples: int = 8
    k: list[int] = field(default_factory=lambda: [1, 8])
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 64
    seed: int = 0
    max_length: int | None = None
    resamples: int = 2000
    level: float = 0.95
    before: bool = True
    every: int | None = None


@dataclass(kw_only=True)
class ScoringConfig:
    """``scoring:``: what ``posttrain score`` compares ``model`` with, and where it writes.

    Args:
        finetuned: None takes the model in ``trainer.output_dir``.
        output: .jsonl or .parquet file to write.
        batch_size: rows per forward.
    """

    finetuned: ModelConfig | None = None
    output: str | None = None
    batch_size: int = 8


@dataclass(kw_only=True)
class DiagnosisConfig:
    """``diagnosis:``: the sample that ``posttrain diagnose`` looks at; it writes into ``trainer.output_dir``.

    Args:
        rows: of the training data, drawn with ``seed``; a stream gives its first.
        batch_size: rows of a micro-batch; None takes ``trainer.per_device_train_batch_size``.
        seed: of the draw.
        costs: time a few tiles of the head, to predict memory and time of a step.
    """

    rows: int = 256
    batch_size: int | None = None
    seed: int = 0
    costs: bool = True


@dataclass(kw_only=True)
class RunConfig:
    """A whole run.

    Args:
        method: which trainer, one of `posttrain.config.trainer.METHODS`.
        objective: a name, a mapping with ``name`` and hyper-parameters, or a list of these; see `posttrain.terms`.
        trainer: keys of TRL's own configuration class.
        kernel: how the statistics of the vocabulary are computed.
        peft: None, or keys of ``peft.LoraConfig`` (of another class where ``peft_type`` names one).
        reference: ``auto``, ``cached``, ``adapter_off``, ``model`` or ``none``.
        reference_model: None takes the model as it is before training.
        assistant: None, or that an assistant is trained whose logits are taken off the model's; unlearning only.
        reference_cache: folder for the log-probabilities of ``reference: cached``; None keeps them beside the data
            set's own cache files, or in ``trainer.output_dir``.
        shared_prefix: ``auto``, true or false: a pair in one row behind its prompt, for ``method: preference``.
        resume: true continues from the output folder's last checkpoint, a path from that checkpoint.
        overwrite: an earlier run's files in the output folder may be replaced.
    """

    method: str = "supervised"
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: str | dict[str, Any] | list[Any] = "nll"
    teacher: ModelConfig | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    peft: dict[str, Any] | None = None
    reference: str = "auto"
    reference_model: ModelConfig | None = None
    assistant: AssistantConfig | None = None
    reference_cache: str | None = None
    shared_prefix: bool | str = "auto"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    annotation: AnnotationConfig = field(default_factory=AnnotationConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    resume: bool | str = False
    overwrite: bool = False

    def to_tree(self) -> dict[str, Any]:
        """Plain dictionaries and lists with the YAML's keys; `posttrain.config.from_tree` reads them back."""
        return _tree(self)

    def to_yaml(self) -> str:
        """The configuration as YAML; tokens are left out, so the text may be stored."""
        return yaml.safe_dump(without_secrets(self.to_tree()), sort_keys=False, allow_unicode=True)


def _tree(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    tree: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        part = getattr(value, item.name)
        if item.metadata.get("rest"):
            tree.update(part)
        elif isinstance(part, list):
            tree[item.name] = [_tree(entry) for entry in part]
        else:
            tree[item.name] = _tree(part)
    return tree


def without_secrets(tree: Any) -> Any:
    """A copy with None in place of every token."""
    if isinstance(tree, dict):
        return {key: None if key in SECRET_KEYS else without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return tree
