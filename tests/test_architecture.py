"""The shape of the code: who may import whom, and how large things may grow."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"
FOLDERS = ("posttrain", "tests", "launch", "configs", "docs", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".json", ".csv", ".txt", ""}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

STANDARD_LIBRARY_AND_TENSORS = {"torch", "jaxtyping", "psutil"}
# Layer -> the parts of the package it may import; a part that is not listed is free, but for circles.
ALLOWED = {
    "posttrain.kernels": {"posttrain.kernels"},
    "posttrain.objectives": {"posttrain.objectives", "posttrain.suggest"},
    "posttrain.suggest": set(),
    "posttrain.statistics": {"posttrain.kernels"},
    "posttrain.config": {"posttrain.config", "posttrain.suggest"},
}
TOP = {"posttrain.cli", "posttrain.pipeline", "posttrain.trainers", "posttrain.__main__"}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources(PACKAGE)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Dotted names a file imports, but for type checking; with ``lazy``, also inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node):
            children: list[ast.AST] = list(node.orelse)  # type: ignore[attr-defined]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the package out"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        for child in children:
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_layers_import_only_what_stands_below_them(layer: str) -> None:
    offenders = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if within(name, {layer})
        for imported in imports(path, lazy=True)
        if imported.split(".")[0] == "posttrain" and not within(imported, ALLOWED[layer])
    ]
    assert offenders == []


def test_objectives_and_kernels_need_nothing_but_tensors() -> None:
    import sys

    offenders = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if within(name, {"posttrain.objectives", "posttrain.kernels"})
        for imported in imports(path, lazy=True)
        if (first := imported.split(".")[0]) not in sys.stdlib_module_names
        and first not in {"posttrain", "triton", *STANDARD_LIBRARY_AND_TENSORS}
    ]
    assert offenders == []


def test_only_the_top_knows_the_trainers() -> None:
    offenders = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        # the package itself hands the trainers on when they are asked for
        if not within(name, TOP) and name != "posttrain"
        for imported in imports(path, lazy=False)
        if within(imported, {"posttrain.trainers", "posttrain.cli", "posttrain.pipeline"})
    ]
    assert offenders == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {one for one in imports(path, lazy=False) if one in MODULES} for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in finished:
            for target in sorted(graph[name] - {name}):
                visit(target, [*way, name])
            finished.add(name)

    for name in graph:
        visit(name, [])


def test_files_stay_small() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(PACKAGE)}
    offenders = [f"{path.relative_to(ROOT)}: {size} lines" for path, size in sizes.items() if size > MAX_FILE_LINES]
    assert offenders == []


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_functions_stay_small() -> None:
    sizes = {
        (path, node): (node.end_lineno or 0) - node.lineno + 1 for path in sources(PACKAGE) for node in functions(path)
    }
    offenders = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {size} lines"
        for (path, node), size in sizes.items()
        if size > MAX_FUNCTION_LINES
    ]
    assert offenders == []


def project_files() -> list[Path]:
    """What git holds, or where there is no git, what lies in the project's folders."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / line for line in listed.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in files if path.is_file() and path.suffix in TEXT_SUFFIXES]


# Spelled apart, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(rf"(?<![\w.])/{name}/" for name in ("work", "home", "root", "opt", "Users", "mnt", "data"))
)


def test_no_file_names_a_place_on_one_machine() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATHS.search(line)
    ]
    assert offenders == []


@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_tested_versions_satisfy_the_declared_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    optional = project["optional-dependencies"]
    for text in (*project["dependencies"], *optional["deepspeed"], *optional["evaluation"], *optional["dev"]):
        requirement = Requirement(text)
        if requirement.name == "triton":  # torch for CUDA pins its own
            continue
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
