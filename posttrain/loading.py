"""Models, tokenizers and rows as a configuration names them."""

import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.assets import tiny_base_path
from posttrain.config import DataSource, EvaluationConfig, EvaluationSource, ModelConfig, RunConfig, TokenizerConfig
from posttrain.data import binary_formats, formats, preference_formats, procedural_preferences, sources
from posttrain.data.sources import Rows
from posttrain.modeling import logit_difference as _registered  # noqa: F401  (a model type that loads by its folder)
from posttrain.suggest import unknown

logger = logging.getLogger(__name__)

TINY_BASE = "tiny-base"
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

# What transformers documents for from_pretrained and does not list in its signature.
_TOKENIZER_OPTIONS = (
    "use_fast", "padding_side", "truncation_side", "model_max_length", "add_bos_token", "add_eos_token",
    "add_prefix_space", "legacy", "from_slow", "clean_up_tokenization_spaces", "split_special_tokens", "chat_template",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "extra_special_tokens",
    "additional_special_tokens", "trust_remote_code", "revision", "subfolder", "token", "cache_dir", "force_download",
    "local_files_only", "tokenizer_type", "gguf_file", "fix_mistral_regex",
)  # fmt: skip


def location(name: str) -> str:
    """Where ``from_pretrained`` finds a model: `TINY_BASE` is the embedded one."""
    return str(tiny_base_path()) if name == TINY_BASE else str(Path(name).expanduser()) if name[:1] == "~" else name


def load_model(
    config: ModelConfig, *, key: str = "model", kind: Any = AutoModelForCausalLM, **fixed: Any
) -> PreTrainedModel:
    """A model (with its adapter, where the folder holds one).

    Args:
        key: where it stands in the configuration, for messages.
        kind: transformers' auto class; a causal language model unless told otherwise.
        fixed: keywords of ``from_pretrained`` that the caller decides, not the configuration.

    Raises:
        ValueError: an unknown dtype or key, or nothing that can be loaded at ``name_or_path``.
    """
    if config.dtype not in DTYPES:
        raise ValueError(unknown(f"{key}.dtype", config.dtype, DTYPES))
    place = _existing(config.name_or_path, f"{key}.name_or_path")
    options = dict(config.options)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    try:
        return kind.from_pretrained(place, dtype=config.dtype, **{**options, **fixed})
    except OSError as error:
        raise ValueError(_not_loaded(f"{key}.name_or_path", config.name_or_path, error)) from error
    except TypeError as error:
        strange = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if strange is None or strange[1] not in config.options:
            raise
        known = _parameters(PreTrainedModel.from_pretrained) | AutoConfig.from_pretrained(place).to_dict().keys()
        raise ValueError(unknown("key", f"{key}.{strange[1]}", [f"{key}.{name}" for name in sorted(known)])) from error


def trained_model(config: RunConfig, given: ModelConfig | None, *, key: str) -> ModelConfig:
    """The model that a run has trained: ``given``, or the one in its ``trainer.output_dir``.

    Raises:
        ValueError: that folder holds no model, or is the base itself.
    """
    if given is not None:
        return given
    folder = Path(str(config.trainer.get("output_dir")))
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{key} is missing, and trainer.output_dir {str(folder)!r} holds no model; train this configuration first, "
            "or name the fine-tuned model."
        )
    if folder.resolve() == Path(location(config.model.name_or_path)).resolve():
        raise ValueError(f"model and trainer.output_dir are both {str(folder)!r}; name the base as model.name_or_path.")
    return ModelConfig(
        name_or_path=str(folder), dtype=config.model.dtype, attn_implementation=config.model.attn_implementation
    )


def load_tokenizer(config: TokenizerConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token.

    A tokenizer without one pads with its end-of-sequence token, else its unknown token; padding is masked by position
    and never by token, so either does no harm.

    Raises:
        ValueError: an unknown key, nothing that can be loaded, or no token to pad with.
    """
    name = config.name_or_path or model.name_or_path
    key = "tokenizer.name_or_path" if config.name_or_path else "model.name_or_path"
    place = _existing(name, key)
    # a revision names a commit of the model's repository and says nothing of another one
    common = ("trust_remote_code", "token") if config.name_or_path else ("trust_remote_code", "token", "revision")
    options: dict[str, Any] = {name: model.options[name] for name in common if name in model.options}
    options.update(config.options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except OSError as error:
        raise ValueError(_not_loaded(key, name, error)) from error
    known = {*_TOKENIZER_OPTIONS} | _parameters(type(tokenizer)) | _parameters(PreTrainedTokenizerBase.from_pretrained)
    for option in config.options:
        if option not in known:
            raise ValueError(unknown("key", f"tokenizer.{option}", [f"tokenizer.{one}" for one in sorted(known)]))
    ensure_padding(tokenizer)
    return tokenizer


def ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token one of its own special tokens."""
    if tokenizer.pad_token is not None:
        return
    for name in ("eos_token", "unk_token"):
        token = getattr(tokenizer, name)
        if token is not None:
            tokenizer.pad_token = token
            logger.info("The tokenizer has no padding token: padding with its %s %r.", name.replace("_", " "), token)
            return
    raise ValueError("the tokenizer has neither a padding, end-of-sequence nor unknown token; set tokenizer.pad_token.")


def load_rows(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str,
    training: bool = True,
    method: str = "supervised",
) -> Rows:
    """A source's rows in a form that training by a method, or evaluation after it, reads.

    Raises:
        ValueError: as in `posttrain.data.sources.load` and `prepare` of the method's formats.
    """
    rows = sources.load(source, key=key)
    common: dict[str, Any] = {
        "format": source.format,
        "template": source.template,
        "chat": tokenizer.chat_template is not None,
        "key": key,
    }
    pairs: dict[str, Any] = {"pairs": source.pairs, "inverted": source.inverted, "ties": source.ties}
    evaluated_pairs = not training and method != "supervised" and preference_formats.holds_pairs(rows, source.format)
    if evaluated_pairs or (training and method == "preference"):
        rows = preference_formats.prepare(rows, **common, **pairs)
    elif training and method == "binary_feedback":
        rows = binary_formats.prepare(rows, **common, **pairs, shuffle_seed=source.shuffle_seed)
    else:
        rows = formats.prepare(rows, **common, training=training)
    if formats.holds_messages(rows):
        formats.ensure_chat_template(tokenizer)
    return rows


def load_evaluation_sources(
    chosen: Iterable[EvaluationSource],
    tokenizer: PreTrainedTokenizerBase,
    key: str = "evaluation.data",
    method: str = "supervised",
) -> Mapping[str, Any]:
    """Name -> `posttrain.evaluation.Source`; a name that is taken gets a number."""
    from posttrain.evaluation import Source, verifiers

    found: dict[str, Source] = {}
    for index, source in enumerate(chosen):
        if source.verifier not in verifiers.names():
            raise ValueError(unknown(f"{key}.{index}.verifier", source.verifier, verifiers.names()))
        rows = load_rows(source, tokenizer, key=f"{key}.{index}", training=False, method=method)
        wanted = source.label or source.task or Path(str(source.path)).name.partition(".")[0]
        name, number = wanted, 1
        while name in found:
            number += 1
            name = f"{wanted}-{number}"
        # rows of preference tasks say themselves whose problems they hold
        task = None if source.task in procedural_preferences.TASKS else source.task
        found[name] = Source(rows, task=task, verifier=source.verifier)
    return found


def load_sources(
    settings: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, method: str = "supervised"
) -> Mapping[str, Any]:
    """All that ``evaluation:`` measures on, by name: its data, its suites, its tasks of lm-evaluation-harness.

    Raises:
        ValueError: as `load_evaluation_sources`, `posttrain.evaluation.unlearning.build.benchmarks` and
            `posttrain.evaluation.harness.load`, or one name stands for several.
        ImportError: a package that these need is not installed.
    """
    from posttrain.evaluation.unlearning.build import benchmarks

    found = dict(load_evaluation_sources(settings.data or (), tokenizer, method=method))
    suites = benchmarks(settings, tokenizer)
    for suite in suites:
        taken = next((name for name in found if name.partition("_")[0] == suite), None)
        if taken is not None:
            raise ValueError(
                f"evaluation.{suite} and evaluation.data both have {taken!r}; give the latter another label."
            )
    found |= suites
    if settings.harness is None:
        return found
    from posttrain.evaluation import harness

    tasks = harness.load(tokenizer, **dataclasses.asdict(settings.harness), seed=settings.seed)
    for name in tasks:
        if name in found:
            raise ValueError(
                f"evaluation.harness.tasks and evaluation.data both have {name!r}; give the one of evaluation.data "
                "another label."
            )
    return {**found, **tasks}


def _parameters(function: Callable[..., Any]) -> set[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return {one.name for one in found if one.kind in named} - {"pretrained_model_name_or_path"}


def _existing(name: str, key: str) -> str:
    place = location(name)
    if name != TINY_BASE and name.startswith((".", "/", "~")) and not Path(place).exists():
        raise ValueError(f"{key} is {name!r}, and there is no such folder; check the path.")
    return place


def _not_loaded(key: str, name: str, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{key} is {name!r}, which cannot be loaded: {reason}"
