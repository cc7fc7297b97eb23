"""Kills runs and resumes them, feeds the program hostile inputs, and starts and stops it.

    python -m tools.soak [--seed 0] [--only kills inputs starts] [--kills 60] [--inputs 20000]
                         [--starts 200] [--seconds S] [--folder FOLDER] [--log FILE]

Each finding is one line; `FOLDER/soak.log` (and FILE) has them with everything else, and
`FOLDER/findings` the inputs and run directories to repeat them with. `--seconds` bounds each part:
a part that runs out of time says how far it came. Ctrl-C or SIGTERM ends the soak, and the log has
what was done. `--replay TARGET:NUMBER` tries one input again and shows the traceback. Exit code 0
without findings, 1 with some, 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PARTS = ("kills", "inputs", "starts")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs, each followed by a resume")
    parser.add_argument("--inputs", type=int, default=20_000, help="hostile inputs")
    parser.add_argument("--starts", type=int, default=200, help="runs that are started and stopped")
    parser.add_argument("--seconds", type=float, help="limit for each part; by default none")
    parser.add_argument("--folder", type=Path, help="by default a new one in the temporary folder")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where a copy of the log is kept")
    parser.add_argument("--replay", metavar="TARGET:NUMBER")
    args = parser.parse_args(argv)
    # One core: sampled tokens are the same on every machine, and kills land where they are aimed.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    from tools.soak import shared

    if not args.replay:
        shared.make_private()  # before torch starts threads
    from tools.soak import inputs, kills, starts
    from tools.soak.log import Log, versions

    if args.replay:
        target, _, number = args.replay.rpartition(":")
        return inputs.replay(target, int(number), args.seed)
    about = versions()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="minidistill-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, args.log)
    print(f"the log is {log.folder}/soak.log")
    log.say(f"seed {args.seed}, parts {' '.join(args.only)}")
    for line in (*about, f"shared memory: {shared.describe()}"):
        log.say(line)
    counts = {"kills": args.kills, "inputs": args.inputs, "starts": args.starts}
    began, summary, code = time.monotonic(), [], 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name, part in (("inputs", inputs), ("kills", kills), ("starts", starts)):
        if name in args.only and not code:
            part_began, before = time.monotonic(), len(log.findings)
            end = None if args.seconds is None else part_began + args.seconds
            try:
                part.soak(log, args.seed, counts[name], end)
            except KeyboardInterrupt:
                code = 130
            summary += [
                f"{name}: {log.done[name]} of {counts[name]} in "
                f"{time.monotonic() - part_began:.0f} s, {len(log.findings) - before} findings",
                *(f"  {line}" for line in log.counted(name)),
            ]
    log.say("stopped by a signal" if code else "ended")
    for line in summary:
        log.say(f"  {line}")
    shutil.rmtree(log.work, ignore_errors=True)
    log.say(f"{len(log.findings)} findings in {time.monotonic() - began:.0f} s")
    return code or (1 if log.findings else 0)


if __name__ == "__main__":
    sys.exit(main())
