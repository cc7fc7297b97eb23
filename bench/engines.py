"""Compares the embedded engine and vLLM at sampling and scoring, in alternating rounds.

    python -m bench.engines [--model tiny-sokoban|smollm2|FOLDER] [--batch N] [--threads N]

Both engines run the same fp32 weights, on the first GPU or on a CPU. Prompts are never reused, so
vLLM's prefix cache holds what it holds in a training step: the base's context, and the student's
prompts of a round. Rates count sampled tokens, or for scoring all tokens except the context. Writes
bench/results/engines.json. Exit code 1 and no results if the engines' log-probs differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.kernels_report import machine
from bench.pair import TOLERANCE, build, change_adapter, named_model, save, use_threads
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.trainer.forward import PrefixCache
from minidistill.types import Request, Role, SamplingParams

Tokens = tuple[int, ...]
WARM_UP = 1  # rounds that are not counted; the first one caches the base's context


@dataclass(frozen=True)
class Work:
    """One row of the table. `call` prepares a round: a function that runs an engine once."""

    what: str
    role: Role
    call: Callable[[], Callable[[Engine], tuple[int, Any]]]

    @property
    def name(self) -> str:
        return f"{self.what}, {'adapter' if self.role is Role.STUDENT else 'base'}"


class Draws:
    """Random token ids, different at every call."""

    def __init__(self, vocabulary: int) -> None:
        self._random, self._vocabulary = random.Random(0), vocabulary

    def rows(self, count: int, length: int) -> list[Tokens]:
        draw = self._random.randrange
        return [tuple(draw(3, self._vocabulary) for _ in range(length)) for _ in range(count)]

    def seed(self) -> int:
        return self._random.getrandbits(60)


def works(draws: Draws, args: argparse.Namespace, context: Tokens) -> Iterator[Work]:
    half = args.own // 2

    def sampling(role: Role) -> Callable[[Engine], tuple[int, Any]]:
        prompts = draws.rows(args.batch // args.group, args.prompt)
        requests = [Request(prompt, draws.seed()) for prompt in prompts for _ in range(args.group)]

        def call(engine: Engine) -> tuple[int, Any]:
            completions = engine.generate(requests, SamplingParams(args.new), role)
            return sum(len(c.token_ids) for c in completions), (requests, completions)

        return call

    def scoring(role: Role, context: Tokens) -> Callable[[Engine], tuple[int, Any]]:
        rows = draws.rows(args.batch, args.own)
        prompts, completions = [(*context, *r[:half]) for r in rows], [r[half:] for r in rows]

        def call(engine: Engine) -> tuple[int, Any]:
            logprobs = engine.score(prompts, completions, role)
            return args.batch * args.own, logprobs

        return call

    for role in (Role.TEACHER, Role.STUDENT):
        yield Work("sampling", role, partial(sampling, role))
    for role in (Role.TEACHER, Role.STUDENT):
        yield Work("scoring", role, partial(scoring, role, ()))
        yield Work(
            f"scoring after {len(context)} tokens of context",
            role,
            partial(scoring, role, context),
        )


def difference(results: dict[str, Any], engines: dict[str, Engine], role: Role) -> float:
    """The largest difference between the engines' log-probs of the same tokens."""
    if isinstance(results["vllm"], tuple):
        requests, sampled = results["vllm"]
        ours = [c.logprobs for c in sampled]
        theirs = engines["embedded"].score(
            [r.prompt_ids for r in requests],
            [c.token_ids for c in sampled],
            role,
        )
    else:
        ours, theirs = results["vllm"], results["embedded"]
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def measure(work: Work, engines: dict[str, Engine], repeats: int) -> dict[str, Any]:
    """The median of each engine's tokens per second, and the median of the rounds' ratios.

    Raises SystemExit if the log-probs differ.
    """
    rates: dict[str, list[float]] = {name: [] for name in engines}
    worst = 0.0
    for round in range(WARM_UP + repeats):
        call, results = work.call(), {}
        # the engines take turns at going first
        for name in sorted(engines, reverse=bool(round % 2)):
            began = time.perf_counter()
            tokens, results[name] = call(engines[name])
            rates[name].append(tokens / (time.perf_counter() - began))
        worst = max(worst, difference(results, engines, work.role))
    if not worst < TOLERANCE:
        raise SystemExit(f"{work.name}: log-probs of the engines differ by {worst:.3g}")
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in rates.items()}
    # ratios within a round, because the speed of a shared machine varies between rounds
    pairs = list(zip(rates["vllm"], rates["embedded"], strict=True))[WARM_UP:]
    return {
        "what": work.name,
        **medians,
        "ratio": statistics.median(a / b for a, b in pairs),
        "difference": worst,
        "runs": rates,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("--model", default="tiny-sokoban", help="built in, smollm2 or a folder")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--group", type=int, default=4, help="samples per prompt")
    parser.add_argument("--prompt", type=int, default=80, help="tokens of a prompt to sample from")
    parser.add_argument(
        "--new", type=int, default=64, help="tokens to sample; none ends the completion"
    )
    parser.add_argument("--own", type=int, default=100, help="tokens to read in scoring")
    parser.add_argument("--context", type=int, default=600, help="tokens shared in scoring")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    args = arguments(argv)
    use_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"machine": machine(device), "settings": vars(args)}
    longest = max(args.prompt + args.new, args.context + args.own)
    vllm, policy = build(named_model(args.model), longest)
    try:
        policy.eos_ids = frozenset()  # so that both sample to the limit
        change_adapter(policy)
        vllm.sync(1)
        embedded = EmbeddedEngine(policy, PrefixCache(policy, shares=True))
        engines: dict[str, Engine] = {"embedded": embedded, "vllm": vllm}
        draws = Draws(policy.config.vocab_size)
        (context,) = draws.rows(1, args.context)
        rows = []
        for work in works(draws, args, context):
            if args.only in work.name:
                print(work.name, flush=True)
                rows.append(measure(work, engines, args.repeats))
                # saved at once, in case a long run is interrupted
                save("engines", f"{args.model}, {work.name}", about | rows[-1])
    finally:
        vllm.close()
    title = f"{args.model}, {args.batch} sequences, {args.threads} threads: tokens per second"
    table = Table("", "embedded", "vLLM", "vLLM / embedded", title=title)
    for row in rows:
        rates = (f"{row['embedded']:.0f}", f"{row['vllm']:.0f}", f"{row['ratio']:.2f}")
        table.add_row(row["what"], *rates)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
