"""Conversations in rounds: who waits when, and what becomes of those that fail or hang."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from minidistill.envs import Policy
from minidistill.envs.episodes import MOST_TURNS, Episode, EpisodeRounds
from minidistill.envs.multi_turn import MultiTurnEnvironment, drives_turns
from minidistill.envs.outcomes import ScoringError
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.tasks.rewards import check_errors
from minidistill.types import Reward, Task, Turn

USER = {"role": "user", "content": "go on"}
FOREVER = 3600


class Script:
    """Plays three turns, and does in the second one what the task says."""

    def __init__(self) -> None:
        self.train = self.eval = [Task("0", (USER,))]
        self.release = threading.Event()
        self.started: list[str] = []
        self.cleaned: list[str] = []

    async def rollout(self, task: Task, policy: Policy) -> Any:
        self.started.append(str(task.id))
        messages: list[dict[str, Any]] = [dict(USER)]
        try:
            for number in range(3):
                turn = await policy(messages)
                if number == 1:
                    await self.act(str(task.answer), policy, messages)
                messages += [{"role": "assistant", "content": turn.text}, USER]
        finally:
            self.cleaned.append(str(task.id))
        return {"reward": math.nan if task.answer == "NaN" else 0.5, "turns": 3}

    async def act(self, what: str, policy: Policy, messages: list[dict[str, Any]]) -> None:
        match what:
            case "raise":
                raise ValueError("lost the board")
            case "exit":
                sys.exit(7)
            case "interrupt":
                raise KeyboardInterrupt
            case "task exits":
                asyncio.get_running_loop().create_task(self.exit())
            case "hang":
                await asyncio.sleep(FOREVER)
            case "cling":
                await self.cling()
            case "block":
                self.release.wait(60)
            case "ask twice":
                await asyncio.gather(policy(messages), policy(messages))
            case "no messages":
                await policy([])
            case "a number":
                await policy([{"role": "user", "content": 7}])
            case "endless":
                while True:
                    await policy(messages)

    async def exit(self) -> None:
        sys.exit(3)

    async def cling(self) -> None:
        """Does not let itself be cancelled."""
        while not self.release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue


class Stage:
    """A script and its episodes, whose answers are their numbers and turns."""

    def __init__(self, *acts: str, turn_timeout: float = 60, episode_timeout: float = 60) -> None:
        self.script = Script()
        self.environment = MultiTurnEnvironment(
            self.script, "script", turn_timeout, episode_timeout
        )
        self.episodes = [
            Episode(self.environment, Task(str(i), (USER,), act), rewarded=True)
            for i, act in enumerate(acts)
        ]
        self.asked: list[list[int]] = []

    def play(self, check: Any = lambda: None) -> list[Any]:
        rounds = EpisodeRounds(self.episodes, check)
        try:
            while waiting := rounds.wait():
                self.asked.append([self.episodes.index(e) for e in waiting])
                for episode in waiting:
                    text = f"{self.episodes.index(episode)}.{len(episode.turns)}"
                    rounds.answer(episode, Turn(text, token_ids=(1,)), episode.asked)
        finally:
            rounds.close()
        return [e.outcome for e in self.episodes]


@pytest.fixture
def staged() -> Iterator[Any]:
    stages: list[Stage] = []

    def make(*acts: str, **limits: float) -> Stage:
        stages.append(Stage(*acts, **limits))
        return stages[-1]

    yield make
    for stage in stages:
        stage.script.release.set()
        stage.environment.close()


WHOLE = Reward(0.5, {"turns": 3.0})


def test_a_round_waits_for_every_conversation(staged: Any) -> None:
    stage = staged("", "", "")
    assert stage.play() == [WHOLE] * 3
    assert stage.asked == [[0, 1, 2]] * 3
    messages = [question.messages for question, _ in stage.episodes[1].turns]
    assert [len(m) for m in messages] == [1, 3, 5]
    assert messages[2][:3] == messages[1]
    assert messages[2][3] == {"role": "assistant", "content": "1.1"}


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("raise", "ValueError: lost the board"),
        ("exit", r"sys.exit\(7\)"),
        ("interrupt", "KeyboardInterrupt"),
        ("NaN", "nan, which is not finite"),
        ("ask twice", "while it waited for another"),
        ("no messages", "has no messages"),
        ("a number", "a content that is no text"),
        ("endless", f"not ended after {MOST_TURNS} turns"),
    ],
)
def test_one_that_fails_in_its_second_turn_leaves_the_others_alone(
    staged: Any, act: str, words: str
) -> None:
    first, broken, last = staged("", act, "").play()
    assert first == last == WHOLE
    with pytest.raises(ScoringError, match=words):
        raise broken


def test_a_task_that_exits_does_not_end_the_loop(staged: Any) -> None:
    assert staged("", "task exits", "").play() == [WHOLE] * 3


@pytest.mark.parametrize("act", ["hang", "cling"])
def test_one_that_hangs_is_stopped(staged: Any, act: str) -> None:
    stage = staged("", act, "", turn_timeout=0.2)
    first, hung, last = stage.play()
    assert first == last == WHOLE
    with pytest.raises(ScoringError, match=r"longer than turn_timeout = 0\.2 s"):
        raise hung
    assert hung.slow
    assert stage.asked == [[0, 1, 2], [0, 1, 2], [0, 2]]


def test_all_turns_together_have_a_limit_too(staged: Any) -> None:
    class Slow(Script):
        async def act(self, what: str, policy: Policy, messages: Any) -> None:
            await asyncio.sleep(0.1)

    stage = staged("", turn_timeout=10, episode_timeout=0.05)
    stage.environment.environment = Slow()
    with pytest.raises(ScoringError, match=r"longer than episode_timeout = 0\.05 s"):
        raise stage.play()[0]


def test_one_that_blocks_the_loop_is_left_behind_and_the_others_go_on(staged: Any) -> None:
    """In a new loop, from their start, with the answers that they have had."""
    stage = staged("", "block", "", turn_timeout=0.3)
    first, blocked, last = stage.play()
    assert first == last == WHOLE
    with pytest.raises(ScoringError, match="longer than turn_timeout"):
        raise blocked
    assert sorted(stage.script.started) == ["0", "0", "1", "2", "2"]
    assert [turn.text for _, turn in stage.episodes[2].turns] == ["2.0", "2.1", "2.2"]


def test_one_that_does_not_repeat_itself_after_that_fails(staged: Any) -> None:
    class Changing(Script):
        async def rollout(self, task: Task, policy: Policy) -> Any:
            self.started.append(str(task.id))
            if task.answer == "change":
                await policy([{"role": "user", "content": str(len(self.started))}])
            return await super().rollout(task, policy)

    stage = staged("change", "block", turn_timeout=0.3)
    script = stage.environment.environment = Changing()
    changed, blocked = stage.play()
    script.release.set()
    assert isinstance(blocked, ScoringError)
    with pytest.raises(ScoringError, match="did not repeat itself"):
        raise changed


def test_time_of_others_in_the_loop_does_not_count(staged: Any) -> None:
    """Each of 10 conversations keeps the loop for 0.05 s in the same turn."""

    class Busy(Script):
        async def act(self, what: str, policy: Policy, messages: Any) -> None:
            threading.Event().wait(0.05)

    stage = staged(*[""] * 10, turn_timeout=0.3)
    stage.environment.environment = Busy()
    assert stage.play() == [WHOLE] * 10


def test_too_many_slow_failures_stop_at_once(staged: Any) -> None:
    stage = staged("block", "block", "block", turn_timeout=0.2)

    def check() -> None:
        errors = [str(e.outcome) for e in stage.episodes if e.outcome is not None]
        check_errors(errors, 3, 0.1)

    with pytest.raises(UserError, match="failed on 1 of 3") as caught:
        stage.play(check)
    assert caught.value.exit_code == EXIT_HEALTH


def test_a_conversation_without_a_turn_fails(staged: Any) -> None:
    class Nothing(Script):
        async def rollout(self, task: Task, policy: Policy) -> float:
            return 1.0

    stage = staged("")
    stage.environment.environment = Nothing()
    with pytest.raises(ScoringError, match="before the first turn"):
        raise stage.play()[0]


def test_what_is_left_at_an_error_is_cancelled(staged: Any) -> None:
    stage = staged("", "")
    rounds = EpisodeRounds(stage.episodes)
    assert len(rounds.wait()) == 2
    rounds.close()
    stage.environment.close()
    assert sorted(stage.script.cleaned) == ["0", "1"]


def test_which_environments_are_multi_turn() -> None:
    class Single:
        rollout = 3

        def score(self, task: Task, completion: str) -> float:
            return 0.0

    class Both(Single):
        async def rollout(self, task: Task, policy: Policy) -> float:  # type: ignore[override]
            return 0.0

    assert drives_turns(Script())
    assert drives_turns(Both())
    assert not drives_turns(Single())
