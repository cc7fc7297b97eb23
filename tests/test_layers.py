"""The imports between modules, read from the source, lazy and TYPE_CHECKING ones included."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.paths import ROOT

import minidistill

PACKAGE = ROOT / "minidistill"
# A module imports only from its own folder and from those before it.
ORDER = (
    "errors",
    "types",
    "seeding",
    "system",
    "logs",
    "estimators",
    "config",
    "models",
    "envs",
    "tasks",
    "reporting",
    "placement",
    "trainer",
    "engines",
    "rollouts",
    "evaluation",
    "driver",
    "baking",
    "export",
    "doctor",
    "completion",
    "error_output",
    "look",
    "api",
    "cli",
    "__main__",
)
TOP_LEVEL_MODULES = 6  # in the package's folder, besides __init__ and __main__
HEAVY = {"torch", "transformers", "peft", "vllm", "triton", "wandb"}
# These import only each other, and no torch
LIGHT = {
    *("errors", "types", "seeding", "system", "logs"),
    *("estimators", "config", "envs", "reporting"),
}
# except for what writes tensors to disk
TENSOR_FILES = {"minidistill.reporting.rollout_log"}


@cache
def modules() -> dict[str, Path]:
    """The package's modules by their dotted names."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names that a file imports anywhere, or with `at_import` at its top level."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.iter_child_nodes(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules() else str(node.module))
    return names


def imported_modules(name: str) -> set[str]:
    return {other for other in imports(modules()[name]) if other in modules()} - {name}


def folder(module: str) -> str:
    """The top-level folder or module that a module belongs to, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def assert_acyclic(graph: dict[str, set[str]]) -> None:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"circular imports: {' -> '.join(error.args[1])}") from None


def test_files_have_no_circular_imports() -> None:
    assert len(modules()) > 80
    # the package's own names are made when Python asks for one: see the test of its imports
    assert_acyclic({n: imported_modules(n) for n in modules() if folder(n)})


def test_folders_have_no_circular_imports() -> None:
    graph: dict[str, set[str]] = {}
    for name in modules():
        others = {folder(other) for other in imported_modules(name)} - {folder(name), ""}
        graph.setdefault(folder(name), set()).update(others)
    assert_acyclic(graph)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_follow_the_order_of_layers(name: str) -> None:
    if not folder(name):
        return
    assert folder(name) in ORDER, f"add {folder(name)} to ORDER"
    for other in imported_modules(name):
        if folder(other):
            allowed = ORDER.index(folder(other)) <= ORDER.index(folder(name))
            assert allowed, f"{name} imports {other}"


def test_the_package_itself_imports_only_its_api_and_only_when_that_is_used() -> None:
    """`import minidistill` and the commands' help stay light, and no module of the package depends
    on what Python uses: it imports `__version__` alone from there."""
    package = modules()["minidistill"]
    assert imported_modules("minidistill") == {"minidistill.api"}
    # a subprocess imports it before its path is known
    assert not imports(package, at_import=True)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "minidistill":
                own = [a.name for a in node.names if f"minidistill.{a.name}" not in modules()]
                assert own in ([], ["__version__"]), name


def test_no_module_takes_the_place_of_a_name_of_the_package() -> None:
    """Importing minidistill.run would set the package's attribute `run` to the module."""
    assert len(minidistill.__all__) == 6
    assert not {folder(name) for name in modules()} & set(minidistill.__all__)


@pytest.mark.parametrize("name", sorted(n for n in modules() if folder(n) in LIGHT))
def test_light_modules_import_nothing_heavy(name: str) -> None:
    names = imports(modules()[name], at_import=True)
    assert {folder(other) for other in names if other in modules()} <= LIGHT | {""}
    if name not in TENSOR_FILES:
        assert not {other.split(".")[0] for other in names} & HEAVY


def test_the_kernels_do_not_import_minidistill() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {n for n in imports(path) if n.split(".")[0] == "minidistill"}, path


def test_the_package_has_few_top_level_modules() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(names) <= TOP_LEVEL_MODULES, sorted(names)


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
