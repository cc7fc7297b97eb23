"""A stand-in for the package textarena, with the parts of its interface that are used."""

from __future__ import annotations

import enum
import random
from typing import Any

import numpy as np


class ObservationType(enum.Enum):
    PROMPT = enum.auto()
    PLAYER_ACTION = enum.auto()
    GAME_MESSAGE = enum.auto()


class State:
    def __init__(self, target: int) -> None:
        self.game_state = {"target": target, "history": []}


class Dice:
    """Say a number: the game rolls a die that everybody shares, and tells both."""

    def __init__(self, sides: int = 6) -> None:
        self.sides = sides
        self.rewards: dict[int, float] | None = None

    def reset(self, num_players: int, seed: int | None = None) -> None:
        random.seed(seed)
        self.state = State(random.randrange(1000))
        self.new: list[Any] = [(-1, "Say a number.", ObservationType.PROMPT)]

    def get_observation(self) -> tuple[int, list[Any]]:
        new, self.new = self.new, []
        return 0, new

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        roll = (random.randrange(self.sides) + np.random.randint(self.sides)) % self.sides
        self.new += [
            (0, action, ObservationType.PLAYER_ACTION),
            (-1, f"The die shows {roll}.", ObservationType.GAME_MESSAGE),
        ]
        done = action == "[stop]"
        if done:
            self.rewards = {0: 0.75}
        return done, {}

    def close(self) -> tuple[Any, Any]:
        return self.rewards, {0: {"invalid_move": False, "turn_count": 1}}


class Pair(Dice):
    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == 2, f"The number of players has to be 2, received {num_players}"


class Coin(Dice):
    def reset(self, num_players: int, seed: int | None = None) -> None:
        super().reset(num_players, seed)
        self.state = State(self.state.game_state["target"] % 2)  # type: ignore[operator]


def make(env_id: str, **kwargs: Any) -> Dice:
    games = {"Dice-v0-raw": Dice, "Pair-v0-raw": Pair, "Coin-v0-raw": Coin}
    if env_id not in games:
        raise ValueError(f"Environment {env_id} not found in registry.")
    return games[env_id](**kwargs)
