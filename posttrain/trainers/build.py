"""A configuration's trainer."""

from typing import Any

from posttrain.config import RunConfig, peft_config
from posttrain.loading import load_model
from posttrain.sharding import unsharded
from posttrain.trainers.binary_feedback import BinaryFeedbackTrainer
from posttrain.trainers.preference import PreferenceTrainer
from posttrain.trainers.supervised import SupervisedTrainer

TRAINERS: dict[str, Any] = {
    "supervised": SupervisedTrainer,
    "preference": PreferenceTrainer,
    "binary_feedback": BinaryFeedbackTrainer,
}


def build(config: RunConfig, args: Any, tokenizer: Any, train_rows: Any, eval_rows: Any) -> Any:
    """The trainer of ``config.method`` with its model, objective and data.

    Args:
        config: resolved.
        args: of TRL, made before any model is loaded.
        tokenizer: with a padding token.
        train_rows, eval_rows: as `posttrain.loading.load_rows` gives them.
    """
    frozen: dict[str, Any] = {}
    with unsharded(args):
        if config.teacher is not None:
            frozen["teacher"] = load_model(config.teacher, key="teacher")
    if config.method != "supervised":
        frozen["reference"], frozen["reference_cache"] = config.reference, config.reference_cache
        if config.reference_model is not None:
            frozen["ref_model"] = load_model(config.reference_model, key="reference_model")
    if config.method == "preference":
        frozen["diagnostics"] = config.diagnostics
        frozen["shared_prefix"] = config.shared_prefix
    return TRAINERS[config.method](
        model=load_model(config.model),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config(config.peft),
        objective=config.objective,
        kernel=config.kernel,
        **frozen,
    )
