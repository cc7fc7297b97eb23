"""Bakes a persona into a real model with one line, and counts how often it shows.

    python -m bench.bake [--model smollm2|FOLDER] [--context FILE] [--phrase TEXT] [--steps N]
                         [--threads N] [--run DIR]

Runs `minidistill bake` with nothing but a model and a context, and takes the time. Then the base,
the base with the context and the student answer the 64 held-out questions that ship with the
package, by transformers and peft alone, and the answers that begin with `--phrase` are counted: at
temperature 1, as in training, and greedily. Writes bench/results/bake.json. `--run` counts an
existing run of bake instead of making one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.kernels_report import machine
from bench.pair import ROOT, save, use_threads
from bench.workload import named_model
from minidistill import cli
from minidistill.config import Config, load_config
from minidistill.driver.prepare import prompt_builder
from minidistill.envs import load_environment
from minidistill.errors import EXIT_OK
from minidistill.models.hub import load_tokenizer
from minidistill.models.registry import resolve

QUESTIONS, BATCH, SEED = 64, 16, 0
Z = 1.959964  # of a 95% interval


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share, z2 = hits / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return middle - half, middle + half


def begins_with(text: str, phrase: str) -> bool:
    """Whether an answer begins with the phrase, exactly but for white space before it."""
    return text.lstrip().startswith(phrase)


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], longest: int, *, greedy: bool
) -> list[str]:
    """One completion of each prompt, at temperature 1 from all tokens, or greedily."""
    torch.manual_seed(SEED)
    choice: dict[str, Any] = {"do_sample": not greedy, "max_new_tokens": longest}
    if not greedy:
        choice |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.pad_token_id or 0
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        rows = prompts[start : start + BATCH]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **choice)
        texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def views(config: Config, tokenizer: Any) -> tuple[list[str], list[Any], list[Any]]:
    """The questions, and what the student and the teacher read of each."""
    builder = prompt_builder(config, tokenizer, datetime.now())
    tasks = load_environment("questions", {"num_eval_examples": QUESTIONS}).eval
    prompts = [builder.build("questions", task) for task in tasks]
    asked = [str(task.messages[-1]["content"]) for task in tasks]
    return asked, [p.student_ids for p in prompts], [p.teacher_ids for p in prompts]


def count(run: Path, phrase: str) -> dict[str, Any]:
    """How many answers of each model begin with the phrase, and some of the answers."""
    config = load_config([str(run / "config.toml")]).config
    tokenizer = load_tokenizer(config)
    asked, student, teacher = views(config, tokenizer)
    longest = config.orchestrator.sampling.max_tokens
    base = AutoModelForCausalLM.from_pretrained(resolve(config.model.name), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    result: dict[str, Any] = {"phrase": phrase, "questions": len(asked), "max_tokens": longest}
    for name, greedy in (("temperature 1", False), ("greedy", True)):
        with model.disable_adapter():
            texts = {
                "base": answers(model, tokenizer, student, longest, greedy=greedy),
                "in context": answers(model, tokenizer, teacher, longest, greedy=greedy),
            }
        texts["student"] = answers(model, tokenizer, student, longest, greedy=greedy)
        result[name] = {who: share(of, phrase) for who, of in texts.items()}
        kept = {who: of[:4] for who, of in texts.items()}
        result[name]["examples"] = [
            {"question": question, **dict(zip(kept, row, strict=True))}
            for question, *row in zip(asked, *kept.values(), strict=False)
        ]
    return result


def share(texts: Sequence[str], phrase: str) -> dict[str, Any]:
    """The share of the texts that begin with the phrase, with its interval."""
    hits = sum(begins_with(text, phrase) for text in texts)
    low, high = wilson(hits, len(texts))
    return {"hits": hits, "n": len(texts), "share": hits / len(texts), "low": low, "high": high}


@contextlib.contextmanager
def run_folder(given: str | None) -> Iterator[Path]:
    """The folder of the run: the one that is given, or one that is removed afterwards."""
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def bake(arguments: argparse.Namespace, run: Path) -> float:
    """Bake, and return the seconds from the command to its end."""
    command = ["bake", "--model", named_model(arguments.model), "--context", arguments.context]
    command += ["--out", str(run)]
    if arguments.steps is not None:
        command += ["--steps", str(arguments.steps)]
    with tempfile.TemporaryDirectory() as cache:  # where no prompts are yet
        os.environ["XDG_CACHE_HOME"] = cache
        began = time.perf_counter()
        if (code := cli.main(command)) != EXIT_OK:
            raise SystemExit(code)
        return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.bake", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", default=str(ROOT / "bench" / "bake_persona.txt"))
    parser.add_argument("--phrase", default="Ahoy!")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        use_threads(arguments.threads)
    with run_folder(arguments.run) as run:
        exists = (run / "scoreboard.json").is_file()
        seconds = None if exists else bake(arguments, run)
        board = json.loads((run / "scoreboard.json").read_text())
        result = {"machine": machine("cpu"), "seconds": seconds, "run_seconds": board["seconds"]}
        keys = ("steps", "heldout_kl_before", "heldout_kl_after", "heldout_kl_closed", "drift_kl")
        result |= {key: board.get(key) for key in keys}
        result |= count(run, arguments.phrase)
    for name in ("temperature 1", "greedy"):
        for who in ("base", "in context", "student"):
            row = result[name][who]
            shares = f"{row['share']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
            print(f"{name:<14} {who:<11} {row['hits']:>3} of {row['n']}  {shares}")
    save("bake", f"{arguments.model}, {Path(arguments.context).stem}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
