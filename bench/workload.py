"""The step that `bench.step`, `bench.peers` and `bench.growth` measure, as a configuration.

Prompts and context are random words, so that their numbers of tokens can be chosen. No prompt is
used twice, and a completion always has its full length.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.smollm2 import NAMES, smollm2
from minidistill.errors import UserError

TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home water
room mother area money story fact month lot right study book eye job word"""
WORDS = TEXT.split()
STEPS = 12
"""At most, of one process."""


@dataclass(frozen=True, slots=True)
class Case:
    """The sizes of a step."""

    model: str
    """A folder or a built-in model."""
    context: int
    """Tokens of the context, which all prompts share."""
    prompt: int
    """Tokens of each prompt's own text, without the chat template's."""
    group: int = 1
    """Completions of each prompt."""
    batch: int = 8
    """Completions of a step."""
    completion: int = 32
    """Tokens of a completion."""
    estimator: str = "full"
    top_k: int = 100
    """Ids that the estimator `top_k` keeps."""
    rank: int = 16
    """Of the adapter."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"{value} is below 1", where=f"--{name}", fix="give 1 or more")
        if self.batch % self.group:
            raise UserError(
                f"a batch of {self.batch} is not made of groups of {self.group}",
                where="--group",
                fix="give a divisor of --batch",
            )


SETTINGS = """\
max_steps = {steps}
seq_len = {seq_len}
[model]
name = {model}
dtype = "float32"
[ckpt]
interval = 0
[trainer.model.lora]
rank = {rank}
[trainer.loss]
adv_tau = 0.0
teacher_tau = 1.0
student_tau = 1.0
estimator = "{estimator}"
top_k = {top_k}
[inference]
engine = "embedded"
[orchestrator]
batch_size = {batch}
rollouts_per_example = {group}
[orchestrator.sampling]
max_tokens = {completion}
[orchestrator.buffer]
skip_verification = true
[orchestrator.teacher_model]
context_file = "context.txt"
[[orchestrator.env]]
id = "jsonl"
args = {{ path = {prompts}, num_eval_examples = 1 }}
"""


def write_case(case: Case, folder: Path) -> Path:
    """Write the case's configuration, its context and its prompts. Returns the configuration."""
    tokenizer = load_tokenizer(case.model)
    context = text_of(tokenizer, case.context, random.Random(0)) + "\n\n"
    count = STEPS * case.batch // case.group + 1  # and one to evaluate, which is not used
    prompts = [text_of(tokenizer, case.prompt, random.Random(i + 1)) for i in range(count)]
    (folder / "context.txt").write_text(context)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    longest = max(chat_length(tokenizer, context + prompt) for prompt in prompts)
    config = folder / "case.toml"
    values = asdict(case) | {"model": json.dumps(case.model), "prompts": json.dumps(str(file))}
    seq_len = longest + case.completion
    config.write_text(SETTINGS.format(**values, steps=STEPS, seq_len=seq_len))
    return config


def text_of(tokenizer: Any, tokens: int, draws: random.Random) -> str:
    """Random words that are `tokens` tokens, or a little more if words have several."""
    text = draws.choice(WORDS).capitalize()
    while (count := len(tokenizer(text, add_special_tokens=False)["input_ids"])) < tokens:
        # at least one word for every four tokens that are missing: few texts are encoded
        words = max(1, (tokens - count) // 4)
        text += "".join(f" {draws.choice(WORDS)}" for _ in range(words))
    return text


def chat_length(tokenizer: Any, text: str) -> int:
    message = {"role": "user", "content": text}
    return len(tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"])


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    from minidistill.models.registry import resolve

    return AutoTokenizer.from_pretrained(resolve(model))


# -- the command line ------------------------------------------------------------------------------


def make_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of `bench.NAME`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of a case, and the number of threads."""
    parser.add_argument("--model", default="smollm2", help="smollm2[-bf16], tiny or a folder")
    parser.add_argument("--context", type=int, default=1000, metavar="N", help="tokens of context")
    parser.add_argument("--prompt", type=int, default=10, metavar="N", help="tokens of a prompt")
    parser.add_argument("--group", type=int, default=1, metavar="N", help="completions of a prompt")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="completions of a step")
    parser.add_argument(
        "--completion", type=int, default=32, metavar="N", help="tokens of a completion"
    )
    parser.add_argument("--estimator", choices=("full", "top_k"), default="full")
    add_timing(parser)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """How seconds are counted."""
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of all threads together"
    )


def case_of(arguments: argparse.Namespace) -> Case:
    """The case that the arguments describe. Raises UserError."""
    names = ("context", "prompt", "group", "batch", "completion", "estimator")
    return Case(named_model(arguments.model), **{name: getattr(arguments, name) for name in names})


def named_model(name: str) -> str:
    """A folder, or a built-in model's name. Raises UserError if there is no such folder."""
    if name in ("tiny", "tiny-sokoban"):
        return "tiny-sokoban"
    if name in NAMES:
        return str(smollm2(name))
    if not (Path(name) / "config.json").is_file():
        raise UserError(
            f"no model in {name}", where="--model", fix="give smollm2, tiny or a model's folder"
        )
    return name


def one_process_environment(threads: int) -> Mapping[str, str]:
    """Of a process that computes with this many threads, on the CPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
