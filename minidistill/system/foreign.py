"""Calls of other people's code: environments, rewards, chat templates, tokenizers, monitors.

Such code may raise anything: `SystemExit`, a `KeyboardInterrupt` that nobody pressed, a panic of a
Rust extension, which is no `Exception`. It is caught where the code is called, and is a failure of
that code.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from minidistill.errors import UserError
from minidistill.system.torch_state import read_state, restore_state

LONGEST = 1000  # characters of a described exception
_raised: list[int] = []
"""The signals for which `Interrupted` was raised since `ctrl_c`."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM. A plain KeyboardInterrupt is one that somebody's code raises."""


@contextlib.contextmanager
def ctrl_c() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM raise `Interrupted`, so that what was begun is cleared away.

    Python would raise KeyboardInterrupt, and end at once. Where nothing can be raised, as in a
    callback of the garbage collector, `was_interrupted` says so, and Python prints no traceback.
    """
    _raised.clear()
    with (
        _quiet_where_nothing_is_raised(),
        handling(signal.SIGINT, signal.default_int_handler, raise_interrupted),
        handling(signal.SIGTERM, signal.SIG_DFL, raise_interrupted),
    ):
        yield


@contextlib.contextmanager
def _quiet_where_nothing_is_raised() -> Iterator[None]:
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextlib.contextmanager
def handling(signum: int, default: Any, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle a signal where it would have its `default` effect.

    A handler that somebody else has set stays. Only the main thread can set one.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signum) is not default:
        yield
        return
    signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, default)


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
    """A signal handler."""
    _raised.append(signum)
    raise Interrupted


def was_interrupted() -> bool:
    """Whether there was a signal, though a package may have swallowed what it raised.

    Packages that import others in a `try` do so.
    """
    return bool(_raised)


def check_interrupted() -> None:
    """Raise `Interrupted` if somebody's code has swallowed one."""
    if was_interrupted():
        raise Interrupted


@contextlib.contextmanager
def foreign_code(
    failure: Callable[[BaseException], Exception],
    ours: type[BaseException] | tuple[type[BaseException], ...] = UserError,
) -> Iterator[None]:
    """Call other people's code: whatever it raises becomes `failure(error)`.

    `ours` are the exceptions that it may raise in our name; they stay as they are. So does the
    user's Ctrl-C, also where that code has caught it and raised something else. What it changes of
    torch's state is set back.
    """
    before = read_state()
    try:
        yield
    except ours:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise Interrupted from error
        raise failure(error) from error
    finally:
        restore_state(before)


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception is the user's Ctrl-C, or was raised because of it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, Interrupted):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def describe(error: BaseException) -> str:
    """An exception's type and message, up to `LONGEST` characters."""
    try:
        if isinstance(error, SystemExit):
            text = f"it called sys.exit({'' if error.code is None else repr(error.code)})"
        else:
            text = f"{type(error).__name__}: {error}"
    except Interrupted:
        raise
    except BaseException:  # its own __str__ fails
        text = f"{type(error).__name__}, whose message cannot be read"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
