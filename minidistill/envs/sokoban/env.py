"""The environment `sokoban-env`: its arguments, tasks and rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import overload

from minidistill.envs.arguments import argument_refusal, require_argument
from minidistill.envs.sokoban.board import KINDS, RG, XSB, Board
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.levels import Level
from minidistill.envs.sokoban.moves import live_cells
from minidistill.envs.sokoban.text import parse_moves, prompt_text
from minidistill.types import Advance, Reward, Task

require = partial(require_argument, "sokoban-env")
refusal = partial(argument_refusal, "sokoban-env")

WEIGHTS = {"solved": 1.0, "boxes_on_goal": 0.0, "format": 0.0, "length_vs_optimal": 0.0}


@dataclass(frozen=True, slots=True)
class Tasks(Sequence[Task]):
    """The tasks of a split, built from its levels on access."""

    env: SokobanEnv
    split: str
    levels: LevelSet

    def __len__(self) -> int:
        return len(self.levels)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return self.make_tasks(range(len(self))[index])
        return self.make_tasks([range(len(self))[index]])[0]

    def make_tasks(
        self, indices: Sequence[int], advance: Advance = lambda count: None
    ) -> list[Task]:
        """The tasks of these indices. `advance` is called as their levels become available."""
        return [
            Task(f"{self.split}/{index}", self.env.messages(level), level)
            for index, level in zip(indices, self.levels.take(indices, advance), strict=True)
        ]


class SokobanEnv:
    """The tasks, and single-turn Sokoban: the answer is the whole list of moves."""

    scores_in_process = True  # playing an answer takes time in proportion to its length

    def __init__(
        self,
        difficulty: Difficulty,
        num_train_examples: int,
        num_eval_examples: int,
        seed: int,
        symbols: dict[str, str],
        separator: str,
        rules: bool,
        tagged: bool,
        weights: dict[str, float],
        most_moves: int | None = None,
    ) -> None:
        """`most_moves` is what a prompt asks for, None for the whole solution."""
        self.symbols, self.separator = symbols, separator
        self.rules, self.tagged, self.weights = rules, tagged, weights
        self.most_moves = most_moves
        self.train = Tasks(self, "train", LevelSet(difficulty, seed, "train", num_train_examples))
        self.eval = Tasks(self, "eval", LevelSet(difficulty, seed, "eval", num_eval_examples))

    def messages(self, level: Level) -> tuple[dict[str, str], ...]:
        board = Board.parse(level.board).render(self.symbols, self.separator)
        content = prompt_text(board, self.symbols, self.rules, self.tagged, self.most_moves)
        return ({"role": "user", "content": content},)

    def example_answer(self, task: Task) -> str:
        """A completion with a shortest solution."""
        level: Level = task.answer
        return f"<answer>{level.solution}</answer>" if self.tagged else level.solution

    def score(self, task: Task, completion: str) -> Reward:
        """Play the answer and score the final board. Illegal moves are counted but not made."""
        level: Level = task.answer
        board = Board.parse(level.board)
        moves = parse_moves(completion, self.tagged)
        illegal = 0
        for move in moves or "":
            after = board.step(move)
            illegal += after is None
            board = after or board
        on_goal = (board.boxes & board.goals).bit_count() / board.goals.bit_count()
        # 1 for a shortest solution, less for a longer one, 0 if the level is not solved
        shortness = len(level.solution) / len(moves) if moves and board.solved else 0.0
        parts = {
            "solved": float(moves is not None and board.solved),
            "boxes_on_goal": on_goal if moves is not None else 0.0,
            "format": float(moves is not None),
            "length_vs_optimal": shortness,
        }
        metrics = {
            **parts,
            "parse_failures": float(moves is None),
            "illegal_moves": float(illegal),
            "deadlocks": float(is_deadlocked(board)),
        }
        return Reward(sum(self.weights[name] * value for name, value in parts.items()), metrics)


def is_deadlocked(board: Board) -> bool:
    """Whether a box is on a cell from which it can reach no goal."""
    floor = ((1 << board.width * board.height) - 1) & ~board.walls
    return bool(board.boxes & ~live_cells(floor, board.goals, board.width))


def symbol_table(symbols: object) -> dict[str, str]:
    table = {"xsb": XSB, "rg": RG}.get(symbols) if isinstance(symbols, str) else symbols
    fix = f'use "xsb", "rg" or a table of {", ".join(KINDS)}; no symbol may begin another'
    if not isinstance(table, dict) or set(table) != set(KINDS):
        raise refusal("symbols", symbols, fix)
    chars = list(table.values())
    require(all(isinstance(c, str) and "\n" not in c for c in chars), "symbols", symbols, fix)
    require(not any(a.startswith(b) for a, b in permutations(chars, 2)), "symbols", symbols, fix)
    return {kind: table[kind] for kind in KINDS}


def reward_weights(weights: object) -> dict[str, float]:
    table = {} if weights is None else weights
    fix = f"use a table of numbers; the parts are {', '.join(WEIGHTS)}"
    if not isinstance(table, dict) or not set(table) <= set(WEIGHTS):
        raise refusal("weights", weights, fix)
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in table.values())
    require(numbers, "weights", weights, fix)
    return {**WEIGHTS, **table}
