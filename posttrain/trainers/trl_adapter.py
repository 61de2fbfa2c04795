"""Everything that leans on TRL's private parts; tests/trainers/test_trl_adapter.py fails when TRL moves."""

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoProcessor, set_seed
from trl import KTOConfig
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from posttrain.data.collation import CompletionCollator

HEAD_NAMES = ("lm_head", "embed_out", "output")

REPLACED: Mapping[str, str] = {
    "loss_type": "objective: {value}",
    "label_smoothing_factor": "objective: {{name: label_smoothing, epsilon: {value}}}",
    "use_liger_kernel": "nothing, the streamed kernel is always used",
    "loss_weights": "`weight` beside each objective's name",
    "beta": "`beta: {value}` beside the objective's name",
    "label_smoothing": "`label_smoothing: {value}` beside the objective's name",
    "ld_alpha": "objective: {{name: ld_dpo, alpha: {value}}}",
    "f_divergence_type": "objective: {{name: f_dpo, divergence: {value}}}",
    "f_alpha_divergence_coef": "objective: {{name: f_dpo, divergence: alpha, alpha: {value}}}",
    "use_weighting": "objective: wpo",
    "discopop_tau": "objective: {{name: discopop, tau: {value}}}",
    "desirable_weight": "`desirable_weight: {value}` beside the objective's name",
    "undesirable_weight": "`undesirable_weight: {value}` beside the objective's name",
    "precompute_ref_log_probs": "reference: cached",
    "precompute_ref_batch_size": "nothing, the cache takes trainer.per_device_eval_batch_size",
}


def refuse_replaced_settings(args: Any) -> None:
    """TRL settings that ``objective`` replaces must stay at their defaults, or two places would set one thing.

    Raises:
        ValueError: names the setting, its value and the key to use.
    """
    defaults = {item.name: _default(item) for item in dataclasses.fields(type(args))}
    for name, replacement in REPLACED.items():
        value = getattr(args, name, defaults.get(name))
        if value != defaults.get(name):
            raise ValueError(
                f"trainer.{name} is {value!r}, which `objective` replaces; leave it at {defaults.get(name)!r} and set "
                f"{replacement.format(value=value if isinstance(value, str | int | float) else 'its name')}."
            )


def _default(item: Any) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def refuse_own_parts(kwargs: Mapping[str, Any], trainer: str) -> None:
    """TRL's arguments for what the trainer brings itself.

    Raises:
        ValueError: one of them is given.
    """
    for name in ("data_collator", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is given, and {trainer} brings its own; put what it did into `objective`, or prepare the data "
                "before."
            )


def loaded(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The model itself where its name was given, as TRL's constructor would load it.

    Args:
        model: or its name.
        args: of the trainer.
        kwargs: of the trainer; ``quantization_config`` is taken out, and a missing ``processing_class`` put in.

    Raises:
        ValueError: ``quantization_config`` is given twice.
    """
    if not isinstance(model, str):
        return model
    options = dict(args.model_init_kwargs or {})
    quantization = kwargs.pop("quantization_config", None)
    if quantization is not None and "quantization_config" in options:
        raise ValueError(
            "quantization_config is given to the trainer and in trainer.model_init_kwargs; leave it out of one of them."
        )
    if quantization is not None:
        options["quantization_config"] = quantization
    set_seed(args.seed)
    found = loaded_by_name(model, args, **options)
    if kwargs.get("processing_class") is None:
        kwargs["processing_class"] = AutoProcessor.from_pretrained(
            model, revision=options.get("revision"), trust_remote_code=args.trust_remote_code
        )
    return found


def loaded_by_name(name: str, args: Any, **options: Any) -> Any:
    """A model under the rules by which TRL's constructors load one.

    Args:
        name: or folder.
        args: of the trainer.
        options: of ``from_pretrained``.
    """
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(name, **options)


@contextmanager
def without_init_kwargs(args: Any, loaded: bool) -> Iterator[None]:
    """While TRL's constructor runs, it does not say that the options are ignored by which the model was loaded.

    Args:
        args: of the trainer.
        loaded: whether the model was loaded by them; otherwise what TRL says is true.
    """
    original = args.model_init_kwargs
    args.model_init_kwargs = None if loaded else original
    try:
        yield
    finally:
        args.model_init_kwargs = original


@contextmanager
def without_reference_model(trainer: type) -> Iterator[None]:
    """While TRL's constructor runs, it gets None where it would load a reference model of its own."""
    theirs = next(base for base in trainer.__mro__ if base.__module__.startswith("trl."))
    module: Any = sys.modules[theirs.__module__]
    original = module.create_model_from_path
    module.create_model_from_path = lambda *args, **kwargs: None
    try:
        yield
    finally:
        module.create_model_from_path = original


@contextmanager
def without_mismatched_completions(args: Any) -> Iterator[None]:
    """While TRL's constructor runs, its loss is the one that needs none.

    KTO's would bake a partner into each row by fixed batches, and refuse single rows and other orders than the data's.
    """
    if not isinstance(args, KTOConfig):
        yield
        return
    original, args.loss_type = args.loss_type, "apo_zero_unpaired"
    try:
        yield
    finally:
        args.loss_type = original


def refuse_parallelism(accelerator: Any) -> None:
    """Sequence, context and tensor parallelism split what the objectives must see whole."""
    config = getattr(accelerator, "parallelism_config", None)
    if config is None:
        return
    for size, name in (("cp_size", "context"), ("sp_size", "sequence"), ("tp_size", "tensor")):
        if getattr(config, size, 1) > 1:
            raise ValueError(
                f"{size} is {getattr(config, size)}, and posttrain's trainers do not support {name} parallelism; "
                "set it to 1 and use DDP, FSDP2 or ZeRO."
            )


def refuse_prompt_learning(model: Any, config: PeftConfig | None) -> None:
    """Virtual tokens shift every position against the indices that the collator worked out."""
    configs = [config] if config else list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    for one in configs:
        if one.is_prompt_learning:
            kind = getattr(one.peft_type, "value", one.peft_type)
            raise ValueError(
                f"peft is {kind}, whose virtual tokens shift every position; use an adapter on weights, such as LORA."
            )


def refuse_unwrapped_adapter(model: Any) -> None:
    """An adapter that transformers loaded by itself: its weights stay frozen, and a new one would take its place."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model came from an adapter's folder without PEFT around it, so that its adapter would not be trained, "
            "or be lost to a new one; load it by peft.AutoPeftModelForCausalLM with is_trainable=True, or merge it."
        )


def adapts_head(config: PeftConfig | None, model: Any) -> bool:
    """Whether a PEFT configuration puts an adapter on the output embedding."""
    targets = getattr(config, "target_modules", None)
    if not targets or not isinstance(targets, str | list | set | tuple):
        return False
    names = {name.rpartition(".")[2] for name, module in _named_heads(model)}
    if isinstance(targets, str):
        return targets != "all-linear" and any(name in targets for name in names)
    return bool(names & {target.rpartition(".")[2] for target in targets})


def _named_heads(model: Any) -> list[tuple[str, Any]]:
    if isinstance(model, str):
        return [(name, None) for name in HEAD_NAMES]
    head = model.get_output_embeddings()
    return [(name, module) for name, module in model.named_modules() if module is head]


def with_head_adapter(model: Any, args: Any, peft_config: PeftConfig) -> PeftModel:
    """Build the PEFT model ourselves where its head is adapted; TRL's constructor would refuse to."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # as TRL does, so that one seed gives one adapter
    set_seed(args.seed)
    # ZeRO-3 gathers into buffers of one dtype: adapters in float32 beside a bf16 base would fail on the first step
    return get_peft_model(model, copy.copy(peft_config), autocast_adapter_dtype=not zero3)


@contextmanager
def hidden_head_adapter(model: Any) -> Iterator[None]:
    """While TRL's constructor runs, show it the head without its adapter.

    TRL refuses an adapted head because its own loss would ignore the adapter; `posttrain.modeling` reads it, and the
    start-up self-check proves that it does.
    """
    head = model.get_output_embeddings() if isinstance(model, PeftModel) else None
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    base = head.get_base_layer()
    object.__setattr__(model, "get_output_embeddings", lambda: base)
    try:
        yield
    finally:
        object.__delattr__(model, "get_output_embeddings")


def drop_copied_adapter(model: Any) -> None:
    """Remove ``ref``, the copy that TRL keeps of an adapter it takes for a trained one, where none is needed."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


@contextmanager
def placed(trainer: Any) -> Iterator[Any]:
    """The trainer's model on its device; before training under DeepSpeed in an engine of its own for that while."""
    if trainer.model_wrapped is not trainer.model or not trainer.is_deepspeed_enabled:
        yield trainer.model_wrapped
        return
    engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    try:
        yield engine
    finally:
        end_engine(engine)


def reference_placed(model: Any, trainer: Any) -> Any:
    """A model beside the trainer's, in the engine that TRL's DPO trainer would give its reference."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def end_engine(model: Any) -> None:
    """Take the hooks of a DeepSpeed engine off the model inside."""
    if hasattr(model, "destroy"):
        model.destroy()


def own_collator(theirs: Any, columns: tuple[str, ...], vocab_size: int) -> CompletionCollator:
    """Our collator with the settings that TRL worked out for its own."""
    return CompletionCollator(
        pad_token_id=theirs.pad_token_id,
        padding_free=theirs.padding_free,
        return_position_ids=theirs.return_position_ids,
        pad_to_multiple_of=theirs.pad_to_multiple_of,
        columns=columns,
        vocab_size=vocab_size,
    )


def is_packed(dataset: Dataset | IterableDataset, names: list[str]) -> bool:
    """Whether a data set went through packing before (TRL prepares data sets given to ``evaluate`` again)."""
    return "seq_lengths" in names
