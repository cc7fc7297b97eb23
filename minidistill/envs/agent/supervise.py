"""Runs one program, and ends it with everything that it has started. A script of its own.

    python -I -S supervise.py SOCKET PROCESSES BYTES GRACE COMMAND…

Processes that a program leaves behind, also those that leave its session, become children of this
one. They are ended when the program ends, when it and they are more than PROCESSES or have more
than BYTES in memory, and when the other end of the socket (a file descriptor) is closed, which the
kernel does when the run dies. What happened is then written to the socket, as a line of JSON. Only
what is in the standard library is imported, and little of that: there is one of these a program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl
POLL_SECONDS = 0.2
"""Between two counts of the processes."""
SCAN_SECONDS = 1.0
"""The same for kernels without lists of children: scans all processes."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    descriptor, most, size = map(int, sys.argv[1:4])
    grace, command = float(sys.argv[4]), sys.argv[5:]
    os.set_inheritable(descriptor, False)
    libc = ctypes.CDLL(None)
    libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child_ended, wake = os.pipe()
    for end in (child_ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    program = start(command, libc)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the program's are as they were
        signal.signal(number, signal.SIG_IGN)
    report = watch(program, descriptor, child_ended, most, size)
    end_all(program, 0.0 if '"exit"' in report or '"signal"' in report else grace)
    with contextlib.suppress(OSError):  # nobody waits for it
        os.write(descriptor, report.encode() + b"\n")


def start(command: list[str], libc: ctypes.CDLL) -> int:
    """Start the program as the leader of a session. It dies with this process."""
    program = os.fork()
    if program:
        return program
    try:
        os.setsid()
        libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # as Python has set them
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except BaseException as error:
        os.write(2, f"cannot be started: {error}\n".encode(errors="replace"))
    os._exit(127)


def watch(program: int, descriptor: int, child_ended: int, most: int, size: int) -> str:
    """Wait until the program ends or is to be ended. Returns what is written about it."""
    lists = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    pause = POLL_SECONDS if lists else SCAN_SECONDS
    counted = time.monotonic()
    while True:
        ready = select.select([descriptor, child_ended], [], [], pause)[0]
        if child_ended in ready:
            os.read(child_ended, 1 << 12)
            if (status := reap(program)) is not None:
                code = os.waitstatus_to_exitcode(status)
                return f'{{"exit": {code}}}' if code >= 0 else f'{{"signal": {-code}}}'
        if descriptor in ready:  # nothing is ever sent: it is closed
            return "{}"
        if time.monotonic() - counted >= pause:
            counted = time.monotonic()
            processes = descendants(lists)
            if len(processes) > most:
                return f'{{"processes": {len(processes)}}}'
            if (resident := sum(map(resident_bytes, processes))) > size:
                return f'{{"memory": {resident}}}'


def reap(program: int) -> int | None:
    """Take note of all children that have ended. Returns the program's status if it has."""
    found = None
    try:
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return found
            if process == program:
                found = status
    except ChildProcessError:
        return found


def end_all(program: int, grace: float) -> None:
    """End the program and every process that it has left. Returns when there is none."""
    deadline = time.monotonic() + grace
    if grace:
        signal_all(program, signal.SIGTERM)
    while has_children():
        if time.monotonic() >= deadline:
            signal_all(program, signal.SIGKILL)
        time.sleep(0.01)


def has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def signal_all(program: int, number: int) -> None:
    """Signal the program's group, which is exact, and all descendants that are outside of it."""
    with contextlib.suppress(OSError):
        os.killpg(program, number)
    for process in descendants(os.path.exists(f"/proc/self/task/{os.getpid()}/children")):
        with contextlib.suppress(OSError):
            os.kill(process, number)


def descendants(lists: bool) -> list[int]:
    """All processes below this one."""
    by_parent = None if lists else scanned()
    found: list[int] = []
    left = [os.getpid()]
    while left:
        process = left.pop()
        below = children_of(process) if by_parent is None else by_parent.get(process, [])
        found += below
        left += below
    return found


def children_of(process: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended
    return found


def scanned() -> dict[int, list[int]]:
    """The children of every process, from the parents of all."""
    by_parent: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            by_parent.setdefault(parent, []).append(int(name))
    return by_parent


def resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
