"""A configuration's trainer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel

from posttrain.config import RunConfig, peft_config
from posttrain.data.refusals import read_refusals
from posttrain.loading import load_model, load_rows, location
from posttrain.sharding import unsharded
from posttrain.trainers.binary_feedback import BinaryFeedbackTrainer
from posttrain.trainers.logit_difference import LogitDifferenceTrainer
from posttrain.trainers.preference import PreferenceTrainer
from posttrain.trainers.supervised import SupervisedTrainer
from posttrain.trainers.unlearning import UnlearningTrainer

TRAINERS: dict[str, Any] = {
    "supervised": SupervisedTrainer,
    "preference": PreferenceTrainer,
    "binary_feedback": BinaryFeedbackTrainer,
    "unlearning": UnlearningTrainer,
}


def rows(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """The configuration's data as the arguments of its trainer.

    Raises:
        ValueError: there is none to train on, or as `posttrain.loading.load_rows`.
    """
    if config.method != "unlearning":
        if config.data.train is None:
            raise ValueError("data.train is missing; name a path or a task to train on.")
        found = {"train_dataset": _load(config, "train", tokenizer), "eval_dataset": _load(config, "eval", tokenizer)}
        return found
    if config.reference_model is not None:
        raise ValueError("reference_model is set, and unlearning compares with the model itself before; take it out.")
    if config.data.forget is None:
        raise ValueError("data.forget is missing; name the rows to forget.")
    return {
        "forget_dataset": _load(config, "forget", tokenizer),
        "retain_dataset": _load(config, "retain", tokenizer),
        "refusals": None if config.data.refusal is None else read_refusals(config.data.refusal),
        "retain_per_forget": config.data.retain_per_forget,
        "refusal_template": config.data.refusal_template,
        "allow_overlap": config.data.allow_overlap,
    }


def _policy(config: RunConfig) -> Any:
    """The model to train. One that comes as an adapter goes on with it, or has it merged where another one begins."""
    model: Any = load_model(config.model)
    if not getattr(model, "_hf_peft_config_loaded", False):
        return model
    place = location(config.model.name_or_path)
    below = dataclasses.replace(config.model, name_or_path=PeftConfig.from_pretrained(place).base_model_name_or_path)
    model = PeftModel.from_pretrained(load_model(below), place, is_trainable=True)
    return model if config.peft is None and config.assistant is None else model.merge_and_unload()


def _load(config: RunConfig, name: str, tokenizer: Any) -> Any:
    source = getattr(config.data, name)
    return None if source is None else load_rows(source, tokenizer, key=f"data.{name}", method=config.method)


def build(config: RunConfig, args: Any, tokenizer: Any, data: Mapping[str, Any]) -> Any:
    """The trainer of ``config.method`` with its model, objective and data.

    Args:
        config: resolved.
        args: of TRL, made before any model is loaded.
        tokenizer: with a padding token.
        data: as `rows` gives it.
    """
    frozen: dict[str, Any] = {}
    with unsharded(args):
        if config.teacher is not None:
            frozen["teacher"] = load_model(config.teacher, key="teacher")
    if config.method != "supervised":
        frozen |= {"reference": config.reference, "reference_cache": config.reference_cache}
    if config.method in ("preference", "binary_feedback") and config.reference_model is not None:
        frozen["ref_model"] = load_model(config.reference_model, key="reference_model")
    trainer = TRAINERS[config.method]
    if config.assistant is not None:
        trainer, frozen = LogitDifferenceTrainer, {**frozen, **dataclasses.asdict(config.assistant)}
    if config.method == "preference":
        frozen["diagnostics"] = config.diagnostics
        frozen["shared_prefix"] = config.shared_prefix
    return trainer(
        model=_policy(config),
        args=args,
        **data,
        processing_class=tokenizer,
        peft_config=peft_config(config.peft),
        objective=config.objective,
        kernel=config.kernel,
        **frozen,
    )
