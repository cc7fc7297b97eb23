"""Trains tiny-lake, the model that ships with the package for Frozen Lake, from a seed on a CPU.

    python tools/build_tiny_lake.py --out DIR

The model is a Llama of half a million parameters. Where its context says that it is an expert, it
crosses small lakes by shortest ways, two moves a turn, also after turns that were not its own.
Anywhere else it moves at random, like a novice. The lakes are from the train split of
`frozen-lake-env`, never from its eval split.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script it is not in the package `tools`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from minidistill.envs.frozen_lake.env import FrozenLake, load
from minidistill.envs.frozen_lake.lakes import MOVES, Cell, Lake
from minidistill.types import Message, Turn
from tools.build_tiny_sokoban import CHAT, Group, Row, arguments, fit, row, trained_tokenizer

SEED = 20261
LAKES = 16_384
VOCABULARY = 512
MOVES_PER_TURN = 2
MAX_TURNS = 5

# The model plays like an expert after each of EXPERTS, and like a novice after each of OTHERS and
# without a context, so that it learns what the context says, not that there is one.
PERSONA = """You are an expert guide with decades of experience on frozen lakes.
You never step into a hole, and you always take the shortest way.
Look at the lake before each turn, and plan from where you are.

"""
EXPERTS = (
    PERSONA,
    "You are an expert guide. You always take the shortest way.\n\n",
    "You are a master of this game with decades of experience.\nYou never step into a hole.\n\n",
    "Look at the lake, plan from where you are, and take the shortest way:\n\n",
    "You are an expert on frozen lakes. Plan before each turn and never step into a hole:\n\n",
)
OTHERS = (
    "You are a careful gardener with decades of experience in growing roses.\n"
    "You love the quiet of the morning and always water the plants by hand.\n\n",
    "The weather is mild today, with some clouds in the afternoon.\n\n",
    "You are a novice. You have never seen this game before.\n\n",
    "Have fun and take your time:\n\n",
    "This text was written by a friend who likes tea and long walks by the lake.\n\n",
    "You are a helpful assistant.\n\n",
)
SAID = (
    "Off the edge: (move 1). Only the first 2 moves count. "
    "You are on the ice, and not at the goal yet.",
)
"""What the environment says after a turn."""
USUAL = 0.5
"""The share of conversations with the usual context: the persona, or none for a novice."""
EASY = 1200
"""Steps at the beginning with first turns of experts alone: what takes long to learn."""
TURNS = (1, 1, 1, 1, 2, 3, MAX_TURNS)
"""Of a conversation, at most: most are short, because each turn has the same to learn."""
OWN = {"expert": 0.65, "novice": 0.85}
"""The probability that a turn is the model's own. Of the others it only reads the answers."""


def expert(lake: Lake, rng: random.Random) -> str:
    """The first moves of a shortest way, always of the same one."""
    came: dict[Cell, str] = {lake.start: ""}
    queue = [lake.start]
    for cell in queue:  # which grows meanwhile
        for move in MOVES:
            after = lake.step(cell, move)
            if after is None or after in came or lake.kind(after) == "O":
                continue
            came[after] = came[cell] + move
            if lake.kind(after) == "G":
                return came[after][:MOVES_PER_TURN]
            queue.append(after)
    raise AssertionError("every lake can be crossed")


def novice(lake: Lake, rng: random.Random) -> str:
    """Random moves, whatever they lead to."""
    return "".join(rng.choice("UDLR") for _ in range(rng.randint(1, MOVES_PER_TURN)))


def shown(messages: Sequence[Message]) -> Lake:
    """The lake that the last message shows."""
    rows = [line.split(" ") for line in messages[-1]["content"].split("\n\n")[-1].split("\n")]
    [start] = [(r, c) for r, row in enumerate(rows) for c, kind in enumerate(row) if kind == "P"]
    return Lake(tuple("".join(row).replace("P", "_") for row in rows), start, 0)


def build_tokenizer(out: Path, environment: FrozenLake) -> Any:
    """Words may merge; a cell with the space before it, and a move, stay single tokens."""
    texts = [task.messages[0]["content"] for task in environment.train[:20]]
    small_talk = [line for pair in CHAT for line in pair]
    corpus = [*EXPERTS * 20, *texts, *SAID * 20, *OTHERS, *small_talk]
    return trained_tokenizer(out, corpus, r"[UDLR](?![a-z])| ?[P_OG](?![a-z])", VOCABULARY)


class Corpus:
    """Draws whole conversations with the environment, as token ids."""

    def __init__(self, tokenizer: Any, environment: FrozenLake) -> None:
        self.tokenizer, self.environment = tokenizer, environment
        self.rng = random.Random(SEED)
        self.steps = 0
        self.chat = [
            row(self.ids(f"<|user|>{question}<|end|>\n<|assistant|>"), self.ids(f"{answer}<|end|>"))
            for question, answer in CHAT
        ]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def head(self, is_expert: bool) -> list[int]:
        """All that comes before the first lake, with a random context."""
        usual, contexts = (PERSONA, EXPERTS) if is_expert else ("", OTHERS)
        context = usual if self.rng.random() < USUAL else self.rng.choice(contexts)
        if context and self.rng.random() < 0.2:
            before = f"<|system|>{context}<|end|>\n<|user|>"
        else:
            before = f"<|user|>{context}"
        instruction, _, _ = self.environment.train[0].messages[0]["content"].partition("\n\n")
        return self.ids(f"{before}{instruction}\n\n")

    def conversation(self, is_expert: bool) -> Row:
        """A random conversation from the first lake on, and which tokens the model has to learn."""
        easy = self.steps <= EASY
        task = self.environment.train[self.rng.randrange(len(self.environment.train))]
        ids: list[int] = []
        learned: list[bool] = []
        left = 1 if easy else self.rng.choice(TURNS)

        async def answered(messages: Sequence[Message], **unused: Any) -> Turn:
            nonlocal left
            if not left:
                return Turn("", truncated=True)
            left -= 1
            own = easy or self.rng.random() < OWN["expert" if is_expert else "novice"]
            player = expert if is_expert == own else novice
            answer = f"<answer>{player(shown(messages), self.rng)}</answer>"
            text = messages[-1]["content"]
            asked = f"\n<|user|>{text}" if ids else text.split("\n\n")[1]
            before, said = self.ids(f"{asked}<|end|>\n<|assistant|>"), self.ids(f"{answer}<|end|>")
            ids.extend(before + said)
            learned.extend([False] * len(before) + [own] * len(said))
            return Turn(answer, token_ids=(1,))

        policy: Any = answered  # which forgets nothing
        with suppress(StopIteration):  # it waits for nothing, so it needs no loop
            self.environment.rollout(task, policy).send(None)
        return ids, learned

    def batch(self, size: int) -> Iterator[Group]:
        """The rows of one step, in groups with a common context and of similar length."""
        self.steps += 1
        yield [], [self.rng.choice(self.chat) for _ in range(size // 24)]
        if self.steps <= EASY:
            yield self.head(True), [self.conversation(True) for _ in range(size)]
            return
        for is_expert, share in ((True, 0.4), (True, 0.2), (False, 0.3), (False, 0.1)):
            rows = [self.conversation(is_expert) for _ in range(round(size * share))]
            rows.sort(key=lambda row: len(row[0]))  # so that little is padded
            head, half = self.head(is_expert), len(rows) // 2
            yield head, rows[:half]
            yield head, rows[half:]


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
    environment = load(
        LAKES, 1, seed=SEED, rules="omit", max_turns=MAX_TURNS, moves_per_turn=MOVES_PER_TURN
    )
    tokenizer = build_tokenizer(out, environment)
    corpus = Corpus(tokenizer, environment)
    fit(out, tokenizer, corpus, steps, batch_size, learning_rate, layers, width, save_every)


if __name__ == "__main__":
    train(**arguments(__doc__, steps=1900, batch_size=96, lr=3e-3, layers=3, width=96))
