"""``posttrain list`` and ``posttrain show NAME``."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from posttrain import objectives
from posttrain.cli.output import print_rows
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.objectives import Declaration, Reweighting
from posttrain.presets import PRESETS, using
from posttrain.statistics import ROLES, TOKEN_COLUMNS, parse, signature
from posttrain.terms import Available, KernelOptions, build_terms


def list_objectives() -> None:
    """Print every objective by family, with its unit and formula."""
    for index, (family, members) in enumerate(objectives.families().items()):
        if index:
            print()
        rows = [(name, found.unit, found.formula) for name, found in _declarations(members)]
        print_rows(family, ("objective", "unit", "formula"), rows)
    print()
    weighing = [(name, found.reweighting.formula) for name, found in _reweightings().items()]
    print_rows("weights of another objective (`reweight:`)", ("name", "formula"), weighing)
    print()
    published = [(name, ", ".join(preset.terms), preset.source) for name, preset in PRESETS.items()]
    print_rows("published settings (`objective: {preset: ...}`)", ("preset", "terms", "source"), published)


def show(name: str) -> None:
    """Print what there is to know about an objective, a reweighting or a preset; of a name that is two of these, both.

    Raises:
        ValueError: unknown name.
    """
    if name in _reweightings():
        _show_function(name, _reweightings()[name])
    elif name in objectives.names() or name not in PRESETS:
        _show_function(name, objectives.get(name))
    if name in PRESETS:
        if name in objectives.names() or name in _reweightings():
            print()
        _show_preset(name)
    elif _is_unlearning(name):
        print(f"\nas published: posttrain show {', '.join(preset for preset, _ in using(name))}")


def _is_unlearning(name: str) -> bool:
    return name in objectives.families()["unlearning"]


def _show_preset(name: str) -> None:
    preset = PRESETS[name]
    print(f"preset {name}\nsource  {preset.source}\n")
    lines = [f"objective: {{preset: {name}}}   # stands for"]
    lines += yaml.safe_dump({"objective": _plain(preset.objective)}, sort_keys=False).splitlines()
    if preset.beside:
        lines += ["# and beside it", *yaml.safe_dump(_plain(preset.beside), sort_keys=False).splitlines()]
    print(_indented("\n".join(lines)))


def _plain(setting: Any) -> Any:
    """Dictionaries of their own, which YAML writes out in full each time."""
    return {key: _plain(value) for key, value in setting.items()} if isinstance(setting, Mapping) else setting


def _reweightings() -> dict[str, Any]:
    return objectives.reweightings()


def _show_function(name: str, function: Callable[..., Any]) -> None:
    declaration: Declaration | None = getattr(function, "declaration", None)
    reweighting: Reweighting | None = getattr(function, "reweighting", None)
    docs = argument_docs(inspect.getdoc(function) or "")
    print(f"{name}: {_summary(function)}\n")
    if declaration is not None:
        print(f"formula  {declaration.formula}\npaper    {declaration.paper}\nunit     {declaration.unit}\n")
    elif reweighting is not None:
        print(f"formula  {reweighting.formula}\npaper    {reweighting.paper}\n")
    inputs = [(parameter, what, docs.get(parameter, "")) for parameter, what in bindings(function).items()]
    print_rows("inputs", ("name", "from", "meaning"), inputs)
    options = signature(function).hyperparameters
    if options:
        print()
        rows = [(key, _default(value), docs.get(key, "")) for key, value in options.items()]
        print_rows("hyper-parameters", ("name", "default", "meaning"), rows)
    if reweighting is not None:
        defaults = {key: value for key, value in options.items() if value is not inspect.Parameter.empty}
        term = {"name": "gradient_ascent", "reweight": {"name": name, **defaults}}
        print(f"\nexample\n{_indented(yaml.safe_dump({'objective': {'forget': term}}, sort_keys=False))}")
        return
    print(f"\nexample\n{_indented(example(name, function))}")


def bindings(function: Callable[..., Any]) -> dict[str, str]:
    """Where each positional parameter's values come from."""
    read = signature(function)
    declared = getattr(function, "declaration", None) or getattr(function, "reweighting", None)
    prepares = getattr(declared, "prepare", None) is not None
    found: dict[str, str] = {}
    for name in (*read.required, *read.optional):
        if name == "loss" and hasattr(function, "reweighting"):
            found[name] = "the term it stands under"
            continue
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
    # an unlearning objective stands on the side where its published settings have it
    side = next(side for _, side in using(name)) if _is_unlearning(name) else None
    tree = {"objective": {side: term} if side else term}
    lines = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).splitlines()
    indent = "    " if side else "  "
    lines += [f"{indent}# {key}: null" for key, value in options.items() if value is None]
    lines += [f"{indent}{key}:   # needs a value" for key, value in options.items() if value is inspect.Parameter.empty]
    lines += [f"{indent}# weight: 1.0", f"{indent}# statistics: {_kernel_options(function)}"]
    sources = bindings(function)
    columns = [key for key, what in sources.items() if what == "data column"]
    if any(key in columns for key in TOKEN_COLUMNS):
        lines.append(f"# The data needs the columns {', '.join(TOKEN_COLUMNS)}: posttrain annotate teacher-topk CONFIG")
    elif columns:
        lines.append(f"# The data needs the columns {', '.join(columns)}.")
    if any("teacher" in what for what in sources.values()) and not side:
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
    if kernels == {"hidden"}:
        options = {"layer": 7}
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=False).strip()


def _mistake(term: dict[str, Any], columns: list[str]) -> str | None:
    """What is still to be decided before the defaults work, in the objective's own words."""
    try:
        build_terms(term, Available([*columns, *TOKEN_COLUMNS], ROLES, reference=True, teacher=True))
    except ValueError as error:
        return str(error)
    return None


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")


def _default(value: Any) -> str:
    return "none: give one" if value is inspect.Parameter.empty else "null" if value is None else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
