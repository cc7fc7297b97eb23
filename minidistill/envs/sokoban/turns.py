"""Sokoban over several turns: some moves, then the board as it is after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minidistill.envs.multi_turn import Policy
from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.env import SokobanEnv, is_deadlocked
from minidistill.envs.sokoban.levels import Level
from minidistill.envs.sokoban.play import Turns
from minidistill.types import Reward, Task


@dataclass(slots=True)
class _Puzzle:
    """A board that is played on."""

    board: Board
    symbols: dict[str, str]
    separator: str

    @property
    def over(self) -> bool:
        return self.board.solved

    def move(self, move: str) -> bool:
        after = self.board.step(move)
        self.board = after or self.board
        return after is not None

    def show(self) -> str:
        return self.board.render(self.symbols, self.separator)


class SokobanTurns(SokobanEnv):
    """Multi-turn Sokoban. After each answer the board is shown, and what was not done of it."""

    def __init__(self, turns: int, *args: Any, **arguments: Any) -> None:
        """Up to `turns` answers, each of up to `most_moves` moves if that is set."""
        super().__init__(*args, **arguments)
        self.turns = Turns(
            turns, self.most_moves, self.tagged, "Not possible", "The puzzle is not solved yet."
        )

    def example_answer(self, task: Task) -> list[str]:  # type: ignore[override]
        """Answers that make the moves of a shortest solution."""
        level: Level = task.answer
        size = self.most_moves or len(level.solution)
        parts = [level.solution[i : i + size] for i in range(0, len(level.solution), size)]
        return [f"<answer>{part}</answer>" if self.tagged else part for part in parts]

    async def rollout(self, task: Task, policy: Policy) -> Reward:
        """Play until the level is solved or the turns are used up, and score the final board."""
        level: Level = task.answer
        puzzle = _Puzzle(Board.parse(level.board), self.symbols, self.separator)
        played = await self.turns.play(puzzle, task, policy)
        board, solved = puzzle.board, puzzle.board.solved
        parts = {
            "solved": float(solved),
            "boxes_on_goal": (board.boxes & board.goals).bit_count() / board.goals.bit_count(),
            "format": 1 - played.failures / max(1, played.turns),
            # 1 for a shortest solution, less for a longer one, 0 if the level is not solved
            "length_vs_optimal": len(level.solution) / played.moves
            if played.moves and solved
            else 0.0,
        }
        metrics = {
            **parts,
            "parse_failures": float(played.failures),
            "illegal_moves": float(played.refused),
            "deadlocks": float(is_deadlocked(board)),
            "turns": float(played.turns),
        }
        return Reward(sum(self.weights[name] * value for name, value in parts.items()), metrics)
