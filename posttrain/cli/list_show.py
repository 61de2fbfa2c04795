"""``posttrain list`` and ``posttrain show NAME``."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import yaml

from posttrain import objectives
from posttrain.cli.output import print_rows
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.objectives import Declaration
from posttrain.statistics import TOKEN_COLUMNS, parse, signature
from posttrain.terms import Available, KernelOptions, build_terms


def list_objectives() -> None:
    """Print every objective by family, with its unit and formula."""
    for index, (family, members) in enumerate(objectives.families().items()):
        if index:
            print()
        rows = [(name, found.unit, found.formula) for name, found in _declarations(members)]
        print_rows(family, ("objective", "unit", "formula"), rows)


def show(name: str) -> None:
    """Print what there is to know about an objective.

    Raises:
        ValueError: unknown name.
    """
    function = objectives.get(name)
    declaration: Declaration | None = getattr(function, "declaration", None)
    docs = argument_docs(inspect.getdoc(function) or "")
    print(f"{name}: {_summary(function)}\n")
    if declaration is not None:
        print(f"formula  {declaration.formula}\npaper    {declaration.paper}\nunit     {declaration.unit}\n")
    inputs = [(parameter, what, docs.get(parameter, "")) for parameter, what in bindings(function).items()]
    print_rows("inputs", ("name", "from", "meaning"), inputs)
    options = signature(function).hyperparameters
    if options:
        print()
        rows = [(key, _default(value), docs.get(key, "")) for key, value in options.items()]
        print_rows("hyper-parameters", ("name", "default", "meaning"), rows)
    print(f"\nexample\n{_indented(example(name, function))}")


def bindings(function: Callable[..., Any]) -> dict[str, str]:
    """Where each positional parameter's values come from."""
    read = signature(function)
    prepares = getattr(getattr(function, "declaration", None), "prepare", None) is not None
    found: dict[str, str] = {}
    for name in (*read.required, *read.optional):
        statistic = None if name in TOKEN_COLUMNS else parse(name)
        if statistic is not None:
            holder = "reference" if statistic.reference else "policy"
            holder = "policy and teacher" if statistic.kernel in TEACHER_STATISTICS else holder
            found[name] = f"statistic of the {holder}, per {statistic.unit.removesuffix('s')}"
        elif prepares and name in read.optional:
            found[name] = "prepared over the whole step"
        else:
            found[name] = "data column"
        if name in read.optional:
            found[name] += ", optional"
    return found


def example(name: str, function: Callable[..., Any]) -> str:
    """YAML that uses the objective, with every hyper-parameter at its default."""
    options = signature(function).hyperparameters
    term: dict[str, Any] = {"name": name}
    term |= {key: value for key, value in options.items() if value not in (None, inspect.Parameter.empty)}
    lines = yaml.safe_dump({"objective": term}, sort_keys=False, allow_unicode=True).splitlines()
    lines += [f"  # {key}: null" for key, value in options.items() if value is None]
    lines += [f"  {key}:   # needs a value" for key, value in options.items() if value is inspect.Parameter.empty]
    lines += ["  # weight: 1.0", f"  # statistics: {_kernel_options(function)}"]
    sources = bindings(function)
    columns = [key for key, what in sources.items() if what == "data column"]
    if any(key in columns for key in TOKEN_COLUMNS):
        lines.append(f"# The data needs the columns {', '.join(TOKEN_COLUMNS)}: posttrain annotate teacher-topk CONFIG")
    elif columns:
        lines.append(f"# The data needs the columns {', '.join(columns)}.")
    if any("teacher" in what for what in sources.values()):
        lines += ["teacher:", "  name_or_path: ...   # a model with the same tokenizer"]
    mistake = _mistake(term, columns)
    return "\n".join([*lines, f"# {mistake}"] if mistake else lines)


def argument_docs(text: str) -> dict[str, str]:
    """Parameter -> its description, out of the ``Args:`` section of a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else ():
        entry = re.match(r"^ {4}(\w+(?:, \w+)*): *(.*)$", line)
        if entry:
            names = entry[1].split(", ")
            docs |= dict.fromkeys(names, entry[2])
        elif line.strip():
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
    return docs


def _declarations(members: dict[str, Callable[..., Any]]) -> list[tuple[str, Declaration]]:
    return [(name, function.declaration) for name, function in members.items()]  # type: ignore[attr-defined]


def _kernel_options(function: Callable[..., Any]) -> str:
    """The kernel's options that matter to the objective's statistics, at their defaults."""
    read, defaults = signature(function), KernelOptions()
    kernels = {found.kernel for name in (*read.required, *read.optional) if (found := parse(name))}
    options: dict[str, Any] = {"temperature": defaults.temperature}
    if "jsd" in kernels:
        options["jsd_beta"] = defaults.jsd_beta
    if kernels & {"topk_logp", "topk_ids"}:
        options["k"] = 8
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=False).strip()


def _mistake(term: dict[str, Any], columns: list[str]) -> str | None:
    """What is still to be decided before the defaults work, in the objective's own words."""
    everything = ("chosen", "rejected", "refusal", "mismatched", "retain", "forget")
    try:
        build_terms(term, Available([*columns, *TOKEN_COLUMNS], everything, reference=True, teacher=True))
    except ValueError as error:
        return str(error)
    return None


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")


def _default(value: Any) -> str:
    return "none: give one" if value is inspect.Parameter.empty else "null" if value is None else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
