"""Compares a step with the same step in TRL's SDFTTrainer: time, and peak memory.

    python -m bench.peers [--case NAME]… [--mode full_logits|topk_logits]… [--repeats N]

Both train a LoRA adapter on the same model, context, numbers of prompts and lengths, in fp32 on a
CPU, in processes of their own that take steps in turn. TRL's modes are the reverse KL (alpha 1):
`full_logits` is minidistill's estimator `full`, `topk_logits` with a tail bucket is its `top_k`.
The teacher is the frozen base, with the adapter off. First, TRL repeats minidistill's first step,
with its completions and its adapter: no time is reported unless loss and gradient norm are equal up
to float error. Completions have a fixed length. Neither that first step nor the context, which
minidistill reads once a run, is among the measured steps. TRL runs without activation
checkpointing, its whole batch in one pass. Seconds of the CPU are given too, for a machine on which
other programs run. Writes bench/results/peers.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.pair import ROOT, save
from bench.peers_venv import TRL, trl_python
from bench.workload import STEPS, Case, make_parser, named_model, one_process_environment
from minidistill.errors import UserError, printable
from minidistill.models.registry import resolve

Answer = dict[str, Any]
CLOCKS = ("seconds", "cpu_seconds")
CASES = {
    "context_1000": {"context": 1000, "prompt": 10},
    "context_100": {"context": 100, "prompt": 10},
    "groups_of_8": {"context": 100, "prompt": 400, "group": 8},
}
ESTIMATORS = {"full_logits": "full", "topk_logits": "top_k"}
# Relative, in fp32: sums of other orders. A gradient's norm sums errors of 30 layers.
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3}


class Peer:
    """A process that takes a step when it is told to, and answers in JSON."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        self.answers: list[Answer] = []
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={
                    **one_process_environment(threads),
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                },
            )
        self.first = self._answer()

    def step(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said is read below
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        self.answers.append(self._answer())

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: Answer = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} ended with an error:\n{self.log.read_text()[-2000:]}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(case: Case, mode: str, repeats: int, threads: int) -> dict[str, Any]:
    """Both sides' figures. Raises SystemExit if they do not compute the same loss."""
    case = replace(case, estimator=ESTIMATORS[mode])
    python = trl_python()
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(asdict(case)))
        try:
            ours = [sys.executable, "-m", "bench.peers_ours", name]
            peers.append(Peer("minidistill", ours, threads, folder / "ours.log"))
            values = asdict(case) | {"folder": str(Path(resolve(case.model))), "steps": STEPS}
            (folder / "trl.json").write_text(json.dumps(values))
            theirs = [str(python), str(ROOT / "bench" / "peers_trl.py"), name, mode]
            peers.append(Peer("TRL", theirs, threads, folder / "trl.log"))
            check_same(*(peer.first for peer in peers))
            for turn in range(repeats):
                for peer in peers[:: -1 if turn % 2 else 1]:  # the sides take turns at going first
                    peer.step()
        finally:
            for peer in peers:
                peer.close()
    return summary(*peers)


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Print the two losses and gradient norms of the same completions.

    Raises SystemExit if they are not equal up to float error.
    """
    for name, tolerance in TOLERANCE.items():
        a, b = ours[name], theirs[name]
        print(f"  {name:9}  minidistill {a:.7g}  TRL {b:.7g}", flush=True)
        if not abs(a - b) <= tolerance * min(abs(a), abs(b)):
            raise SystemExit(f"not compared: the same completions give another {name}")


def summary(ours: Peer, theirs: Peer) -> dict[str, Any]:
    """Medians of each side, and the median of the rounds' ratios."""
    sides = {
        peer.name: {
            **{clock: statistics.median(a[clock] for a in peer.answers) for clock in CLOCKS},
            "first_step": peer.first["seconds"],
            "peak_gib": peer.answers[-1]["peak_bytes"] / 2**30,
            "loss": peer.first["loss"],
            "grad_norm": peer.first["grad_norm"],
            "runs": {clock: [answer[clock] for answer in peer.answers] for clock in CLOCKS},
        }
        for peer in (ours, theirs)
    }
    for part in ("sample", "train"):
        sides[ours.name][part] = statistics.median(answer[part] for answer in ours.answers)
    mine, other = sides.values()
    ratios = {
        clock: statistics.median(
            b / a for b, a in zip(other["runs"][clock], mine["runs"][clock], strict=True)
        )
        for clock in CLOCKS
    }
    return sides | {
        "times_as_fast": ratios["seconds"],
        "times_as_fast_by_cpu_seconds": ratios["cpu_seconds"],
        "share_of_memory": mine["peak_gib"] / other["peak_gib"],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("peers", __doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2[-bf16], tiny or a folder")
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="by default all")
    parser.add_argument("--mode", choices=tuple(ESTIMATORS), action="append", help="by default all")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="completions of a step")
    parser.add_argument(
        "--completion", type=int, default=32, metavar="N", help="tokens of a completion"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measured steps")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each side")
    options = parser.parse_args(argv)
    if not 1 <= options.repeats < STEPS:
        parser.error(f"--repeats takes 1 to {STEPS - 1}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        model = named_model(options.model)
        for name in options.case or CASES:
            sizes = {"batch": options.batch, "completion": options.completion}
            case = Case(model, **{**CASES[name], **sizes})
            for mode in options.mode or ESTIMATORS:
                print(f"{name}, {mode} against estimator {ESTIMATORS[mode]}", flush=True)
                result = measure(case, mode, options.repeats, options.threads)
                report(result)
                settings = {**asdict(case), "model": options.model, "peer": TRL}
                settings |= {"threads": options.threads, "repeats": options.repeats}
                save("peers", f"{options.model}, {name}, {mode}", settings | result)
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


def report(result: Mapping[str, Any]) -> None:
    for name in ("minidistill", "TRL"):
        side = result[name]
        parts = [f"{part} {side[part]:.2f} s" for part in ("sample", "train") if part in side]
        print(
            f"  {name:11} {side['seconds']:6.2f} s a step, "
            f"{side['cpu_seconds']:6.2f} s of the CPU, {side['peak_gib']:.2f} GiB",
            *parts,
        )
    print(
        f"  minidistill is {result['times_as_fast']:.2f} times as fast "
        f"({result['times_as_fast_by_cpu_seconds']:.2f} by CPU seconds) with "
        f"{result['share_of_memory']:.2f} of the memory",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
