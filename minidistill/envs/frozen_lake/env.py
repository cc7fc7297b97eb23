"""The environment `frozen-lake-env`: its arguments, tasks and conversations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

from minidistill.envs.arguments import require_argument
from minidistill.envs.frozen_lake.lakes import Cell, Lake, lakes
from minidistill.envs.multi_turn import Policy
from minidistill.envs.sokoban.play import Turns
from minidistill.envs.sokoban.text import instruction
from minidistill.errors import UserError
from minidistill.types import Reward, Task

_require = partial(require_argument, "frozen-lake-env")

RULES = """Frozen Lake: walk over the ice to the goal.
Symbols: P player, _ ice, O hole, G goal.
Moves: U up, D down, L left, R right. A move off the edge is not made. Who steps into a hole has \
lost.{slippery}
"""
SLIPPERY = " The ice is slippery: a move may go to either side of where it was meant to go."
TASK = "Reach the goal."
TURNED = {"U": "LUR", "D": "RDL", "L": "DLU", "R": "URD"}
"""Where a move goes on slippery ice, each with the same probability."""


@dataclass(slots=True)
class _Walk:
    """A player on a lake."""

    lake: Lake
    cell: Cell
    ice: random.Random | None
    """What decides where moves on slippery ice go."""

    @property
    def over(self) -> bool:
        return self.lake.kind(self.cell) != "_"

    def move(self, move: str) -> bool:
        after = self.lake.step(self.cell, self.ice.choice(TURNED[move]) if self.ice else move)
        self.cell = after or self.cell
        return after is not None

    def show(self) -> str:
        return self.lake.render(self.cell)


class FrozenLake:
    """Multi-turn Frozen Lake. After each answer the lake is shown with the player on it."""

    def __init__(
        self,
        train: list[Lake],
        eval: list[Lake],
        *,
        seed: int,
        rules: bool,
        is_slippery: bool,
        max_turns: int,
        moves_per_turn: int | None,
    ) -> None:
        self.seed, self.rules, self.is_slippery = seed, rules, is_slippery
        self.turns = Turns(
            max_turns,
            moves_per_turn,
            tagged=True,
            refused="Off the edge",
            unfinished="You are on the ice, and not at the goal yet.",
        )
        self.train = [self._task(f"train/{i}", lake) for i, lake in enumerate(train)]
        self.eval = [self._task(f"eval/{i}", lake) for i, lake in enumerate(eval)]

    def _task(self, id: str, lake: Lake) -> Task:
        rules = RULES.format(slippery=SLIPPERY if self.is_slippery else "") + "\n"
        how = instruction(tagged=True, most=self.turns.moves_per_turn)
        shown = lake.render(lake.start)
        content = f"{rules if self.rules else ''}{TASK} {how}\n\n{shown}"
        return Task(id, ({"role": "user", "content": content},), lake)

    async def rollout(self, task: Task, policy: Policy) -> Reward:
        """Play until the goal or a hole is reached, or the turns are used up. 1 for the goal."""
        lake: Lake = task.answer
        # the same for every conversation about a task, so that it can be repeated
        ice = random.Random(f"ice {self.seed} {task.id}") if self.is_slippery else None
        walk = _Walk(lake, lake.start, ice)
        played = await self.turns.play(walk, task, policy)
        solved = lake.kind(walk.cell) == "G"
        return Reward(
            float(solved),
            {
                "solved": float(solved),
                "fell": float(lake.kind(walk.cell) == "O"),
                "length_vs_optimal": min(1.0, lake.moves / played.moves) if solved else 0.0,
                "parse_failures": float(played.failures),
                "blocked_moves": float(played.refused),
                "turns": float(played.turns),
            },
        )


def load(
    num_train_examples: int = 1000,
    num_eval_examples: int = 256,
    seed: int = 0,
    size: int = 4,
    holes: float = 0.2,
    min_moves: int = 2,
    is_slippery: bool = False,
    rules: Literal["prompt", "omit"] = "prompt",
    max_turns: int = 5,
    moves_per_turn: int | None = None,
) -> FrozenLake:
    """An environment of generated lakes of `size` × `size` cells.

    Each cell but start and goal is a hole with the probability `holes`. The goal can be reached, in
    no fewer than `min_moves` moves. No lake of a split equals another one, or one of the other
    split, up to rotations and reflections. Raises UserError for values it cannot use.
    """
    for name, count, least in (
        ("num_train_examples", num_train_examples, 1),
        ("num_eval_examples", num_eval_examples, 1),
        ("size", size, 2),
        ("min_moves", min_moves, 1),
        ("max_turns", max_turns, 1),
        ("moves_per_turn", 1 if moves_per_turn is None else moves_per_turn, 1),
    ):
        whole = type(count) is int and count >= least
        _require(whole, name, count, f"use a whole number from {least}")
    _require(size <= 16, "size", size, "use a size up to 16")
    _require(type(seed) is int, "seed", seed, "use a whole number")
    number = isinstance(holes, int | float) and 0 <= holes < 1
    _require(number, "holes", holes, "use a share from 0 to below 1")
    _require(isinstance(is_slippery, bool), "is_slippery", is_slippery, "use true or false")
    _require(rules in ("prompt", "omit"), "rules", rules, 'use "prompt" or "omit"')
    splits = {}
    for split, count in (("train", num_train_examples), ("eval", num_eval_examples)):
        splits[split] = list(islice(lakes(size, holes, min_moves, seed, split), count))
        if len(splits[split]) < count:
            raise UserError(
                f"frozen-lake-env: there are only {len(splits[split])} lakes for the {split} split",
                where="args",
                fix=f"lower num_{split}_examples or min_moves, or raise size",
            )
    return FrozenLake(
        splits["train"],
        splits["eval"],
        seed=seed,
        rules=rules == "prompt",
        is_slippery=is_slippery,
        max_turns=max_turns,
        moves_per_turn=moves_per_turn,
    )
