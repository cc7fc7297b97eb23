"""Compares the embedded engine's decoding with what this machine can do at most.

    python -m bench.decode [--model smollm2|tiny-sokoban|FOLDER] [--batch N ...] [--group N]
                           [--prompt N] [--new N] [--threads N]

A decoding step reads every weight and all keys and values, and computes one token a row. The floor
of a step is the longer of the two: what is read at the fastest reading of memory, what is computed
at the fastest product of matrices. The measured step is the time of sampling `--new` tokens less
that of one, divided by the steps, so it holds the step's share of packing the weights. In fp32 on a
CPU, with a LoRA adapter of rank 16. With one thread the times are CPU time, which other work on the
machine changes less. Writes bench/results/decode.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from bench.kernels_report import machine
from bench.pair import ROOT, change_adapter, named_model, save, use_threads
from bench.peaks import Clock, matrix_peak, memory_peak
from bench.workload import make_parser
from minidistill.config import load_config
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import ModelShape, read_shape
from minidistill.placement.planner import plan_run
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.types import Request, Role, SamplingParams

ITEMSIZE = 4


def load(model: str) -> Policy:
    """The model on the CPU with an adapter that changes its outputs. No token ends a completion."""
    flags = ["--model.name", named_model(model), "--model.dtype", "float32", "--seq_len", "2048"]
    loaded = load_config([str(ROOT / "configs" / "sokoban.toml"), *flags])
    placement = plan_run(loaded, Machine.imagined(0, None)).placement
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    policy = load_policy(loaded.config, tokenizer, placement)
    policy.eos_ids = frozenset()
    change_adapter(policy)
    return policy


def step_floor(shape: ModelShape, batch: int, group: int, prompt: int, new: int) -> dict[str, Any]:
    """Bytes that the average step must read, and its operations. A prompt is read once a group."""
    weights = shape.body + shape.vocab * shape.hidden
    own = batch * new // 2
    cached = batch // group * prompt + own
    return {
        "bytes": ITEMSIZE * (weights + 2 * shape.keys * shape.layers * cached),
        "flops": 2 * weights * batch + 4 * shape.attention * shape.layers * (batch * prompt + own),
    }


def clock_of(args: argparse.Namespace) -> Clock:
    """Of the steps and of the peaks that they are compared with."""
    return time.process_time if args.threads == 1 else time.perf_counter


def measure(engine: EmbeddedEngine, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    clock = clock_of(args)
    draw = random.Random(batch)
    vocabulary = engine.policy.config.vocab_size

    def seconds(requests: Sequence[Request], new: int) -> float:
        began = clock()
        engine.generate(requests, SamplingParams(new), Role.STUDENT)
        return clock() - began

    steps, totals = [], []
    for repeat in range(args.repeats + 1):
        prompts = [
            tuple(draw.randrange(3, vocabulary) for _ in range(args.prompt))
            for _ in range(batch // args.group)
        ]
        requests = [Request(p, draw.getrandbits(60)) for p in prompts for _ in range(args.group)]
        first, whole = seconds(requests, 1), seconds(requests, args.new)
        if repeat:  # the first one is not counted
            steps.append((whole - first) / (args.new - 1))
            totals.append(whole)
    step, total = statistics.median(steps), statistics.median(totals)
    return {"step": step, "tokens_per_second": batch * args.new / total, "runs": steps}


def report(
    measured: dict[str, Any], floor: dict[str, Any], peaks: dict[str, float]
) -> dict[str, Any]:
    reading, computing = floor["bytes"] / peaks["memory"], floor["flops"] / peaks["matrix"]
    return {
        **measured,
        **floor,
        "reading": reading,
        "computing": computing,
        "share": max(reading, computing) / measured["step"],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("decode", __doc__)
    parser.add_argument("--model", default="smollm2", help="built in, smollm2 or a folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="sequences")
    parser.add_argument("--group", type=int, default=1, help="samples per prompt")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.new < 2 or any(batch % args.group for batch in args.batch):
        parser.error("--new takes 2 and more, and --group divides --batch")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    use_threads(args.threads)
    policy = load(args.model)
    shape = read_shape(policy.config)
    engine = EmbeddedEngine(policy, PrefixCache(policy, shares=True))
    for batch in args.batch:
        peaks = {"memory": memory_peak(clock_of(args)), "matrix": matrix_peak(clock_of(args))}
        measured = measure(engine, args, batch)
        floor = step_floor(shape, batch, args.group, args.prompt, args.new)
        row = report(measured, floor, peaks)
        print(
            f"batch {batch}: {row['tokens_per_second']:.0f} tokens/s; a step takes "
            f"{row['step'] * 1e3:.1f} ms. Floor: {row['bytes'] / 1e6:.0f} MB at "
            f"{peaks['memory'] / 1e9:.1f} GB/s {row['reading'] * 1e3:.1f} ms, "
            f"{row['flops'] / 1e9:.1f} GFLOP at {peaks['matrix'] / 1e9:.0f} GFLOP/s "
            f"{row['computing'] * 1e3:.1f} ms: {row['share']:.0%} of it",
            flush=True,
        )
        key = f"{args.model}, {batch} in groups of {args.group}, {args.prompt} + {args.new} tokens"
        about = {"machine": machine("cpu"), "settings": vars(args), "peaks": peaks}
        save("decode", f"{key}, {args.threads} threads", about | row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
