"""The configurations that ship with the package, by name, and files beside a configuration."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidistill.errors import UserError

_FILES: dict[str, tuple[str, ...]] = {
    "jsonl": ("path", "eval_path"),
    "dataset": ("path", "eval_path"),
    "self-prompts": ("path",),
    "agent": ("path", "eval_path", "command"),
}
"""The arguments of environments that name files."""


def folder() -> Path:
    """The folder of the configurations: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> dict[str, Path]:
    """The shipped configurations and overlays by name, which is the file's name without `.toml`."""
    return {path.stem: path for path in sorted(folder().rglob("*.toml"))}


def find(name: str) -> str:
    """The file that `name` means: itself, or the shipped configuration of that name.

    Raises UserError for a plain name that is neither.
    """
    if os.path.isfile(name) or not is_plain(name):
        return name
    known = names()
    if name in known:
        return str(known[name])
    close = difflib.get_close_matches(name, known, 1)
    nearest = f"did you mean {close[0]}? Or " if close else ""
    raise UserError(
        f"there is no file {name}, and no configuration of that name in the package",
        where=name,
        fix=f"{nearest}name a TOML file, or one of {', '.join(known)}; "
        "overrides are written --a.b.c VALUE",
    )


def is_plain(name: str) -> bool:
    """Whether `name` has no folder and no `.toml`, as the names of shipped configurations."""
    has_folder = name != os.path.basename(name) or name in ("", ".", "..")
    return not has_folder and not name.endswith(".toml")


def hint(name: str) -> str:
    """What to write for a file that is not there, if the package has one of its name; else ""."""
    stem = os.path.basename(name).removesuffix(".toml")
    return f"; the package has a configuration `{stem}`" if stem in names() else ""


def find_beside(data: dict[str, Any], base: Path) -> None:
    """Complete the names of files in the environments' arguments.

    They are relative to the current directory. One that is not there is looked for in `base`, the
    folder of the TOML file, so that a configuration can be moved with its files.
    """
    for args, keys in _arguments(data):
        for key in keys:
            value = args.get(key)
            if isinstance(value, str):
                args[key] = _beside(value, base)
            elif isinstance(value, list) and "cwd" not in args:  # a command's words
                args[key] = [_beside(x, base) if _has_folder(x) else x for x in value]


def _arguments(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """The arguments that name files: tables, and their keys."""
    orchestrator = _table(data, "orchestrator")
    for table in (orchestrator, _table(orchestrator, "eval")):
        envs = table.get("env")
        for env in envs if isinstance(envs, list) else ():
            if not isinstance(env, dict):
                continue
            id = env.get("id")
            yield _table(env, "args"), _FILES.get(id, ()) if isinstance(id, str) else ()
            yield _table(env, "examples"), ("path",)


def _table(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _has_folder(text: object) -> bool:
    return isinstance(text, str) and os.sep in text


def _beside(name: str, base: Path) -> str:
    try:
        path = Path(name).expanduser()
        if path.is_absolute() or path.exists():
            return name
        return str(base / path) if (base / path).exists() else name
    except (OSError, ValueError, RuntimeError):  # no path at all: whoever reads it says so
        return name
