"""The parts of a run's configuration whose keys belong to other libraries: ``trainer:`` and ``peft:``."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, get_type_hints

from posttrain.config.values import convert, join
from posttrain.suggest import unknown

METHODS: Mapping[str, str] = {
    "supervised": "SFTConfig",
    "preference": "DPOConfig",
    "binary_feedback": "KTOConfig",
    "unlearning": "SFTConfig",
}


def check_method(method: str) -> None:
    """Raise a ValueError unless there is a trainer of that name."""
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))


def trainer_config_class(method: str) -> Any:
    """TRL's configuration class of a method.

    Raises:
        ValueError: unknown method.
    """
    check_method(method)
    return getattr(importlib.import_module("trl"), METHODS[method])


def checked(values: Mapping[str, Any], cls: Any, key: str) -> dict[str, Any]:
    """Keys and plain values checked against the constructor fields of another library's dataclass.

    Raises:
        ValueError: an unknown key (nearest known one named) or a value of another type.
    """
    hints = get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls) if item.init]
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(unknown(f"key of {cls.__name__}", join(key, name), [join(key, one) for one in known]))
        result[name] = convert(value, hints[name], join(key, name))
    return result


def check_trainer(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """``trainer:`` checked against TRL's configuration class of the method."""
    return checked(values, trainer_config_class(method), "trainer")


def check_reward_trainer(values: Mapping[str, Any]) -> dict[str, Any]:
    """``annotation.reward.trainer:`` checked against TRL's configuration class of reward models."""
    return checked(values, importlib.import_module("trl").RewardConfig, "annotation.reward.trainer")


def _peft_class(values: Mapping[str, Any], key: str = "peft") -> Any:
    import peft

    name = str(values.get("peft_type", "LORA")).upper()
    classes = {str(getattr(kind, "value", kind)): cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in classes:
        raise ValueError(unknown(f"{key}.peft_type", name, classes))
    return classes[name]


def check_peft(values: Mapping[str, Any], key: str = "peft") -> dict[str, Any]:
    """``peft:`` (``key`` names it) checked against ``peft.LoraConfig``, or the class that ``peft_type`` names."""
    cls = _peft_class(values, key)
    given = {name: value for name, value in values.items() if name != "peft_type"}
    kind = {"peft_type": values["peft_type"]} if "peft_type" in values else {}
    return {**kind, **checked(given, cls, key)}


def peft_config(values: Mapping[str, Any] | None) -> Any:
    """The PEFT configuration object of ``peft:``, or None."""
    if values is None:
        return None
    options = {name: value for name, value in values.items() if name != "peft_type"}
    return _peft_class(values)(**{"task_type": "CAUSAL_LM", **options})
