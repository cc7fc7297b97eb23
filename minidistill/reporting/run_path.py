"""Where a run lives: its directory is chosen, locked, and nobody else's."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.run_directory import (
    FOLDERS,
    RESOLVED,
    WRITTEN,
    clear_unbegun,
    is_of_a_start,
    not_writable,
)
from minidistill.reporting.run_lock import LOCK, LockedError, locked


@contextlib.contextmanager
def claim_path(loaded: LoadedConfig, resume: bool) -> Iterator[Path]:
    """Where the run lives, see `choose_path`, which no other run uses until the end.

    The path is absolute and without links: neither a link that is changed meanwhile nor another
    current directory, to which an environment may go, leads to another place.

    A number that another run has just taken is passed over. What a start that was cut off left
    there is removed. Raises UserError for a directory that is in use or has links where the run
    writes, and as `choose_path` does.
    """
    number = 0
    with contextlib.ExitStack() as stack:
        while True:
            path = choose_path(loaded, resume, above=number)
            try:
                real = Path(os.path.realpath(path))
                stack.enter_context(locked(real))
            except LockedError as error:
                if resume or loaded.config.output_dir is not None:
                    raise UserError(
                        f"{path} is in use by another run ({error})",
                        where=_where(loaded),
                        fix="wait until that has ended, or choose another --output_dir",
                    ) from None
                number = max(number, _run_number(path.name, _name(loaded)) or 0)
                continue
            except OSError as error:
                raise not_writable(loaded, path, error) from error
            if choose_path(loaded, resume, above=number) == path:
                break
            stack.pop_all().close()  # a run has begun and ended there meanwhile
        if resume:
            _refuse_links(real)
        else:
            try:
                clear_unbegun(real)
            except OSError as error:
                raise not_writable(loaded, path, error) from error
        yield real


def choose_path(loaded: LoadedConfig, resume: bool, above: int = 0) -> Path:
    """Where the run lives: `output_dir`, or `runs/NAME` with NAME from the first file.

    Without `output_dir` a new run gets the next free number (`runs/NAME-2`) `above` a given one,
    and `resume` takes the newest run. Raises UserError if the directory holds a run already (unless
    resuming), holds none (when resuming), or cannot be written.
    """
    where = _where(loaded)
    path = _path(loaded, resume, above)
    holds_run = os.path.exists(path / RESOLVED)
    if resume and not holds_run:
        if os.path.isdir(path) and not os.access(path, os.X_OK):
            fix = "resume it as the user who started it"
            raise UserError(f"{path} cannot be read: {os.strerror(errno.EACCES)}", where, fix)
        fix = "check --output_dir, or leave out --resume: the run starts then"
        raise UserError(f"there is no run to resume in {path}", where, fix)
    fix = "choose another --output_dir"
    if holds_run and not resume:
        raise UserError(f"{path} already holds a run", where, f"{fix}, or continue with --resume")
    ancestor = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not (ancestor.is_dir() and os.access(ancestor, os.R_OK | os.W_OK | os.X_OK)):
        what = f"{path} cannot be written: {ancestor} is not a writable directory"
        raise UserError(what, where, fix)
    if not resume and ancestor == path and _is_used(path):
        raise UserError(f"{path} exists and is not empty", where, fix)
    return path


def _path(loaded: LoadedConfig, resume: bool, above: int) -> Path:
    """The path that is asked for. Raises UserError for one that no directory can have."""
    output_dir = loaded.config.output_dir
    try:
        if output_dir is None:
            path = _runs_path(loaded, resume, above)
        else:
            path = Path(output_dir).expanduser()
            if "\0" in output_dir:
                raise ValueError("it has a null character")
            if os.path.islink(path) and not os.path.exists(path):
                raise ValueError("it is a symbolic link that leads nowhere")
        path.absolute()  # to begin with, the current directory has to be there
    except (ValueError, RuntimeError) as error:  # a RuntimeError for a user without a home
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or 'the current directory'}: {error.strerror or error}"
    else:
        return path
    raise UserError(
        f"{output_dir or 'runs'} cannot be a run's directory: {reason}",
        where=_where(loaded),
        fix="choose another --output_dir, as an absolute path",
    )


def _where(loaded: LoadedConfig) -> str:
    return loaded.provenance.get("output_dir", "output_dir")


def _name(loaded: LoadedConfig) -> str:
    return loaded.files[0].stem if loaded.files else "run"


def _is_used(path: Path) -> bool:
    """Whether a directory holds anything but what is left of a start that was killed.

    Such a start leaves its lock, and makes its folders before its files.
    """
    try:
        children = [child for child in path.iterdir() if child.name != LOCK]
        if not children:
            return False
        names = {child.name for child in children}
        starts = (path / LOCK).exists() and all(map(is_of_a_start, children))
        return not starts or not (names <= {*FOLDERS, "sync"} or names >= set(FOLDERS))
    except FileNotFoundError:  # another run has just given it up
        return False
    except OSError:  # somebody else's
        return True


def _refuse_links(path: Path) -> None:
    """Raise UserError (exit code 3) for a link in place of something that the run writes."""
    for name in WRITTEN:
        if os.path.islink(path / name):
            raise UserError(
                f"{path / name} is a symbolic link, through which a run does not write",
                where=str(path / name),
                fix="put what it points to in its place; output_dir itself may be a link",
                exit_code=EXIT_ENVIRONMENT,
            )


def _runs_path(loaded: LoadedConfig, resume: bool, above: int) -> Path:
    """The newest `runs/NAME-N` when resuming, else the next one."""
    runs = Path("runs")
    name = _name(loaded)
    paths = runs.iterdir() if runs.is_dir() else ()
    numbered = {n: path for path in paths if (n := _run_number(path.name, name)) is not None}
    by_number = {n: path for n, path in numbered.items() if not path.is_dir() or _is_used(path)}
    newest = max(by_number, default=0)
    if resume and by_number:
        return by_number[newest]
    newest = max(newest, above)
    return runs / (name if newest == 0 else f"{name}-{newest + 1}")


def _run_number(directory: str, name: str) -> int | None:
    """1 for `name`, N for `name-N`, None for the directories of other runs."""
    if directory == name:
        return 1
    match = re.fullmatch(re.escape(name) + "-([0-9]+)", directory)
    return int(match[1]) if match else None
