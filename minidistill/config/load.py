"""Load files and flags into one validated configuration, and record where each value is from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import tomli
from pydantic import ValidationError

from minidistill.config import overrides, shipped
from minidistill.config.adapter import with_initial_adapter
from minidistill.config.checks import contradictions
from minidistill.config.errors import from_validation, place
from minidistill.config.layers import Layers, leaves
from minidistill.config.problem import Problem
from minidistill.config.schema import Config
from minidistill.config.schema_tree import Path
from minidistill.config.toml import dotted, key_lines, to_toml
from minidistill.errors import UserError, UserErrors
from minidistill.system.files import read_text

PATH_FIX = "check the path; overrides are written --a.b.c VALUE"
LARGEST_FILE = 1 << 19
"""Bytes of a configuration file."""
_WRITTEN_TWICE = ("Cannot overwrite", "Cannot declare", "Duplicate")  # tomli's words
_TEACHER = ("orchestrator", "teacher_model")
_ENVIRONMENTS = (("orchestrator", "env"), ("orchestrator", "eval", "env"))
_TEMPLATE = ("model", "chat_template")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A validated configuration, and where it is from."""

    config: Config
    provenance: dict[str, str]
    """For each setting, by its dotted key: `file:line`, the flag, or `default`."""
    files: tuple[FilePath, ...]
    text: str
    """The merged settings of files and flags as TOML that loads again, without the defaults."""

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON-able data."""
        return json.loads(self.config.model_dump_json())


def load_config(argv: Sequence[str], *, resume: bool = False) -> LoadedConfig:
    """The configuration that a command line names, of a run that is resumed if `resume`.

    `argv` holds TOML files (`a.toml`, `@ b.toml`; a later file beats an earlier one), or names of
    those that ship with the package (`sokoban`, `@ pure`), and dotted overrides
    (`--trainer.loss.adv_tau 0`; they beat the files). Raises UserError with the file, the
    line and the key of each error.
    """
    files, flags = overrides.parse(argv)
    return load_layers([*files, flags], resume=resume)


def load_layers(
    sources: Sequence[str | Sequence[overrides.Override]], *, resume: bool = False
) -> LoadedConfig:
    """The configuration of TOML files and overrides, of which a later one beats an earlier one.

    A file may also be the name of one that ships with the package. Raises UserError as
    `load_config` does.
    """
    sources = [shipped.find(source) if isinstance(source, str) else source for source in sources]
    layers = Layers()
    for source in sources:
        if isinstance(source, str):
            layers.put((), *read_file(source))
        else:
            _put_overrides(layers, source)
    files = [source for source in sources if isinstance(source, str)]
    written = {o.flag for source in sources if not isinstance(source, str) for o in source}
    where = ", ".join(files) or (overrides.IN_PYTHON if overrides.IN_PYTHON in written else "")
    config, taken = _validate(layers, where, resume)
    provenance = {
        dotted(path): layers.origins.get(path) or _taken_from(path, taken)
        for path, _ in leaves(json.loads(config.model_dump_json()))
    }
    paths = tuple(FilePath(name) for name in files)
    return LoadedConfig(config, provenance, paths, to_toml(layers.data))


def read_file(name: str) -> tuple[dict[str, Any], Callable[[Path], str]]:
    """A TOML file's data, and a function that gives the `file:line` where a path was written."""
    text = _read_configuration(name)
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        where = f"{name}:{error.lineno}, column {error.colno}"
        twice = error.msg.startswith(_WRITTEN_TWICE)
        fix = "keep one of the two" if twice else "correct the syntax there"
        message = "a key or a table is there twice" if twice else error.msg
        raise UserError(f"not valid TOML: {message}", where, fix) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid TOML: {error}", name, "correct the syntax") from None
    _check_depth(data, name)
    lines = key_lines(text)

    def origin(path: Path) -> str:
        file = (*path[:-1], "context_file")
        if path[-1:] == ("context",) and path not in lines and file in lines:
            path = file
        for length in range(len(path), 0, -1):
            if path[:length] in lines:
                return f"{name}:{lines[path[:length]]}"
        return name

    for path, table in _context_tables(data):
        _use_context_file(table, path, FilePath(name).parent, origin((*path, "context_file")))
    _use_template_file(data.get("model"), FilePath(name).parent, origin(_TEMPLATE))
    shipped.find_beside(data, FilePath(name).parent)
    return data, origin


def _read_configuration(name: str) -> str:
    fix = f"{PATH_FIX}; a configuration has at most {LARGEST_FILE} bytes, long texts have files of "
    fix += "their own (context_file, chat_template, a file of prompts)"
    too_large = os.path.isfile(name) and os.path.getsize(name) > LARGEST_FILE
    fix = fix if too_large else PATH_FIX + shipped.hint(name)
    # a run's own file has the texts of its contexts, which had files of their own
    is_of_run = os.path.isfile(os.path.join(os.path.dirname(name), "config.resolved.json"))
    return read_text(FilePath(name), fix=fix, limit=None if is_of_run else LARGEST_FILE)


def _check_depth(data: Any, where: str) -> None:
    """Raise UserError for data that is nested so deeply that nothing can walk through it."""
    level = [data]
    for _ in range(overrides.DEEPEST):
        children = (_children(node) for node in level)
        level = [child for of_node in children for child in of_node]
        if not level:
            return
    raise UserError(
        f"tables and lists are nested more than {overrides.DEEPEST} deep", where, "make them flat"
    )


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _put_overrides(layers: Layers, settings: Sequence[overrides.Override]) -> None:
    """Lay the command line, or settings that Python gives, over the files."""
    flags = {override.flag for override in settings}
    for override in settings:
        _check_depth(override.value, override.flag)
        layers.put(override.path, override.value, lambda _, flag=override.flag: flag)  # type: ignore[misc]
    _use_template_file(layers.get(_TEMPLATE[:1]), FilePath(), layers.origins.get(_TEMPLATE, ""))
    for path, table in _context_tables(layers.data):
        context, file = (*path, "context"), (*path, "context_file")
        flag = layers.origins.get(file, "")
        if flag not in flags:
            continue
        # `read_file` has replaced a file's context_file by its context, which a flag's file beats
        if layers.origins.get(context, "") not in flags:
            table.pop("context", None)
        _use_context_file(table, path, FilePath(), flag)
        if "context" in table:
            layers.origins[context] = flag
            del layers.origins[file]


def _context_tables(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The tables that may have a context: the teacher, environments, and lists of contexts."""
    layers = Layers()
    layers.data = data
    tables: list[tuple[Path, Any]] = [(_TEACHER, layers.get(_TEACHER))]
    for environments in _ENVIRONMENTS:
        envs = layers.get(environments)
        tables += [
            ((*environments, i), env)
            for i, env in enumerate(envs if isinstance(envs, list) else ())
        ]
    for path, table in tables:
        if not isinstance(table, dict):
            continue
        yield path, table
        contexts = table.get("contexts")
        for index, choice in enumerate(contexts if isinstance(contexts, list) else ()):
            if isinstance(choice, dict):
                yield (*path, "contexts", index), choice


def _use_context_file(table: dict[str, Any], path: Path, base: FilePath, origin: str) -> None:
    """Replace `context_file` by `context` with its text, which the run then records."""
    name = table.get("context_file")
    if not isinstance(name, str) or not name:
        return
    where = place(origin, (*path, "context_file"))
    if "context" in table:
        raise UserError("both context and context_file are set", where, "keep one of the two")
    table["context"] = read_text(base / FilePath(name).expanduser(), where=where, fix=PATH_FIX)
    del table["context_file"]


def _taken_from(path: Path, taken: dict[str, str]) -> str:
    """Where an adapter brought the setting at `path`, or the table that holds it, from."""
    keys = (dotted(path[:length]) for length in range(len(path), 0, -1))
    return next((taken[key] for key in keys if key in taken), "default")


def _use_template_file(model: Any, base: FilePath, origin: str) -> None:
    """Replace the file's name in `chat_template` by its text, which the run then records."""
    template = model.get("chat_template") if isinstance(model, dict) else None
    if not isinstance(template, str) or not template or _is_template(template):
        return
    where = place(origin, _TEMPLATE)
    text = read_text(base / FilePath(template).expanduser(), where=where, fix=PATH_FIX)
    if not _is_template(text):
        raise UserError(f"{template} holds no Jinja template", where, "name a file with one")
    model["chat_template"] = text


def _is_template(text: str) -> bool:
    """Whether a text has Jinja's expressions or statements, which no file's name has."""
    return "{{" in text or "{%" in text


def _validate(layers: Layers, files: str, resume: bool) -> tuple[Config, dict[str, str]]:
    """The configuration, and where settings are from that its adapter brings."""
    data = layers.data
    # Empty tables instead of missing ones, so that errors name the keys that are required.
    orchestrator = data.get("orchestrator", {})
    if isinstance(orchestrator, dict):
        data = {**data, "orchestrator": {"teacher_model": {}, **orchestrator}}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, layers, files or "command line") from None
    config, taken = with_initial_adapter(config, resume)
    problems = [_as_error(problem, layers, files) for problem in contradictions(config)]
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else problems[0]
    return config, taken


def _as_error(problem: Problem, layers: Layers, files: str) -> UserError:
    paths = [tuple(key.split(".")) if isinstance(key, str) else key for key in problem.keys]
    places = [place(layers.origin(path), path) for path in paths if path in layers.origins]
    if not places:  # all defaults: the table around the first, or the files
        places = [place(layers.origin(paths[0]) or files, paths[0])]
    return UserError(problem.what, "; ".join(places), problem.fix)
