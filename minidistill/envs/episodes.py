"""Many conversations at once, in rounds: each waits for the policy, has ended or has failed."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Awaitable, Callable, Sequence

from minidistill.envs.guarded import check_messages
from minidistill.envs.loop_thread import Clock, LoopThread
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import Outcome, RefusedError, ScoringError, to_reward
from minidistill.system.foreign import describe
from minidistill.types import Message, Question, Reward, Task, Turn

MOST_TURNS = 1000
"""Of a conversation. An environment that does not see that the room is used up would never end."""
POLL_SECONDS = 0.05


class Episode:
    """One conversation of an environment with the policy."""

    def __init__(self, environment: MultiTurnEnvironment, task: Task, rewarded: bool) -> None:
        """Without `rewarded`, what the environment returns at the end is not read."""
        self.environment, self.task, self.rewarded = environment, task, rewarded
        self.asked: Question | None = None
        """What it waits for the policy's answer to."""
        self.outcome: Outcome | None = None
        """At its end: its reward, or why it failed."""
        self.turns: list[tuple[Question, Turn | RefusedError]] = []
        """What it asked, and what was answered."""
        self.forgotten: list[Turn] = []
        """Answers that nobody has read."""
        self.attempt = 0
        """Counts its starts: events of an earlier start are ignored."""
        self.answer: Callable[[Turn | RefusedError], None] = lambda turn: None
        self.cancel: Callable[[], None] = lambda: None
        self.clock: Clock | None = None
        self.spent = 0.0
        """Seconds of the environment in the turns before this one."""


class EpisodeRounds:
    """Runs episodes until all of them wait or have ended, then takes answers for the next round.

    What an environment raises is a failure of the episode, whatever it is. So is a time-out. An
    environment that blocks its loop fails for the episode that does it; its other episodes start
    again in a new loop, and are given the answers that they have had.
    """

    def __init__(
        self, episodes: Sequence[Episode], check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called after each failure that took long, and may raise to stop."""
        self.episodes, self._check = episodes, check
        self._changed = threading.Condition()

    def wait(self) -> list[Episode]:
        """Those that wait for an answer, in order, when no other one runs. Empty at the end."""
        with self._changed:
            while running := [e for e in self.episodes if e.outcome is None and e.asked is None]:
                for episode in running:
                    if episode.clock is None:
                        self._start(episode)
                self._changed.wait(self._patience(running))
                self._stop_late(running)
            return [e for e in self.episodes if e.asked is not None]

    def answer(self, episode: Episode, turn: Turn | RefusedError, to: Question) -> None:
        """Let an episode go on with the policy's answer to what it asked.

        An answer that comes too late is forgotten: the episode has ended, or waits for it no more.
        """
        with self._changed:
            if episode.asked is not to or episode.clock is None:
                if isinstance(turn, Turn):
                    episode.forgotten.append(turn)
                return
            episode.turns.append((episode.asked, turn))
            episode.asked = None
            episode.clock.restart()
        episode.answer(turn)

    def close(self) -> None:
        """End all episodes that are left."""
        with self._changed:
            for episode in self.episodes:
                if episode.outcome is None:
                    self._end(episode, ScoringError("the run ended"))

    # -- with the lock ---------------------------------------------------------------------------

    def _start(self, episode: Episode) -> None:
        episode.attempt += 1
        episode.spent = 0.0
        thread = episode.environment.thread
        episode.clock = Clock(thread)
        playing = self._play(episode, episode.attempt, thread)
        episode.cancel = thread.start(playing, episode.clock)

    def _end(self, episode: Episode, outcome: Outcome) -> None:
        episode.outcome, episode.asked = outcome, None
        episode.attempt += 1
        episode.cancel()

    def _patience(self, running: Sequence[Episode]) -> float:
        """Seconds until the first of them may be late."""
        return max(POLL_SECONDS, min(left for e in running for left, _ in _limits(e)))

    def _stop_late(self, running: Sequence[Episode]) -> None:
        late = {
            episode: why
            for episode in running
            if episode.outcome is None and episode.asked is None
            for left, why in _limits(episode)
            if not left > 0
        }
        blocking = {e.environment for e in late if e.clock is not None and e.clock.blocks}
        for episode, why in late.items():
            self._end(episode, ScoringError(why, slow=True, kind="timed_out"))
        for environment in blocking:
            environment.leave_thread()
            for episode in self.episodes:
                if episode.environment is environment and episode.outcome is None:
                    episode.asked, episode.clock = None, None  # starts again
                    episode.attempt += 1
        if late:
            self._check()

    # -- in the loop's thread --------------------------------------------------------------------

    async def _play(self, episode: Episode, attempt: int, thread: LoopThread) -> None:
        def forget(turn: Turn) -> None:
            if attempt == episode.attempt:
                episode.forgotten.append(turn)

        policy = _Policy(lambda *asked: self._ask(episode, attempt, thread, *asked), forget)
        outcome: Outcome
        try:
            value = await episode.environment.rollout(episode.task, policy)
            if not policy.asked:
                raise ScoringError("its conversation ended before the first turn")
            outcome = to_reward(value) if episode.rewarded else Reward(0.0)
        except ScoringError as error:
            outcome = error
        except BaseException as error:  # nothing that it raises is the user's: see `foreign_code`
            outcome = ScoringError(describe(error))
        with self._changed:
            if attempt == episode.attempt:
                episode.outcome, episode.asked = outcome, None
                self._changed.notify()

    async def _ask(
        self,
        episode: Episode,
        attempt: int,
        thread: LoopThread,
        question: Question,
        before: int,
    ) -> Turn:
        with self._changed:
            if attempt != episode.attempt or asyncio.get_running_loop() is not thread.loop:
                raise ScoringError("its conversation has ended")
            if before >= MOST_TURNS:
                raise ScoringError(f"it has not ended after {MOST_TURNS} turns")
            if episode.asked is not None:
                raise ScoringError("it asked for an answer while it waited for another")
            if before < len(episode.turns):
                return _repeated(episode, before, question)
            future: asyncio.Future[Turn] = thread.loop.create_future()

            def resolve(turn: Turn | RefusedError) -> None:
                if future.done():
                    return
                if isinstance(turn, Turn):
                    future.set_result(turn)
                else:
                    future.set_exception(turn)

            assert episode.clock is not None
            episode.spent += episode.clock.seconds()
            episode.asked = question
            episode.answer = lambda turn: thread.call(resolve, turn)
            self._changed.notify()
        try:
            return await future
        except asyncio.CancelledError:
            with self._changed:
                if attempt == episode.attempt:
                    _take_back(episode, question)
                    self._changed.notify()
            raise


class _Policy:
    """See `Policy`."""

    def __init__(
        self, ask: Callable[[Question, int], Awaitable[Turn]], forget: Callable[[Turn], object]
    ) -> None:
        self._ask, self._forget = ask, forget
        self.asked = 0

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Turn:
        check_messages(messages, "a conversation")
        copied = [copy.deepcopy(dict(message)) for message in messages]
        if not copied:
            raise TypeError("a conversation has no messages")
        question = Question(copied, copy.deepcopy([*tools]), max_tokens, tuple(stop))
        self.asked += 1
        return await self._ask(question, self.asked - 1)

    def forget(self, turn: Turn) -> None:
        self._forget(turn)


def _repeated(episode: Episode, before: int, asked: Question) -> Turn:
    """The answer that an earlier start has had."""
    question, turn = episode.turns[before]
    if question != asked:
        raise ScoringError(
            "another conversation blocked the environment, and this one did not repeat itself"
        )
    if isinstance(turn, RefusedError):
        raise turn
    return turn


def _take_back(episode: Episode, question: Question) -> None:
    """Forget a question that the environment waits for no more, or the answer to it."""
    if episode.asked is question:
        episode.asked = None
        if episode.clock is not None:
            episode.clock.restart()  # the time in which it waited does not count
    for asked, turn in episode.turns:
        if asked is question and isinstance(turn, Turn):
            episode.forgotten.append(turn)


def _limits(episode: Episode) -> list[tuple[float, str]]:
    """Seconds left of each time limit, and the message if none are left."""
    environment = episode.environment
    seconds = 0.0 if episode.clock is None else episode.clock.seconds()
    turn, whole = environment.turn_timeout, environment.episode_timeout
    return [
        (turn - seconds, f"it took longer than turn_timeout = {turn:g} s, and was stopped"),
        (
            whole - episode.spent - seconds,
            f"it took longer than episode_timeout = {whole:g} s, and was stopped",
        ),
    ]
