"""Sokoban over several turns: some moves, then the board as it is after them."""

from __future__ import annotations

from typing import Any

from minidistill.envs.multi_turn import Policy
from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.env import SokobanEnv, is_deadlocked
from minidistill.envs.sokoban.levels import Level
from minidistill.envs.sokoban.text import instruction, parse_moves
from minidistill.types import Reward, Task


class SokobanTurns(SokobanEnv):
    """Multi-turn Sokoban. After each answer the board is shown, and what was not done of it."""

    def __init__(self, turns: int, *args: Any, **arguments: Any) -> None:
        """Up to `turns` answers, each of up to `most_moves` moves if that is set."""
        super().__init__(*args, **arguments)
        self.turns = turns

    def example_answer(self, task: Task) -> list[str]:  # type: ignore[override]
        """Answers that make the moves of a shortest solution."""
        level: Level = task.answer
        size = self.most_moves or len(level.solution)
        parts = [level.solution[i : i + size] for i in range(0, len(level.solution), size)]
        return [f"<answer>{part}</answer>" if self.tagged else part for part in parts]

    async def rollout(self, task: Task, policy: Policy) -> Reward:
        """Play until the level is solved or the turns are used up, and score the final board."""
        level: Level = task.answer
        board = Board.parse(level.board)
        messages = list(task.messages)
        turns = failures = illegal = moves = 0
        while turns < self.turns and not board.solved:
            turn = await policy(messages)
            if not turn.token_ids:  # no room for another turn
                break
            turns += 1
            answer = parse_moves(turn.text, self.tagged)
            failures += answer is None
            board, played, refused = self._play(board, answer or "")
            moves, illegal = moves + played, illegal + len(refused)
            shown = board.render(self.symbols, self.separator)
            messages += [
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": f"{self._feedback(answer, refused)}\n\n{shown}"},
            ]
        parts = {
            "solved": float(board.solved),
            "boxes_on_goal": (board.boxes & board.goals).bit_count() / board.goals.bit_count(),
            "format": 1 - failures / max(1, turns),
            # 1 for a shortest solution, less for a longer one, 0 if the level is not solved
            "length_vs_optimal": len(level.solution) / moves if moves and board.solved else 0.0,
        }
        metrics = {
            **parts,
            "parse_failures": float(failures),
            "illegal_moves": float(illegal),
            "deadlocks": float(is_deadlocked(board)),
            "turns": float(turns),
        }
        return Reward(sum(self.weights[name] * value for name, value in parts.items()), metrics)

    def _play(self, board: Board, answer: str) -> tuple[Board, int, list[str]]:
        """The board after a turn, the number of its moves, and those that were not possible."""
        refused: list[str] = []
        moves = answer[: self.most_moves]
        for number, move in enumerate(moves, 1):
            after = board.step(move)
            if after is None:
                refused.append(f"{move} (move {number})")
            board = after or board
            if board.solved:
                return board, number, refused
        return board, len(moves), refused

    def _feedback(self, answer: str | None, refused: list[str]) -> str:
        """What became of an answer."""
        if answer is None:
            return f"No moves were found. {instruction(self.tagged, self.most_moves)}"
        notes = [f"Not possible: {', '.join(refused)}."] if refused else []
        if self.most_moves is not None and len(answer) > self.most_moves:
            notes.append(f"Only the first {self.most_moves} moves count.")
        return " ".join([*notes, "The puzzle is not solved yet."])
