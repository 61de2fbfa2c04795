"""From a YAML file and ``key.sub=value`` overrides to a checked `RunConfig`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from posttrain.config.annotation import RewardModelConfig
from posttrain.config.inputs import DataSource
from posttrain.config.schema import RunConfig
from posttrain.config.trainer import check_method, check_peft, check_reward_trainer, check_trainer
from posttrain.config.unlearning import SUITES, sources_of
from posttrain.config.values import convert, expand, join, read_yaml
from posttrain.suggest import unknown

Config = TypeVar("Config")
# What may become of pairs, by setting of a data source.
PAIR_POLICIES = {
    "pairs": ("all", "best_worst"),
    "inverted": ("keep", "swap", "skip", "error"),
    "ties": ("keep", "skip"),
}
REFERENCES = ("auto", "cached", "adapter_off", "model", "none")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: YAML file.
        overrides: ``key.sub=value``, the value in YAML; a list's entry is named by its index.

    Raises:
        ValueError: no such file, malformed YAML, an unknown key at any depth (the nearest known one is named), a value
            of another type, an unset environment variable, or settings that contradict each other.
    """
    tree = read_file(path)
    for setting in overrides:
        override(tree, setting)
    return from_tree(expand(tree))


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none for an empty one.

    Raises:
        ValueError: no such file, malformed YAML, or something else than keys and values.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"the configuration {str(path)!r} is no file here; give the path of a YAML file.")
    tree = read_yaml(file.read_text(encoding="utf-8"), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"the configuration {str(path)!r} holds {type(tree).__name__}; expected keys and values.")
    return tree


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Build and check a configuration from plain dictionaries, such as `RunConfig.to_tree` gives."""
    config = build(RunConfig, dict(tree), "")
    check_method(config.method)
    config.trainer = check_trainer(config.trainer, config.method)
    if config.peft is not None:
        config.peft = check_peft(config.peft)
    if config.reference not in REFERENCES:
        raise ValueError(unknown("reference", config.reference, REFERENCES))
    if config.method == "supervised" and config.reference not in ("auto", "none"):
        raise ValueError(
            f"reference is {config.reference!r}, and the supervised trainer has no reference model; leave it at auto."
        )
    if config.method == "supervised" and (config.reference_model is not None or config.reference_cache is not None):
        name = "reference_model" if config.reference_model is not None else "reference_cache"
        raise ValueError(f"{name} is set, and the supervised trainer has no reference model; leave it out.")
    if config.shared_prefix != "auto" and not isinstance(config.shared_prefix, bool):
        raise ValueError(f"shared_prefix is {config.shared_prefix!r}; give auto, true or false.")
    if config.shared_prefix is True and config.method != "preference":
        raise ValueError(f"shared_prefix is true, and method {config.method} has no pairs; leave it at auto.")
    if config.assistant is not None and config.method != "unlearning":
        raise ValueError(f"assistant is set, and method {config.method} trains the model itself; take it out.")
    for name in ("train", "eval", "forget", "retain", "refusal"):
        source: DataSource | None = getattr(config.data, name)
        if source is not None:
            check_source(source, f"data.{name}")
            _check_pair_settings(source, f"data.{name}", config.method)
            if (name in ("train", "eval")) == (config.method == "unlearning"):
                wanted = "data.forget and data.retain" if config.method == "unlearning" else "data.train"
                raise ValueError(f"data.{name} is set, and method {config.method} reads {wanted}; move it there.")
    _check_reward(config.annotation.reward)
    for index, source in enumerate(config.evaluation.data or []):
        check_source(source, f"evaluation.data.{index}")
    for suite in SUITES:
        for name, one in sources_of(getattr(config.evaluation, suite)):
            check_source(one, f"evaluation.{suite}.{name}")
    if config.resume and config.overwrite:
        raise ValueError("resume and overwrite are both set; continue the run in the output folder or replace it.")
    return config


def _check_reward(reward: RewardModelConfig) -> None:
    if reward.trainer:
        reward.trainer = check_reward_trainer(reward.trainer)
    if reward.peft is not None:
        reward.peft = check_peft(reward.peft, "annotation.reward.peft")
    if reward.data is not None:
        check_source(reward.data, "annotation.reward.data")


def check_source(source: DataSource, key: str) -> None:
    """Raise a ValueError where a source names no rows, or settings that its kind does not have."""
    if (source.path is None) == (source.task is None):
        found = "neither" if source.path is None else "both"
        raise ValueError(f"{key} has {found} of path and task; give one of them.")
    if source.task is not None:
        misplaced: tuple[str, ...] = ("name", "streaming", "columns", "template")
        if source.size is None:
            raise ValueError(f"{key}.task is {source.task!r} and {key}.size is null; say how many rows to generate.")
    else:
        misplaced = ("size", "seed", "task_options")
    kind = "a task" if source.task is not None else "a path"
    for name in misplaced:
        value = getattr(source, name)
        if value not in (None, False, {}):
            raise ValueError(f"{key}.{name} is {value!r}, which has no meaning for {kind}; leave it out.")
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"{key}.limit is {source.limit}; give a number of rows of at least 1, or null for all.")
    for name, known in PAIR_POLICIES.items():
        if getattr(source, name) not in known:
            raise ValueError(unknown(f"{key}.{name}", getattr(source, name), known))


def _check_pair_settings(source: DataSource, key: str, method: str) -> None:
    """Raise a ValueError where settings of pairs are set for a method that reads none, or does not take them apart."""
    readers: dict[str, tuple[str, ...]] = dict.fromkeys(PAIR_POLICIES, ("preference", "binary_feedback"))
    for name, methods in {**readers, "shuffle_seed": ("binary_feedback",)}.items():
        value = getattr(source, name)
        if method not in methods and value != getattr(DataSource(), name):
            raise ValueError(f"{key}.{name} is {value!r}, which has no meaning for the method {method}; leave it out.")


def override(tree: dict[str, Any], setting: str) -> None:
    """Set one ``key.sub=value`` in the tree, making the mappings on the way.

    Raises:
        ValueError: not of that form, or as in `assign`.
    """
    key, separator, text = setting.partition("=")
    what = f"the override {setting!r}"
    if not separator or not all(key.strip().split(".")):
        raise ValueError(f"{what} is not of the form key.sub=value.")
    assign(tree, key.strip(), read_yaml(text, f"the value of {what}"), what)


def assign(tree: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Set one dotted key in the tree, making the mappings on the way.

    Args:
        what: what sets it, for messages.

    Raises:
        ValueError: a list has no such entry, or a key stands under something that has none.
    """
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        done, last = ".".join(parts[:depth]), depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{what}: {done} is a list of {len(node)}, and has no {part!r}.")
            index: Any = int(part)
        else:
            index = part
        if last:
            node[index] = value
            return
        child = node[index] if isinstance(node, list) else node.get(index)
        if part == "objective" and depth == 0 and isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict | list):
            raise ValueError(f"{what}: {join(done, part)} is {child!r}, which has no keys.")
        node[index] = child
        node = child


def build(cls: type[Config], tree: Any, key: str) -> Config:
    """A configuration dataclass from a mapping, checking every key and plain value."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{key} is {tree!r}; expected keys and values.")
    hints = get_type_hints(cls)
    items = dataclasses.fields(cls)  # type: ignore[arg-type]
    rest = next((item.name for item in items if item.metadata.get("rest")), None)
    known = [item.name for item in items if item.name != rest]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name in known:
            values[name] = _value(value, hints[name], join(key, name))
        elif rest is not None:
            values.setdefault(rest, {})[name] = value
        else:
            raise ValueError(unknown("key", join(key, name), [join(key, one) for one in known]))
    return cls(**values)


def _value(value: Any, annotation: Any, key: str) -> Any:
    options = get_args(annotation) if get_origin(annotation) in (Union, type(int | str)) else (annotation,)
    for option in options:
        if value is not None and isinstance(option, type) and dataclasses.is_dataclass(option):
            return build(option, value, key)
        inner = get_args(option)
        if get_origin(option) is list and isinstance(value, list) and dataclasses.is_dataclass(inner[0]):
            entry_type: Any = inner[0]
            return [build(entry_type, entry, join(key, index)) for index, entry in enumerate(value)]
    if value is None and type(None) not in options and dataclasses.is_dataclass(annotation):
        return annotation()  # type: ignore[operator]
    return convert(value, annotation, key)
