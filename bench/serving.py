"""Measures what an adapter saves when it is served instead of a context in every prompt, in vLLM.

    python -m bench.serving [--model smollm2|NAME|FOLDER] [--adapter FOLDER] [--contexts 500,2000]

Starts three servers, as `vllm serve` does, on the first GPU or on a CPU: the base model without a
prefix cache, the base model with one, and the base with a LoRA adapter, by default a random one
(which says nothing about quality). Requests are streamed as clients do. Every request has a
question of its own; only the context is shared. The ways take turns in every round. Prompts are
sent as token ids, so the time to tokenize a context is in no figure. Writes
bench/results/serving.json. Exit code 1 and no further rows if the prefix cache, the adapter or the
blocks in use are not what a row says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engines import Draws
from bench.kernels_report import machine
from bench.pair import ROOT, named_model, save, use_threads
from bench.serving_client import blocks_of
from bench.serving_measure import CACHING, LORA, PLAIN, Measurement, Setting
from bench.serving_servers import Server, adapter_flags, check_adapter, random_adapter
from minidistill.config import load_config
from minidistill.engines.vllm.options import ITEMSIZES
from minidistill.errors import EXIT_FAILED, UserError
from minidistill.models.hub import load_model_config
from minidistill.models.registry import resolve
from minidistill.placement import vllm_version
from minidistill.placement.limits import kv_bytes_per_token

SLACK_TOKENS = 4096  # of a cache: blocks that are not full, and the one that vLLM keeps


@contextlib.contextmanager
def serving(
    model: str, adapter: Path, setting: Setting, token_bytes: int, dtype: str
) -> Iterator[dict[str, str]]:
    """The servers' URLs. They start one after another: together they would share the cores."""
    gpu = torch.cuda.is_available()
    flags = {
        PLAIN: ["--no-enable-prefix-caching"],
        CACHING: ["--enable-prefix-caching"],
        LORA: ["--enable-prefix-caching", *adapter_flags(adapter, gpu=gpu)],
    }
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, its_flags in flags.items():
            print(f"starting vLLM: {name}", flush=True)
            size = (setting.cache_tokens(name) + SLACK_TOKENS) * token_bytes
            its_flags = [*its_flags, "--dtype", dtype]
            server = Server(resolve(model), its_flags, size, setting.longest, gpu)
            stack.callback(server.close)
            server.wait_until_ready()
            urls[name] = server.url
            blocks = blocks_of(server.url)
            if blocks.total != size // (blocks.tokens * token_bytes):
                raise UserError(
                    f"vLLM has {blocks.total} blocks of {blocks.tokens} tokens in {size} bytes: a "
                    f"token's keys and values are not the {token_bytes} bytes of the formula",
                    where=f"--model {model}",
                    fix="use a model of which every layer keeps the keys and values of all tokens",
                    exit_code=EXIT_FAILED,
                )
        yield urls


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(sorted({int(part) for part in text.split(",")}))

    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="built in, smollm2, a folder or a hub id")
    add("--adapter", type=Path, help="a folder of peft's; default: a random adapter")
    add("--rank", type=int, default=16, help="of the random adapter")
    add("--contexts", type=numbers, default=(500, 2000, 8000), help="tokens, by commas")
    add("--at-once", type=int, default=8, help="requests at once, besides one alone")
    add("--question", type=int, default=64, help="tokens of a prompt after the context")
    add("--completion", type=int, default=64, help="tokens to sample; none ends it")
    add("--rounds", type=int, default=5, help="of which medians are taken")
    add(
        "--limit",
        type=float,
        default=60.0,
        help="seconds: no further round begins after them, and a way of which a round of several "
        "requests may take longer is left out",
    )
    add("--dtype", choices=ITEMSIZES, default="bfloat16", help="of weights, keys and values")
    add("--threads", type=int, default=1, help="of each server, on a CPU")
    args = parser.parse_args(argv)
    counts = (args.at_once, args.question, args.completion, args.rounds, args.threads, args.rank)
    if min(*args.contexts, *counts) < 1:
        parser.error("all numbers are at least 1")
    if not args.limit > 0:
        parser.error("--limit is more than 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    use_threads(args.threads)
    gpu = torch.cuda.is_available()
    version = vllm_version.require(on_gpu=gpu)
    setting = Setting(
        args.contexts, args.at_once, args.question, args.completion, args.rounds, args.limit
    )
    model = named_model(args.model)
    config = load_config([str(ROOT / "configs" / "sokoban.toml"), "--model.name", model]).config
    model_config = load_model_config(config)
    text = model_config.get_text_config()
    reads = getattr(text, "max_position_embeddings", None) or setting.longest
    if setting.longest > reads:
        raise UserError(
            f"a context of {max(args.contexts)} tokens, a question of {args.question} and a "
            f"completion of {args.completion} do not fit: {args.model} reads {reads} tokens",
            where="--contexts",
            fix=f"use contexts of at most {reads - args.question - args.completion} tokens",
        )
    token_bytes = kv_bytes_per_token(model_config, ITEMSIZES[args.dtype])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        adapter = args.adapter or Path(folder)
        if args.adapter is None:
            random_adapter(model_config, args.rank, adapter)
        with serving(model, adapter, setting, token_bytes, args.dtype) as urls:
            draws = Draws(text.vocab_size)
            block = blocks_of(urls[LORA]).tokens
            check_adapter(urls[LORA], draws.rows(1, args.question)[0])
            about = machine("cuda" if gpu else "cpu") | {"vllm": version, "threads": args.threads}
            settings = vars(args) | {"adapter": str(args.adapter or "random")}
            settings |= {"block": block, "token_bytes": token_bytes}
            for row in Measurement(setting, urls, draws, block, token_bytes).rows():
                print(describe(row), flush=True)
                rows.append(row)
                # saved at once, in case a long run is interrupted
                save("serving", args.model, {"machine": about, "settings": settings, "rows": rows})
    show(rows, f"{args.model}, {args.dtype}, {about['device']}")
    return 0


def describe(row: dict[str, Any]) -> str:
    """One line of progress."""
    name = f"{row['context']:,} tokens, {row['at_once']} at once, {row['way']}"
    if "first" not in row:
        return f"{name}: left out, a round would take about {row['seconds']:.0f} s"
    return (
        f"{name}: first token after {row['first']:.3g} s, then {1e3 * row['between']:.3g} ms each, "
        f"{row['rate']:.3g} tokens/s ({len(row['rounds'])} rounds)"
    )


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    headings = ("context", "at once", "", "first token", "cold", "between", "tokens/s")
    table = Table(*headings, "one request holds", "one more", title=title)
    last = None
    for row in rows:
        cell = (f"{row['context']:,}", str(row["at_once"]))
        if last not in (None, cell):
            table.add_section()
        times = ["left out", "", "", ""]
        if "first" in row:
            cold = f"{row['cold']:.3g} s" if "cold" in row else ""
            times = [f"{row['first']:.3g} s", cold]
            times += [f"{1e3 * row['between']:.3g} ms", f"{row['rate']:.3g}"]
        sizes = (f"{row[key] / 2**20:,.1f} MiB" for key in ("bytes", "more_bytes"))
        table.add_row(*(cell if cell != last else ("", "")), row["way"], *times, *sizes)
        last = cell
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def entry() -> int:
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(entry())
