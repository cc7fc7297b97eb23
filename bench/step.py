"""Takes one step apart: where its seconds go, and how near it is to what the machine can do.

    python -m bench.step [--model smollm2|tiny|FOLDER] [--context N] [--prompt N] [--group N]
                         [--batch N] [--completion N] [--estimator full|top_k] [--threads N]
                         [--clock wall|cpu]

The step is a run's own, with the embedded engine on a CPU, in fp32, with a LoRA adapter of rank 16.
`prefill` is measured by sampling one token from the same prompts. `loss` is the head with the
objective, whose kernel computes the gradient of its input too. The training phase is the teacher's
pass (`score`), `forward`, `loss`, `backward` and `optimizer`, with what is between them. Its useful
operations (bench/step_work.py) are compared with the fastest product of matrices, what decoding
reads with the fastest reading of memory. The context is read once a run, before the measured steps.
Memory is the peak of this process, from its start to the last measured step. A profile of one more
step names what the rest of the training phase is, on the wall's clock. `--clock cpu` counts seconds
of the CPU for all else, where other programs run. Writes bench/results/step.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kernels_report import machine
from bench.our_step import OurRun, Step, open_run, peak_rss, use_cpu
from bench.pair import save
from bench.peaks import matrix_peak, memory_peak
from bench.step_pieces import CLOCKS, Clock, Parts, take_apart
from bench.step_profile import Profile, profile_training
from bench.step_work import Work, step_work
from bench.workload import STEPS, Case, add_arguments, case_of, make_parser
from minidistill.errors import UserError, printable
from minidistill.placement.model_shape import read_shape


@dataclass(frozen=True, slots=True)
class Measured:
    """The measured step of median length, and the peak of memory."""

    parts: Parts
    first_step: float
    """Seconds of the step that is not counted."""
    peak_bytes: int
    work: Work


def measure(run: OurRun, repeats: int, clock: Clock) -> Measured:
    """Take `repeats` steps apart, after one that is not counted."""
    began = clock()
    run.step()
    first_seconds = clock() - began
    steps: list[Step] = []
    parts: list[Parts] = []
    for _ in range(repeats):
        part, step = take_apart(run.session, run.step, clock)
        parts.append(part)
        steps.append(step)
    shape = read_shape(run.session.policy.student.config)
    middle = sorted(parts, key=lambda part: part.step)[repeats // 2]
    return Measured(
        middle,
        first_seconds,
        peak_rss(),
        step_work(
            shape,
            sum(p.numel() for _, p in run.session.policy.parameters),
            steps[-1].rollouts,
            max(run.session.prepared.contexts, key=len),
        ),
    )


def report(case: Case, measured: Measured, peaks: Mapping[str, float]) -> dict[str, Any]:
    tokens = case.batch * case.completion
    parts, decode = measured.parts, measured.parts.pieces["decode"]
    reading = measured.work.decode_bytes / decode if decode > 0 else 0.0
    useful = measured.work.training / parts.training
    return {
        "pieces": parts.pieces,
        "step": parts.step,
        "training": parts.training,
        "first_step": measured.first_step,
        "tokens_per_second": tokens / parts.step,
        "peak_gib": measured.peak_bytes / 2**30,
        "matrix_peak_gflops": peaks["matrix"] / 1e9,
        "memory_peak_gbytes": peaks["memory"] / 1e9,
        "useful_gflop": {name: flops / 1e9 for name, flops in measured.work.flops.items()},
        "training_share_of_matrix_peak": useful / peaks["matrix"],
        "decode_share_of_memory_peak": reading / peaks["memory"],
    }


def show(result: Mapping[str, Any], profile: Profile, matrix: float, wall_matrix: float) -> None:
    step, useful = result["step"], result["useful_gflop"]
    for name, seconds in result["pieces"].items():
        share = ""
        if name in useful and seconds > 0:
            share = f"  {useful[name] * 1e9 / seconds / matrix:5.0%} of the matrix peak"
        print(f"{name:10} {seconds:8.3f} s  {seconds / step:5.1%}{share}")
    print(f"{'step':10} {step:8.3f} s  (the first one: {result['first_step']:.3f})")
    print(f"{result['tokens_per_second']:.1f} completion tokens/s, {result['peak_gib']:.2f} GiB")
    print(
        f"matrix peak {result['matrix_peak_gflops']:.1f} GFLOP/s: training has "
        f"{result['training_share_of_matrix_peak']:.0%} of it in useful operations"
    )
    print(
        f"memory peak {result['memory_peak_gbytes']:.1f} GB/s: decoding has "
        f"{result['decode_share_of_memory_peak']:.0%} of it"
    )
    print(
        f"products run at {profile.products_per_second / wall_matrix:.0%} of the matrix peak; "
        "the training phase by kinds of operations:"
    )
    for kind, part in profile.shares.items():
        print(f"  {kind:22} {part:6.1%}")
    largest = ", ".join(f"{name} {part:.1%}" for name, part in profile.largest.items())
    print(f"the largest: {largest}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("step", __doc__)
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measured steps")
    options = parser.parse_args(argv)
    if not 1 <= options.repeats <= STEPS - 2:
        parser.error(f"--repeats takes 1 to {STEPS - 2}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    use_cpu(options.threads)
    clock = CLOCKS[options.clock]
    try:
        case = case_of(options)
        with tempfile.TemporaryDirectory() as name, open_run(case, Path(name)) as run:
            measured = measure(run, options.repeats, clock)
            profile = profile_training(run.session.trainer, run.step)
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_code
    peaks = {"matrix": matrix_peak(clock), "memory": memory_peak(clock)}
    result = report(case, measured, peaks)
    show(result, profile, peaks["matrix"], matrix_peak(time.perf_counter))
    settings = {**asdict(case), "model": options.model, "clock": options.clock}
    settings |= {"threads": torch.get_num_threads()}
    name = "{model}, context {context}, prompt {prompt}, {batch} in groups of {group}".format(
        **settings
    )
    result |= {"machine": machine("cpu"), "settings": settings, "profile": asdict(profile)}
    save("step", f"{name}, {case.completion} tokens, {case.estimator}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
