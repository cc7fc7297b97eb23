"""The environment `textarena`: single-player games of the package of that name, by their names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import random
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from minidistill.envs.arguments import require_argument
from minidistill.envs.multi_turn import Policy
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.types import Reward, Task

_require = partial(require_argument, "textarena")

EVAL_SHARE = 4  # one start in four belongs to the eval split
ATTEMPTS = 500
"""Starts without a new one, after which there are no more."""
MOVE = "Make your move."
"""The prompt of a game that shows nothing but its rules, if these are left out."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Game:
    """One game, started with a seed. It draws from states of its own of the global generators.

    The games of that package seed Python's generator, and draw from it or from numpy's as they go
    on. Those that are played at once would draw from each other's.
    """

    def __init__(self, package: Any, name: str, seed: int, options: dict[str, Any]) -> None:
        self._states: list[Any] = []
        with self._drawing():
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(seed)
            self.game = package.make(f"{name}-raw", **options)  # without a history of its own
            self.game.reset(num_players=1, seed=seed)

    def observation(self, rules: bool = True) -> str:
        """What the game has shown since the last call; without `rules` less its first part."""
        with self._drawing():
            _, parts = self.game.get_observation()
        texts = [
            str(text)
            for sender, text, kind in parts
            if kind.name != "PLAYER_ACTION" and (rules or kind.name != "PROMPT")
        ]
        return "\n\n".join(text.strip() for text in texts)

    def step(self, action: str) -> bool:
        """Make a move. Returns whether the game has ended."""
        with self._drawing():
            done, _ = self.game.step(action=action)
        return bool(done)

    def close(self) -> tuple[float | None, bool]:
        """The reward, None if the game has not ended, and whether a move that is none ended it."""
        rewards, info = self.game.close()
        value = None if rewards is None else rewards.get(0)
        return value, bool((info or {}).get(0, {}).get("invalid_move", False))

    @property
    def key(self) -> int:
        """A 64-bit hash of how the game stands."""
        text = _ADDRESS.sub("", repr(self.game.state.game_state))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        numpy = sys.modules.get("numpy")
        others = [random.getstate(), numpy and numpy.random.get_state()]
        _set_states(numpy, self._states)
        try:
            yield
        finally:
            self._states = [random.getstate(), numpy and numpy.random.get_state()]
            _set_states(numpy, others)


def _set_states(numpy: Any, states: list[Any]) -> None:
    if states:
        random.setstate(states[0])
    if states and numpy is not None and states[1] is not None:
        numpy.random.set_state(states[1])


class TextArena:
    """Conversations with a game. A task is a seed."""

    def __init__(
        self, package: Any, name: str, options: dict[str, Any], rules: bool, max_turns: int
    ) -> None:
        self.package, self.name, self.options = package, name, options
        self.rules, self.max_turns = rules, max_turns
        self.train: list[Task] = []
        self.eval: list[Task] = []

    def start(self, seed: int) -> Game:
        return Game(self.package, self.name, seed, self.options)

    def add_tasks(self, seed: int, train: int, held_out: int) -> None:
        """Fill the splits with different starts. A hash decides on the split of each.

        Raises UserError if there are not that many.
        """
        wanted = {"train": train, "eval": held_out}
        rng, known, left = random.Random(f"textarena {self.name} {seed}"), set[int](), ATTEMPTS
        while left and (len(self.train) < train or len(self.eval) < held_out):
            left -= 1
            number = rng.getrandbits(31)
            game = self.start(number)
            if (key := game.key) in known:
                continue
            known.add(key)
            left = ATTEMPTS
            split = "eval" if key % EVAL_SHARE == 0 else "train"
            tasks: list[Task] = getattr(self, split)
            if len(tasks) < wanted[split]:
                content = game.observation(self.rules) or MOVE
                message = {"role": "user", "content": content}
                tasks.append(Task(f"{split}/{len(tasks)}", (message,), number))
        for split, count in wanted.items():
            if (found := len(getattr(self, split))) < count:
                raise UserError(
                    f"textarena: {self.name} has only {found} different starts for the {split} "
                    "split",
                    where="args",
                    fix=f"lower num_{split}_examples, or use a game with more starts",
                )

    async def rollout(self, task: Task, policy: Policy) -> Reward:
        """Play until the game ends or the turns are used up, which counts as 0."""
        game = self.start(task.answer)
        game.observation()  # it is in the task
        messages = list(task.messages)
        turns, done = 0, False
        while turns < self.max_turns and not done:
            turn = await policy(messages)
            if not turn.token_ids:  # no room for another turn
                break
            turns += 1
            done = game.step(turn.text)
            messages += [
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": game.observation() or MOVE},
            ]
        value, invalid = game.close()
        metrics = {"ended": float(done), "invalid": float(invalid), "turns": float(turns)}
        return Reward(float(value or 0.0) if done else 0.0, metrics)


def load(
    game: str,
    num_train_examples: int = 256,
    num_eval_examples: int = 64,
    seed: int = 0,
    rules: Literal["prompt", "omit"] = "prompt",
    max_turns: int = 10,
    options: dict[str, Any] | None = None,
) -> TextArena:
    """The single-player game of this name, such as "GuessTheNumber-v0".

    With `rules` "omit" what the game says first is left out: its rules, which the context then has.
    `options` are arguments of the game itself. Raises UserError for a game that is not there or
    needs other players, and for values it cannot use.
    """
    for name, count in (
        ("num_train_examples", num_train_examples),
        ("num_eval_examples", num_eval_examples),
        ("max_turns", max_turns),
    ):
        _require(type(count) is int and count > 0, name, count, "use a whole number above 0")
    _require(type(seed) is int, "seed", seed, "use a whole number")
    _require(rules in ("prompt", "omit"), "rules", rules, 'use "prompt" or "omit"')
    try:
        package = importlib.import_module("textarena")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the environment 'textarena' needs a package that is not installed: {error.name}",
            where="args",
            fix="pip install 'minidistill[textarena]'",
            exit_code=EXIT_ENVIRONMENT,
        ) from None
    arena = TextArena(package, game, dict(options or {}), rules == "prompt", max_turns)
    try:
        arena.start(0)
    except ValueError as error:
        _require(False, "game", game, f"use the name of one of its games ({error})")
    except AssertionError as error:
        _require(False, "game", game, f"use a game for one player ({error})")
    arena.add_tasks(seed, num_train_examples, num_eval_examples)
    return arena
