"""Hostile inputs must end in success or in a UserError, soon, and without much memory.

Each input is made from `seed`, its target and its number alone. They are tried in a subprocess, so
that one that crashes or hangs the interpreter is a finding too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from minidistill.errors import UserError, printable
from tools.soak.log import Log
from tools.soak.targets import Target, targets

SECONDS = 1.0  # of computing that an input may take
WALL_SECONDS = 10.0  # that it may take at all, on a machine that does other things too
CRASHED = 60.0  # seconds after which the subprocess has hung for good
MEMORY = 2 << 30  # bytes that an input may take
MESSAGE = 30_000  # characters that the text of up to four errors may have
BATCH = 500  # inputs before another subprocess
PROGRESS = 2000  # inputs before another line of the log


class TooSlowError(BaseException):
    """An input took too long. No code that catches exceptions catches it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that ended in neither success nor a UserError. `kind` is equal for equal causes."""

    target: str
    number: int
    kind: str
    what: str


def soak(log: Log, seed: int, count: int, end: float | None) -> int:
    """Try `count` inputs, spread over all targets, and return how many were tried before `end`."""
    named = targets(log.work / "inputs")
    for target in named:
        target.prepare()
    jobs = [(named[i % len(named)], i // len(named)) for i in range(count)]
    seen: Counter[str] = Counter()
    done = 0
    for failure in _tried(jobs, seed, end):
        if isinstance(failure, int):
            for target, _ in jobs[done:failure]:
                log.count("inputs", target.name)
            if failure % PROGRESS < failure - done or failure == len(jobs):
                log.say(f"inputs: {failure} of {len(jobs)}")
            done = failure
            continue
        kind = f"{failure.target}: {failure.kind}"
        seen[kind] += 1
        if seen[kind] == 1:
            place = _save(log, named, failure, seed)
            log.finding("inputs", f"{failure.target}:{failure.number}: {failure.what}  [{place}]")
    for kind, times in seen.most_common():
        log.say(f"inputs: {times} times: {kind}")
    return done


def replay(name: str, number: int, seed: int) -> int:
    """Try one input again, and show what comes of it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (target,) = (t for t in targets(Path(folder)) if t.name == name)
        target.prepare()
        value = make(target, number, seed)
        print(repr(value)[:2000])
        began = time.monotonic()
        try:
            target.run(value)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            print(f"{time.monotonic() - began:.2f} s")
    return 0


def make(target: Target, number: int, seed: int) -> Any:
    return target.make(Random(f"{seed}/{target.name}/{number}"))


def attempt(target: Target, number: int, seed: int) -> Failure | None:
    """Try one input in this process."""
    try:
        with _bounded():
            target.run(make(target, number, seed))
    except UserError as error:
        return _check_message(target, number, str(error))
    except TooSlowError as error:
        return Failure(target.name, number, f"too slow at {_place(error)}", f"too slow, {error}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind = f"{type(error).__name__} at {_place(error)}"
        return Failure(target.name, number, kind, f"{kind}: {printable(str(error))[:200]}")
    return None


def _check_message(target: Target, number: int, text: str) -> Failure | None:
    """An error's text is short, can be written, and has no control characters."""
    problem = ""
    if len(text) > MESSAGE:
        problem = f"an error of {len(text)} characters"
    elif text != printable(text):
        problem = "an error with control characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = "an error that is not valid Unicode"
    return Failure(target.name, number, problem, f"{problem}: {text[:100]}") if problem else None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise TooSlowError when the time for an input is over."""

    def stop(signum: int, frame: FrameType | None) -> None:
        what = f"{SECONDS:.0f} s" if signum == signal.SIGPROF else f"{WALL_SECONDS:.0f} s"
        raise TooSlowError(what)

    for signum in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signum, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _place(error: BaseException) -> str:
    """The innermost line of this project in a traceback, else the innermost at all."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "/minidistill/" in f.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.name}"


def _tried(jobs: list[tuple[Target, int]], seed: int, end: float | None) -> Iterator[Failure | int]:
    """The failures of all jobs, and after each batch the number of jobs done."""
    context = multiprocessing.get_context("fork")
    done = 0
    while done < len(jobs) and (end is None or time.monotonic() < end):
        ours, theirs = context.Pipe(duplex=False)
        batch = jobs[done : done + BATCH]
        process = context.Process(target=_work, args=(theirs, batch, seed))
        process.start()
        theirs.close()
        current = 0
        try:
            while current < len(batch):
                if not ours.poll(CRASHED):
                    raise EOFError
                failure = ours.recv()
                current += 1
                if failure is not None:
                    yield failure
        except (EOFError, OSError):
            target, number = batch[current]
            process.join(1.0)
            hung = process.is_alive()
            process.kill()
            process.join()
            what = "hangs for good" if hung else f"ends the interpreter ({process.exitcode})"
            yield Failure(target.name, number, what, what)
            current += 1
        finally:
            process.kill()
            process.join()
        done += current
        yield done


def _work(results: Connection, batch: list[tuple[Target, int]], seed: int) -> None:
    """Try inputs in a subprocess, and send the result of each."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    for target, number in batch:
        results.send(attempt(target, number, seed))
    os._exit(0)


def _save(log: Log, named: list[Target], failure: Failure, seed: int) -> str:
    """Keep a failed input in a file; return its name."""
    target = next(t for t in named if t.name == failure.target)
    path = log.saved / f"{failure.target.replace(' ', '-')}-{failure.number}"
    value = make(target, failure.number, seed)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(json.dumps(value, default=repr), errors="surrogatepass")
    return path.name
