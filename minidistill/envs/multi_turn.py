"""Environments that drive the policy over several turns."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from minidistill.envs.loop_thread import LoopThread
from minidistill.envs.protocol import Environment, check_ready, has_rewards, has_task
from minidistill.envs.strip import Strip
from minidistill.types import Message, Task, Turn


class Policy(Protocol):
    """Answers a conversation."""

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Turn:
        """The next answer. `messages` are the whole conversation so far, which ends where it
        begins. The others are those of `Question`.

        Raises RefusedError for messages or tools that the chat template cannot take.
        """

    def forget(self, turn: Turn) -> None:
        """Leave an answer out of training, because nobody has read it."""


class MultiTurnEnvironment:
    """An environment with `async rollout(task, policy)`, which plays one conversation.

    `rollout` calls `policy(messages)` once for each turn, and returns what `score` of another
    environment may return. All conversations of the environment run in one asyncio loop, in a
    thread that is kept for the whole run.
    """

    def __init__(
        self, environment: Any, id: str, turn_timeout: float, episode_timeout: float
    ) -> None:
        """`turn_timeout` and `episode_timeout` limit the environment's own time, in seconds."""
        self.environment, self.id = environment, id
        self.turn_timeout, self.episode_timeout = turn_timeout, episode_timeout
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()

    @property
    def has_rewards(self) -> bool:
        return has_rewards(self.environment)

    @property
    def has_task(self) -> bool:
        return has_task(self.environment)

    @property
    def train(self) -> Sequence[Task]:
        tasks: Sequence[Task] = self.environment.train
        return tasks

    @property
    def eval(self) -> Sequence[Task]:
        tasks: Sequence[Task] = self.environment.eval
        return tasks

    def score(self, task: Task, completion: str) -> Any:
        """Nothing can be said of one completion."""
        raise TypeError(f"the environment {self.id!r} plays conversations and scores no completion")

    def rollout(self, task: Task, policy: Policy) -> Awaitable[Any]:
        played: Awaitable[Any] = self.environment.rollout(task, policy)
        return played

    def check_ready(self) -> None:
        check_ready(self.environment)

    @property
    def branches(self) -> bool:
        """Whether an episode may lead several conversations at once: see `Conversations`."""
        return self.strip is not None or bool(getattr(self.environment, "branches", False))

    @property
    def strip(self) -> Strip | None:
        """How the student's view is made of what the environment asks. None: the student reads it
        as it is, and the teacher reads it with the context added."""
        strip: Strip | None = getattr(self.environment, "strip", None)
        return strip

    @property
    def thread(self) -> LoopThread:
        """Its asyncio loop, started with the first conversation."""
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread(self.id)
            return self._thread

    def leave_thread(self) -> None:
        """Give up a loop that is blocked. The next conversation starts another."""
        with self._lock:
            if self._thread is not None:
                self._thread.leave()
                self._thread = None

    def close(self) -> None:
        with self._lock:
            if self._thread is not None:
                self._thread.close()
                self._thread = None
        if (close := getattr(self.environment, "close", None)) is not None:
            close()


def drives_turns(environment: Any) -> bool:
    """Whether an environment has `rollout`, and so is multi-turn.

    One that also has `score` is if `rollout` is a coroutine function.
    """
    rollout = getattr(environment, "rollout", None)
    if rollout is None:
        return False
    return not hasattr(environment, "score") or inspect.iscoroutinefunction(rollout)


def multi_turn(environments: Mapping[str, Environment]) -> dict[str, MultiTurnEnvironment]:
    """Those that are multi-turn, by name."""
    return {n: env for n, env in environments.items() if isinstance(env, MultiTurnEnvironment)}
