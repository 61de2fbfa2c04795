"""Reading YAML as people mean it, expanding environment variables, and checking values against annotations."""

import os
import re
import types
from collections.abc import Hashable
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAMES: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number, `no` is text, 2026-01-01 is text, and a key may stand only once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise ValueError(f"the key {key.value!r} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
# int comes before float, so whole numbers stay whole
for _tag, (_pattern, _starts) in _SCALARS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_starts))
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(text: str, what: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: malformed text or a repeated key, with ``what`` it stands in.
    """
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from error


def expand(tree: Any, key: str = "") -> Any:
    """Replace ``${NAME}`` in every text by the environment variable.

    Raises:
        ValueError: the variable is not set.
    """
    if isinstance(tree, dict):
        return {name: expand(value, join(key, name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [expand(value, join(key, index)) for index, value in enumerate(tree)]
    if not isinstance(tree, str):
        return tree

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{key} is {tree!r}, and the environment variable {match[1]} is not set; set it.")
        return os.environ[match[1]]

    return _VARIABLE.sub(variable, tree)


def join(key: str, name: Any) -> str:
    """The dotted key of an entry."""
    return f"{key}.{name}" if key else str(name)


def convert(value: Any, annotation: Any, key: str) -> Any:
    """A value as its annotation says, where that is plain; annotations of other classes take anything.

    Numbers may be written as text (``"1e-4"``), because YAML 1.1 tools write and read them so.

    Raises:
        ValueError: the value is of another type.
    """
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, options, key)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{key} is {value!r}; expected {_expected(annotation)}.")
        return value
    container = origin or annotation
    if container is dict:
        return _convert_dict(value, options, key)
    if container is list:
        return _convert_list(value, options, key)
    if annotation in _NAMES or annotation is types.NoneType:
        return _convert_scalar(value, annotation, key)
    return value


def _convert_union(value: Any, options: tuple[Any, ...], key: str) -> Any:
    # an exact match first: "8" stays text under `int | str`
    for option in sorted(options, key=lambda option: type(value) is not (get_origin(option) or option)):
        try:
            return convert(value, option, key)
        except ValueError as error:
            if type(value) is (get_origin(option) or option):
                raise error
    raise ValueError(f"{key} is {value!r}; expected {' or '.join(_expected(option) for option in options)}.")


def _convert_dict(value: Any, options: tuple[Any, ...], key: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}; expected keys and values.")
    inner = options[1] if options else Any
    return {name: convert(entry, inner, join(key, name)) for name, entry in value.items()}


def _convert_list(value: Any, options: tuple[Any, ...], key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} is {value!r}; expected a list.")
    return [convert(entry, options[0] if options else Any, join(key, index)) for index, entry in enumerate(value)]


def _convert_scalar(value: Any, wanted: type, key: str) -> Any:
    found: Any = value
    if wanted in (int, float) and isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = value
    if wanted is int and isinstance(found, float) and found.is_integer():
        found = int(found)
    if wanted is float and isinstance(found, int) and not isinstance(found, bool):
        # a whole number stays one (logging_steps: 10 is not 10.0 steps)
        return found
    if isinstance(found, wanted) and not (isinstance(found, bool) and wanted is not bool):
        return found
    raise ValueError(f"{key} is {value!r}; expected {_expected(wanted)}.")


def _expected(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(annotation))
    if annotation in (None, types.NoneType):
        return "null"
    container = get_origin(annotation) or annotation
    if container in (list, dict):
        return "a list" if container is list else "keys and values"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
