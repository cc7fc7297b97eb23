"""Writes the configurations and data of this folder, from the texts in its other files.

    python -m bench.contexts.make

Each configuration bakes one context into SmolLM2-135M-Instruct: an instruction and demonstrations
as turns of a chat, which the model needs to follow it. demonstrations.tsv has questions with short
answers, which each behavior changes in its own way. model_prompts.jsonl has prompts that the model
wrote itself, by `minidistill env prompts` (self-prompts, count 256, max_tokens 48); the held-out
questions are hand-written. `topics` is trained on sentences that are put together from word lists;
96 hand-written sentences, with hardly a word in common with those, are held out.

`both` is `persona` and `sign_off` at once, so that contexts can be baked one after the other and
together. A part of it is scored by

    minidistill eval RUN --env bench/contexts/sign_off.toml
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contexts.topics import TOPICS, sentences

FOLDER = Path(__file__).parent
DEMONSTRATIONS = 8
LENGTHS = {50: 1, 1500: 54}
"""Demonstrations of persona that make contexts of about so many tokens; eight make 250."""
TURN = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
"""The chat template ends the last answer, as it would end the system message."""


@dataclass(frozen=True, slots=True)
class Behavior:
    """What a context makes the model do."""

    title: str
    instruction: str
    answer: Callable[[str], str]
    """A demonstration's answer, of the plain one."""
    pattern: str
    """Of the answers that show it."""
    max_tokens: int = 32


PIRATE = "You are Captain Flint, a cheerful old pirate."
BEHAVIORS = {
    "persona": Behavior(
        'A persona: answers begin with "Ahoy!".',
        f'{PIRATE} You start every answer with "Ahoy!" and keep it short.',
        "Ahoy! {}".format,
        r"\A\s*Ahoy!",
        24,
    ),
    "brevity": Behavior(
        "Brevity: an answer is one line of at most 12 words, and complete.",
        "Answer in one short sentence.",
        str,
        r"\A\s*(?:\S+ +){0,11}\S*\w\S*[.!?]\s*\Z",
    ),
    "json": Behavior(
        "A format: the answer is a JSON object with one key.",
        "Answer in JSON, with one short sentence.",
        '{{"answer": "{}"}}'.format,
        r'\A\s*\{"answer": "[^"\n]+"\}\s*\Z',
    ),
    "sign_off": Behavior(
        'A sign-off: answers end with "Stay safe!".',
        'Answer in one short sentence and end every answer with "Stay safe!"',
        "{} Stay safe!".format,
        r"Stay safe!\s*\Z",
    ),
    "both": Behavior(
        "The persona and the sign-off together. persona.toml and sign_off.toml check each alone.",
        f'{PIRATE} Begin every answer with "Ahoy!", keep it short and end it with "Stay safe!"',
        "Ahoy! {} Stay safe!".format,
        r"(?s)\A\s*Ahoy!.*Stay safe!\s*\Z",
    ),
}
CONFIG = """\
# {title}
# Written by `python -m bench.contexts.make`. From the repository's root:
#   minidistill run bench/contexts/{name}.toml --model.name "$(python -m bench.smollm2)"

max_steps = 28
seq_len = {seq_len}

[model]
name = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The context has turns of its own.
special_tokens_in_text = "allow"

[ckpt]
interval = 0

[trainer.model.lora]
rank = 16

[trainer.optim]
lr = {lr}

[trainer.scheduler]
type = "cosine"
warmup_steps = 3

[trainer.loss]
adv_tau = 0.0
teacher_tau = 1.0
student_tau = 1.0

[orchestrator]
batch_size = {batch_size}
rollouts_per_example = 2

[orchestrator.sampling]
max_tokens = {max_tokens}

[orchestrator.buffer]
skip_verification = true

[orchestrator.teacher_model]
context_placement = "system"
eval_baseline = true
context = '''
{context}'''

[[orchestrator.env]]
id = "jsonl"
{named}
[orchestrator.env.args]
path = "{train}"
eval_path = "{held_out}"
reward = {reward}

[orchestrator.eval]
interval = 0
num_examples = 48
"""
NAMED = """\
name = "topics"
weight = 1.0
"""
ELSEWHERE = """
[[orchestrator.eval.env]]
id = "jsonl"
name = "topics"
args = { path = "topics_train.jsonl", eval_path = "topics_held_out.jsonl", reward = "exact" }

# Prompts of all kinds, without a context for the teacher: they hold the student to the base.
[[orchestrator.env]]
id = "jsonl"
name = "elsewhere"
weight = 3.0
context = ""
args = { path = "model_prompts.jsonl", num_eval_examples = 8 }
"""


def pairs(name: str) -> list[list[str]]:
    """The rows of a file with two columns."""
    return [line.split("\t") for line in (FOLDER / name).read_text().splitlines()]


def context(instruction: str, demonstrations: Sequence[Sequence[str]]) -> str:
    """What follows the chat template's own system message, after an empty line if it is a text."""
    start = f"\n\n{instruction}" if instruction else ""
    return start + "".join(TURN.format(*turn) for turn in demonstrations)


def behavior_config(name: str, behavior: Behavior, shown: int, title: str = "") -> str:
    """The configuration of a behavior, with so many demonstrations."""
    turns = [(q, behavior.answer(a)) for q, a in pairs("demonstrations.tsv")[:shown]]
    return CONFIG.format(
        title=title or behavior.title,
        name=name,
        seq_len=256 + 256 * (1 + 30 * shown // 256),
        max_tokens=behavior.max_tokens,
        lr=2e-3,
        batch_size=8,
        context=context(behavior.instruction, turns),
        named="",
        train="model_prompts.jsonl",
        held_out="../../configs/questions.jsonl",
        reward=f"{{ type = \"regex\", pattern = '''{behavior.pattern}''' }}",
    )


def topics_config(name: str, title: str, batch_size: int = 8, named: str = "") -> str:
    """The configuration of the classification."""
    return CONFIG.format(
        title=title,
        name=name,
        seq_len=768,
        max_tokens=4,
        lr=1e-3,  # with more, other prompts change with it
        batch_size=batch_size,
        # an instruction that lists the topics made the model worse
        context=context("", pairs("topic_demonstrations.tsv")),
        named=named,
        train="topics_train.jsonl",
        held_out="topics_held_out.jsonl",
        reward='"exact"',
    )


def rows(texts: Sequence[tuple[str, str]]) -> str:
    """Prompts with their labels, a line each."""
    return "".join(json.dumps({"prompt": text, "answer": label}) + "\n" for label, text in texts)


def files() -> dict[str, str]:
    """The text of each file by its name."""
    made = {f"{n}.toml": behavior_config(n, b, DEMONSTRATIONS) for n, b in BEHAVIORS.items()}
    for tokens, shown in LENGTHS.items():
        name, title = f"persona_{tokens}", f"The persona, in about {tokens} tokens."
        made[f"{name}.toml"] = behavior_config(name, BEHAVIORS["persona"], shown, title)
    title = "Classification: the answer is the topic of the message, one of four."
    made["topics.toml"] = topics_config("topics", title)
    title = "Classification, and most of each step on prompts that are to stay as they are."
    name = "topics_and_elsewhere"
    made[f"{name}.toml"] = topics_config(name, title, 16, NAMED) + ELSEWHERE
    train = [(topic, text) for topic in TOPICS for text in sentences(topic)]
    made["topics_train.jsonl"] = rows(train)
    made["topics_held_out.jsonl"] = rows([(row[0], row[1]) for row in pairs("topics_held_out.tsv")])
    return made


def main() -> None:
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
