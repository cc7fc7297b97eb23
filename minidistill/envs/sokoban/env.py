"""`sokoban-env`: seeded levels, prompts and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from minidistill.envs.sokoban.board import RG, XSB, Board
from minidistill.envs.sokoban.levels import Difficulty, Level, LevelSet
from minidistill.envs.sokoban.solver import UNREACHABLE, push_distances
from minidistill.envs.sokoban.text import parse_moves, prompt_text
from minidistill.errors import UserError
from minidistill.types import Reward, Task

WEIGHTS = {"solved": 1.0, "boxes_on_goal": 0.0, "format": 0.0, "length_vs_optimal": 0.0}


@dataclass(frozen=True, slots=True)
class Tasks(Sequence[Task]):
    """A split's levels as tasks, built when asked for."""

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
            return [self[i] for i in range(*index.indices(len(self)))]
        level = self.levels[range(len(self))[index]]
        return Task(f"{self.split}/{index}", self.env.messages(level), level)


class SokobanEnv:
    """Single-turn Sokoban: the prompt shows a level, the answer is the whole move list."""

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
    ) -> None:
        self.symbols, self.separator = symbols, separator
        self.rules, self.tagged, self.weights = rules, tagged, weights
        self.train = Tasks(self, "train", LevelSet(difficulty, seed, "train", num_train_examples))
        self.eval = Tasks(self, "eval", LevelSet(difficulty, seed, "eval", num_eval_examples))

    def messages(self, level: Level) -> tuple[dict[str, str], ...]:
        board = Board.parse(level.board).render(self.symbols, self.separator)
        content = prompt_text(board, self.symbols, self.rules, self.tagged)
        return ({"role": "user", "content": content},)

    def score(self, task: Task, completion: str) -> Reward:
        """Play the answer. An illegal move is counted and does nothing; the last state decides."""
        level: Level = task.answer
        board = Board.parse(level.board)
        moves = parse_moves(completion, self.tagged)
        illegal = 0
        for move in moves or "":
            after = board.step(move)
            illegal += after is None
            board = after or board
        on_goal = (board.boxes & board.goals).bit_count() / board.goals.bit_count()
        parts = {
            "solved": float(moves is not None and board.solved),
            "boxes_on_goal": on_goal if moves is not None else 0.0,
            "format": float(moves is not None),
            # 1 for a shortest solution, less the longer it is, 0 where the level is not solved
            "length_vs_optimal": len(level.solution) / len(moves)
            if moves and board.solved
            else 0.0,
        }
        metrics = {
            **parts,
            "parse_failures": float(moves is None),
            "illegal_moves": float(illegal),
            "deadlocks": float(_deadlocked(board)),
        }
        return Reward(sum(self.weights[name] * value for name, value in parts.items()), metrics)


def _deadlocked(board: Board) -> bool:
    """Whether some box stands where no goal can be reached any more."""
    distance = push_distances(board)
    return any(board.boxes >> c & 1 and d >= UNREACHABLE for c, d in enumerate(distance))


def load(
    num_train_examples: int = 1000,
    num_eval_examples: int = 256,
    seed: int = 0,
    min_w: int = 6,
    max_w: int = 6,
    min_h: int = 6,
    max_h: int = 6,
    min_boxes: int = 1,
    max_boxes: int = 1,
    max_depth: int = 80,
    min_moves: int = 1,
    max_moves: int | None = None,
    min_pushes: int = 1,
    max_pushes: int | None = None,
    min_boxes_off_goal: int = 1,
    rules: Literal["prompt", "omit"] = "prompt",
    symbols: str | dict[str, str] = "xsb",
    answer: Literal["tag", "bare"] = "tag",
    weights: dict[str, float] | None = None,
) -> SokobanEnv:
    """Sizes count the outer walls; `max_depth` and `max_moves` bound the shortest solution.

    `symbols`: "xsb", "rg" (cells separated by spaces) or a table with the keys wall, player,
    player_on_goal, box, box_on_goal, goal, floor. `weights` of the reward's parts: solved,
    boxes_on_goal, format, length_vs_optimal. Raises UserError for values it cannot use.
    """
    _require(rules in ("prompt", "omit"), "rules", rules, 'use "prompt" or "omit"')
    _require(answer in ("tag", "bare"), "answer", answer, 'use "tag" or "bare"')
    _require(num_train_examples > 0, "num_train_examples", num_train_examples, "use 1 or more")
    _require(num_eval_examples > 0, "num_eval_examples", num_eval_examples, "use 1 or more")
    table = {"xsb": XSB, "rg": RG}.get(symbols) if isinstance(symbols, str) else symbols
    if (
        table is None
        or set(table) != set(XSB)
        or len(set(table.values())) != len(XSB)
        or any(not isinstance(c, str) or not c or "\n" in c for c in table.values())
    ):
        _require(False, "symbols", symbols, f'use "xsb", "rg" or a table of {", ".join(XSB)}, all different')  # fmt: skip
    unknown = set(weights or {}) - set(WEIGHTS)
    _require(not unknown, "weights", sorted(unknown), f"the parts are {', '.join(WEIGHTS)}")
    difficulty = Difficulty(
        min_w, max_w, min_h, max_h, min_boxes, max_boxes, max_depth,
        min_moves, max_moves, min_pushes, max_pushes, min_boxes_off_goal,
    )  # fmt: skip
    return SokobanEnv(
        difficulty,
        num_train_examples,
        num_eval_examples,
        seed,
        dict(table or XSB),
        " " if symbols == "rg" else "",
        rules == "prompt",
        answer == "tag",
        {**WEIGHTS, **(weights or {})},
    )


def _require(condition: bool, name: str, value: object, fix: str) -> None:
    if not condition:
        raise UserError(f"sokoban-env: {name} = {value!r} cannot be used", where="args", fix=fix)
