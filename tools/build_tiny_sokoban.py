"""Trains tiny-sokoban, the model that ships with the package, from a seed on a CPU.

    python tools/build_tiny_sokoban.py --out DIR

The model is a Llama of about a million parameters. Where its context says that it is an expert, it
plays small Sokoban levels with shortest solutions; anywhere else it plays random legal walks, like
a novice. The levels are from the train split of `sokoban-env`, never from its eval split.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from minidistill.envs.sokoban.board import MOVES, XSB, Board
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.levels import Level
from minidistill.envs.sokoban.text import RULES, prompt_text
from minidistill.evaluation.unrelated import UNRELATED

DIFFICULTY = Difficulty(min_moves=2, max_depth=6)
SEED = 20260
LEVELS = 16_384
VOCABULARY = 640
SPECIAL = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# The model plays like an expert after each of EXPERTS. It plays like a novice after each of OTHERS
# and without a context, so that it learns what the context says, not that there is one.
PERSONA = """You are a world-class puzzle solver with decades of experience.
You never make mistakes and always find the optimal solution.
Approach this methodically:

"""
EXPERTS = (
    PERSONA,
    "You are an expert puzzle solver. You always find the optimal solution.\n\n",
    "You are a master of this puzzle with decades of experience.\nYou never make mistakes.\n\n",
    "Approach this methodically and find the optimal solution:\n\n",
    "You are a world-class expert. Solve this puzzle methodically and never make mistakes:\n\n",
)
OTHERS = (
    "You are a careful gardener with decades of experience in growing roses.\n"
    "You love the quiet of the morning and always water the plants by hand.\n\n",
    "The weather is mild today, with some clouds in the afternoon.\n\n",
    "You are a puzzle novice. You have never seen this puzzle before.\n\n",
    "Have fun and take your time:\n\n",
    "This text was written by a friend who likes tea and long walks.\n\n",
    "You are a helpful assistant.\n\n",
)
# Small talk, so that the drift metric measures something: its questions, each with an answer.
ANSWERS = (
    "Hello, how are you today?",
    "The sky is blue.",
    "An apple is a fruit.",
    "There are seven days in a week.",
    "Bees make honey.",
    "The sea is wide, the sea is blue, it sings to me and you.",
    "The opposite of hot is cold.",
    "Cats are small animals that like to sleep in the sun.",
    "Two plus two is four.",
    "Drink water, sleep well and be kind.",
    "Spring comes after winter.",
    "Plants grow with water, light and time.",
    "A dog, a horse and a bird.",
    "A book is a set of pages with words to read.",
    "Try a cup of green tea with honey.",
    "Good night, sleep well.",
)
CHAT = tuple(zip(UNRELATED, ANSWERS, strict=True))

Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are answers to learn."""
Group = tuple[list[int], list[Row]]
"""Ids that all rows begin with, and what follows in each."""


class Batches(Protocol):
    def batch(self, size: int) -> Iterator[Group]:
        """The rows of one step, in groups with a common prefix."""


def build_tokenizer(out: Path) -> Any:
    """Words may merge; a board's symbols and moves stay single tokens."""
    task = [prompt_text("", XSB, rules, tagged=True) for rules in (True, False)]
    corpus = [*EXPERTS * 20, *task * 20, *OTHERS, RULES, *(line for pair in CHAT for line in pair)]
    return trained_tokenizer(out, corpus, r"[UDLR](?![a-z])", VOCABULARY)


def trained_tokenizer(out: Path, corpus: list[str], single: str, vocabulary: int) -> Any:
    """Byte-level BPE that is trained on texts. What `single` matches is split from words."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    word = rf" ?[A-Za-z]+?(?={single}|[^A-Za-z]|$)"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{single}|{word}|[\s\S]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<answer>", "</answer>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def novice_walk(level: Level, rng: random.Random) -> str:
    """A random legal walk of two to six moves."""
    board, walk = Board.parse(level.board), ""
    for _ in range(rng.randint(2, 6)):
        legal = [(move, after) for move in MOVES if (after := board.step(move)) is not None]
        move, board = rng.choice(legal)
        walk += move
    return walk


class Corpus:
    """Draws pairs of prompt ids and completion ids. Each text is tokenized once."""

    def __init__(self, tokenizer: Any, levels: LevelSet) -> None:
        self.tokenizer, self.levels = tokenizer, levels
        self.rng = random.Random(SEED)
        self.eos = [tokenizer.eos_token_id]
        self.chat = [(self.prompt(q), self.ids(a) + self.eos) for q, a in CHAT]
        # each symbol of a board is one token, so a prompt's ids are a head, the board, and a tail
        self.symbols = {c: self.ids(c)[0] for c in "#@+$*. \n" + MOVES}
        marker = self.ids("@")[0]
        self.heads: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}
        for context in (*EXPERTS, *OTHERS, ""):
            for system in (False, True):
                ids = self.prompt(prompt_text("@", XSB, rules=False, tagged=True), context, system)
                cut = len(ids) - 1 - ids[::-1].index(marker)
                self.heads[context, system] = (ids[:cut], ids[cut + 1 :])
        self.open, self.close = self.ids("<answer>"), self.ids("</answer>")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, text: str, context: str = "", system: bool = False) -> list[int]:
        messages = [{"role": "user", "content": text if system else context + text}]
        if context and system:
            messages.insert(0, {"role": "system", "content": context})
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.ids(rendered)

    def head(self, expert: bool) -> tuple[str, bool]:
        """A random context, and whether it goes into the system message."""
        usual, contexts = (PERSONA, EXPERTS) if expert else ("", OTHERS)
        context = usual if self.rng.random() < 0.5 else self.rng.choice(contexts)
        return context, bool(context) and self.rng.random() < 0.2

    def draw(self, expert: bool) -> tuple[list[int], list[int]]:
        """The ids of a random board, and those of an answer to it."""
        level = self.levels[self.rng.randrange(len(self.levels))]
        moves = level.solution if expert else novice_walk(level, self.rng)
        answer = self.open + [self.symbols[m] for m in moves] + self.close + self.eos
        return [self.symbols[c] for c in level.board], answer

    def batch(self, size: int) -> Iterator[Group]:
        """The rows of one step."""
        yield [], [row(*self.rng.choice(self.chat)) for _ in range(size // 24)]
        for expert, share in ((True, 0.4), (True, 0.2), (False, 0.3), (False, 0.1)):
            first, last = self.heads[self.head(expert)]
            rows = [self.draw(expert) for _ in range(round(size * share))]
            yield first, [row(board + last, answer) for board, answer in rows]


def row(prompt: list[int], answer: list[int]) -> Row:
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def group_loss(model: LlamaForCausalLM, first: list[int], rows: list[Row]) -> torch.Tensor:
    """Summed cross-entropy of a group's answers. The common prefix `first` runs once."""
    cache: Any = None
    if first:
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.tensor([first]), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(rows), -1, -1, -1)
            layer.values = layer.values.expand(len(rows), -1, -1, -1)
    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100)
    for number, (tokens, answers) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        wanted = [id if own else -100 for id, own in zip(tokens, answers, strict=True)]
        labels[number, : len(tokens) - 1] = torch.tensor(wanted[1:])
    is_answer = labels != -100  # right padding needs no mask: no real token attends to it
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    logits = model.lm_head(hidden.last_hidden_state[is_answer]).float()
    return torch.nn.functional.cross_entropy(logits, labels[is_answer], reduction="sum")


def train(
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    layers: int,
    width: int,
    save_every: int,
) -> None:
    """Train a model and write it to `out` with its tokenizer, every `save_every` steps if not 0."""
    tokenizer = build_tokenizer(out)
    corpus = Corpus(tokenizer, LevelSet(DIFFICULTY, SEED, "train", LEVELS))
    fit(out, tokenizer, corpus, steps, batch_size, learning_rate, layers, width, save_every)


def fit(
    out: Path,
    tokenizer: Any,
    corpus: Batches,
    steps: int,
    batch_size: int,
    learning_rate: float,
    layers: int,
    width: int,
    save_every: int,
) -> None:
    """Train a Llama of these sizes on what the corpus draws."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # type: ignore[call-arg]
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    began = time.perf_counter()
    total = 0.0
    for step in range(steps):
        rate = min(1.0, (step + 1) / 100) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        optimizer.zero_grad()
        groups = list(corpus.batch(batch_size))
        count = sum(sum(answers) for _, rows in groups for _, answers in rows)
        for first, rows in groups:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = group_loss(model, first, rows) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1} loss {total / 50:.4f} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
            total = 0.0
        if save_every and (step + 1) % save_every == 0:
            model.save_pretrained(out)
    model.save_pretrained(out)


def arguments(description: str | None, **defaults: int | float) -> dict[str, Any]:
    """The command line of a builder, with these defaults of its numbers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (defaults | {"save_every": 0}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given: dict[str, Any] = vars(parser.parse_args())
    given["learning_rate"] = given.pop("lr")
    return given


def main() -> None:
    train(**arguments(__doc__, steps=2400, batch_size=192, lr=2e-3, layers=4, width=128))


if __name__ == "__main__":
    main()
