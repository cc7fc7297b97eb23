"""What `minidistill init` does: a configuration to start from, by a few questions or flags."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import tomli

from minidistill.baking.context import FLAG as CONTEXT
from minidistill.baking.context import read_context
from minidistill.baking.document import commented
from minidistill.baking.flags import naming_flags
from minidistill.baking.prompts import FLAG as PROMPTS
from minidistill.baking.prompts import prompts_args
from minidistill.baking.settings import ENV, MODEL, Defaults, Given, override
from minidistill.config.load import LARGEST_FILE, load_layers
from minidistill.envs.registry import known_environments
from minidistill.errors import EXIT_OK, UserError, printable
from minidistill.placement.machine import Machine
from minidistill.system.files import write_atomic, writing

ROOM = 1024
"""Tokens of `seq_len` beside the context, of which there is at most one for two bytes."""
_TITLE = """\
Written by `minidistill init`. Edit it, and run it from the same directory:
  minidistill plan {file}      # what runs where, and whether it fits
  minidistill run {file}
  minidistill config {file}    # every setting, and where it comes from

"""


def init(
    file: str,
    model: str | None,
    context: str | None,
    prompts: str | None,
    env: str | None,
    *,
    asks: bool,
    force: bool,
) -> int:
    """Write a configuration to `file`. Returns the exit code.

    Answers that are missing are asked for if `asks`; otherwise the model has a default, there are
    no prompts, and a context is required. Raises UserError if there is a file already (unless
    `force`), and for arguments that cannot be used.
    """
    path = Path(file).expanduser()
    _check_path(path, force)
    chosen = Defaults.of(Machine.local().gpus)
    if prompts is not None and env is not None:
        what = "an environment has prompts of its own, so there is no file of them"
        raise UserError(what, f"{PROMPTS}, {ENV}", "keep one of the two")
    if asks:
        if model is None:
            model = _ask("Model: a hub id or a folder", _model, chosen.model)
        if context is None:
            context = _ask("Context: a text, or the path of a file", _context)
        if prompts is None and env is None:
            prompts = _ask("File of prompts (empty: the model writes them)", _prompts, "") or None
    if context is None:
        fix = f'minidistill init {shlex.quote(file)} {CONTEXT} "You are …"'
        raise UserError(f"init needs {CONTEXT}", CONTEXT, fix)
    text = configuration(
        Given(
            chosen.model if model is None else _model(model),
            read_context(context),
            prompts,
            env=env,
        ),
        chosen,
        path,
    )
    _write(path, text, force)
    name = shlex.quote(str(path))
    print(printable(f"wrote {path}\nnext:\n  minidistill plan {name}\n  minidistill run {name}"))
    return EXIT_OK


def configuration(given: Given, chosen: Defaults, path: Path) -> str:
    """The text of the configuration, which has been loaded once."""
    if given.env is not None:
        _check_env(given.env)
    layer = given.overrides(chosen)
    needed = len(given.context.encode(errors="replace")) // 2 + ROOM + chosen.max_tokens
    if needed > 2048:
        layer.append(override("seq_len", -(-needed // 256) * 256))
    with naming_flags():
        loaded = load_layers([layer])
    text = commented(tomli.loads(loaded.text), _TITLE.format(file=shlex.quote(str(path))))
    if len(text.encode()) > LARGEST_FILE:
        raise UserError(
            f"the context makes a file of more than {LARGEST_FILE} bytes, which cannot be read",
            where=CONTEXT,
            fix="give a short one, and set orchestrator.teacher_model.context_file in the file",
        )
    return text


def _check_path(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder", str(path), "name a file in it")
    if os.path.lexists(path) and not force:
        fix = "choose another name, or replace it with --force"
        raise UserError(f"{path} is there already", str(path), fix)


def _write(path: Path, text: str, force: bool) -> None:
    with writing(path, then="init again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if force:
            write_atomic(path, text)
            return
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:  # made meanwhile
            _check_path(path, force)


def _check_env(env: str) -> None:
    """Raise UserError if there is no such environment. A function of the user is not loaded."""
    known = known_environments()
    if env not in known and ":" not in env:
        fix = f"use one of {', '.join(sorted(known))}, or write module:function"
        raise UserError(f"unknown environment {env!r}", ENV, fix)


# -- questions ---------------------------------------------------------------------------------


def _ask(question: str, check: Callable[[str], str], default: str | None = None) -> str:
    """The answer to a question, asked again until `check` takes it."""
    shown = f" [{default}]" if default else ""
    while True:
        sys.stdout.write(f"{question}{shown}: ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            raise UserError("there is no answer, so nothing is written", fix="see init --help")
        answer = line.strip()
        if not answer and default is not None:
            return default
        try:
            return check(answer)
        except UserError as error:
            print(printable(f"  {error.what}: {error.fix}"))


def _model(answer: str) -> str:
    if not answer.strip():
        raise UserError("the model's name is empty", MODEL, "give a hub id or a folder")
    return answer


def _context(answer: str) -> str:
    read_context(answer)
    return answer


def _prompts(answer: str) -> str:
    prompts_args(answer)
    return answer
