"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minidistill"
# From the bottom up: a module imports from its own layer and those below.
LAYERS = [
    {"types", "errors", "config", "models", "child"},
    {"envs", "prompts", "scoreboard", "rundir", "ui"},
    {"devices", "roles", "partition", "plan", "engines", "trainer", "weights"},
    {"data", "monitors", "report", "records", "preflight"},
    {"header", "evaluate", "collect", "ahead", "session", "outcome", "loop"},
    {"cli", "__main__"},
]
HEAVY = {"torch", "transformers", "peft", "vllm", "triton", "wandb"}
LIGHT = {"types", "errors", "config", "envs", "prompts", "scoreboard", "ui", "report"}
# A program of its own, run by hand
BUILDER = PACKAGE / "models" / "build_tiny_sokoban.py"


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != BUILDER)


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def level(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert len(found) == 1, f"{name} stands in no layer: say in which"
    return found[0]


def imports(path: Path, top_level: bool) -> set[str]:
    """Dotted names that a module imports, everywhere or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        nodes.append(node)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    for name in imports(path, top_level=True):
        pieces = name.split(".")
        if pieces[0] != "minidistill" or len(pieces) < 2 or pieces[1] == "__version__":
            continue
        assert level(pieces[1]) <= level(part(path)), f"{path.name} imports {name} from above"
        if part(path) in LIGHT:
            assert pieces[1] in LIGHT | {"models"}, f"{path.name} is light, {name} is not"
    if part(path) in LIGHT:
        heavy = {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY
        assert not heavy, f"{path.name} imports {heavy} at once"


def test_the_kernels_know_nothing_of_minidistill() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {n for n in imports(path, False) if n.split(".")[0] == "minidistill"}, path


def test_house_limits() -> None:
    files = [p for p in ROOT.rglob("*.py") if not {".venv", "build", "runs"} & set(p.parts)]
    assert len(files) > 50
    for path in files:
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, f"{path.relative_to(ROOT)} has {len(lines)} lines"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
