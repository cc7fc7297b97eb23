"""Which module imports which, read from the source: lazy and TYPE_CHECKING imports included."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "minidistill"
# A module imports from its own folder and from what stands before it.
ORDER = (
    "errors",
    "types",
    "seeding",
    "files",
    "logs",
    "subprocesses",
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
    "run",
    "cli",
    "__main__",
)
LOOSE_MODULES = 8  # at the top of the package, beside __init__ and __main__
HEAVY = {"torch", "transformers", "peft", "vllm", "triton", "wandb"}
# These may be imported without torch, and import only each other.
LIGHT = {"errors", "types", "seeding", "files", "logs", "estimators", "config", "envs", "reporting"}
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
    """Dotted names that a file imports: anywhere, or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.iter_child_nodes(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules() else str(node.module))
    return names


def edges(name: str) -> set[str]:
    return {other for other in imports(modules()[name]) if other in modules()} - {name}


def folder(module: str) -> str:
    """The folder or the loose module at the top of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def assert_acyclic(graph: dict[str, set[str]]) -> None:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_no_circle_between_files() -> None:
    assert len(modules()) > 80
    assert_acyclic({name: edges(name) for name in modules()})


def test_no_circle_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for name in modules():
        others = {folder(other) for other in edges(name)} - {folder(name), ""}
        graph.setdefault(folder(name), set()).update(others)
    assert_acyclic(graph)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_lead_down(name: str) -> None:
    if not folder(name):
        return
    assert folder(name) in ORDER, f"say in ORDER where {folder(name)} stands"
    for other in edges(name):
        if folder(other):
            down = ORDER.index(folder(other)) <= ORDER.index(folder(name))
            assert down, f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(n for n in modules() if folder(n) in LIGHT))
def test_light_modules_import_nothing_heavy(name: str) -> None:
    names = imports(modules()[name], at_import=True)
    assert {folder(other) for other in names if other in modules()} <= LIGHT | {""}
    if name not in TENSOR_FILES:
        assert not {other.split(".")[0] for other in names} & HEAVY


def test_the_kernels_know_nothing_of_minidistill() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {n for n in imports(path) if n.split(".")[0] == "minidistill"}, path


def test_the_top_of_the_package_is_small() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= LOOSE_MODULES, f"{len(loose)} modules: {sorted(loose)}"


def test_kernels_is_a_folder_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
