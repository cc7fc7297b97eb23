"""A game of moves over several turns: some moves in each answer, then how it is after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from minidistill.envs.multi_turn import Policy
from minidistill.envs.sokoban.text import instruction, parse_moves
from minidistill.types import Task


class Game(Protocol):
    """A game that is played."""

    @property
    def over(self) -> bool:
        """Whether no move is left to make."""

    def move(self, move: str) -> bool:
        """Make a move, U, D, L or R. False if it is not possible, and not made."""

    def show(self) -> str:
        """How it is now, as a text."""


@dataclass(slots=True)
class Played:
    """What was done in a game."""

    turns: int = 0
    failures: int = 0
    """Answers in which no moves were found."""
    moves: int = 0
    """Those that were not possible included."""
    refused: int = 0
    """Moves that were not possible."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How a game is played, and the reply to a turn that does not end it."""

    most: int
    moves_per_turn: int | None
    """None for any number."""
    tagged: bool
    """Answers are in `<answer>` tags."""
    refused: str
    """What is said of moves that are not possible."""
    unfinished: str

    async def play(self, game: Game, task: Task, policy: Policy) -> Played:
        """Play until the game is over, the turns are used up, or there is no room for another."""
        messages, played = list(task.messages), Played()
        while played.turns < self.most and not game.over:
            turn = await policy(messages)
            if not turn.token_ids:  # no room for another turn
                break
            answer = parse_moves(turn.text, self.tagged)
            refused = []
            for number, move in enumerate((answer or "")[: self.moves_per_turn], 1):
                played.moves += 1
                if not game.move(move):
                    refused.append(f"{move} (move {number})")
                if game.over:
                    break
            played.turns += 1
            played.failures += answer is None
            played.refused += len(refused)
            messages += [
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": f"{self._said(answer, refused)}\n\n{game.show()}"},
            ]
        return played

    def _said(self, answer: str | None, refused: list[str]) -> str:
        """What became of an answer."""
        if answer is None:
            return f"No moves were found. {instruction(self.tagged, self.moves_per_turn)}"
        notes = [f"{self.refused}: {', '.join(refused)}."] if refused else []
        if self.moves_per_turn is not None and len(answer) > self.moves_per_turn:
            notes.append(f"Only the first {self.moves_per_turn} moves count.")
        return " ".join([*notes, self.unfinished])
