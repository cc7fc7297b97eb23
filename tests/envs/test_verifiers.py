"""`verifiers`: with the real package where it is installed, and without it what needs none."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.verifiers_package import (
    INSTALLED,
    give_taskset_a_name,
    guessing,
    needs_classic,
    needs_either,
    needs_tasksets,
)

from minidistill.envs.outcomes import ScoringError
from minidistill.envs.registry import load_environment
from minidistill.envs.verifiers.reward_errors import note_errors, noted_errors, rubrics_of
from minidistill.envs.verifiers.rows import Source, plain_prompt, split_rows
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.types import Message, Reward, Turn


@pytest.fixture(autouse=True)
def _local_task_set(monkeypatch: pytest.MonkeyPatch) -> None:
    give_taskset_a_name(monkeypatch)


class Scripted:
    """A policy with prepared answers, and no room after them."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = answers, list[Any]()
        self.tools: Any = None

    async def __call__(self, messages: Sequence[Message], **options: Any) -> Turn:
        self.asked.append([dict(message) for message in messages])
        self.tools = options.get("tools")
        if len(self.asked) > len(self.answers):
            return Turn("", truncated=True)
        return Turn(self.answers[len(self.asked) - 1], token_ids=(1,), logprobs=(0.0,))

    def forget(self, turn: Turn) -> None:
        raise AssertionError("an answer was not waited for")


def play(environment: Any, number: str, *answers: str) -> tuple[Reward, Scripted]:
    [task] = [t for t in (*environment.train, *environment.eval) if t.answer == number]
    policy = Scripted(*answers)
    return asyncio.run(environment.rollout(task, policy)), policy


@needs_classic
def test_a_conversation_is_played_and_scored_by_its_rubric() -> None:
    environment = load_environment("verifiers", guessing())
    assert (len(environment.train), len(environment.eval)) == (8, 1)
    reward, policy = play(environment, "5", "2", "5")
    assert reward == Reward(2.0, {"right": 1.0, "letters": 2.0, "num_turns": 2.0})
    first = {"role": "user", "content": "Guess a number from 1 to 9. 5"}
    answer = {"role": "assistant", "content": "2"}
    hint = {"role": "user", "content": "higher than 1 letters"}
    assert policy.asked == [[first], [first, answer, hint]]
    reward, policy = play(environment, "5", "2", "3", "4", "5")
    assert (reward.value, len(policy.asked)) == (0.0, 3)  # max_turns


@needs_classic
def test_a_conversation_without_room_is_scored_as_it_is() -> None:
    environment = load_environment("verifiers", guessing())
    reward, policy = play(environment, "5", "22")
    assert len(policy.asked) == 2
    assert reward == Reward(0.0, {"right": 0.0, "letters": 2.0, "num_turns": 1.0})


@needs_classic
def test_a_single_turn_and_rows_of_their_own_for_evaluation() -> None:
    environment = load_environment("verifiers", guessing(turns=1, held_out=True))
    assert [t.answer for t in environment.eval] == ["1", "2"]
    assert [t.answer for t in environment.train] == list("3456789")
    reward, policy = play(environment, "5", "5")
    assert (reward.value, len(policy.asked)) == (2.0, 1)
    few = load_environment("verifiers", {**guessing(held_out=True), "num_train_examples": 3})
    assert len(few.train) == 3


@needs_classic
def test_swallowed_errors_of_reward_functions_are_failures_or_counted() -> None:
    args = guessing(rewards=["right", "broken"], weights=[1.0, 1.0])
    environment = load_environment("verifiers", args)
    assert play(environment, "4", "4")[0].value == 2.0
    with pytest.raises(ScoringError, match="reward function broken raised ZeroDivisionError"):
        play(environment, "3", "3")
    counting: Any = load_environment("verifiers", {**args, "reward_errors": "zero"})
    assert play(counting, "3", "3")[0].metrics["reward_errors"] == 1.0
    assert play(counting, "3", "3")[0].value == 1.0
    assert play(counting, "4", "4")[0].metrics["reward_errors"] == 0.0
    with pytest.raises(ScoringError, match="nothing raised TypeError"):
        play(load_environment("verifiers", guessing(rewards=["nothing"], weights=[1.0])), "3", "3")


@needs_classic
def test_conversations_at_once_have_their_own_errors() -> None:
    environment: Any = load_environment(
        "verifiers", guessing(rewards=["right", "broken"], weights=[1.0, 1.0])
    )
    tasks = [*environment.train, *environment.eval]

    async def together() -> list[Any]:
        games = [environment.rollout(task, Scripted(task.answer)) for task in tasks]
        return await asyncio.gather(*games, return_exceptions=True)

    outcomes = dict(zip([t.answer for t in tasks], asyncio.run(together()), strict=True))
    assert isinstance(outcomes.pop("3"), ScoringError)
    assert all(isinstance(outcome, Reward) for outcome in outcomes.values())


@needs_classic
def test_tools_are_called_and_answers_stay_as_they_were_sampled() -> None:
    environment = load_environment("verifiers", guessing(tools=True))
    call = 'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"at": 5}}\n</tool_call>'
    reward, policy = play(environment, "5", call, "5")
    assert reward.value == 2.0
    first, second = policy.asked
    assert second[:-1] == [*first, {"role": "assistant", "content": call}]
    assert (second[-1]["role"], second[-1]["content"]) == ("tool", "5 letters")
    assert policy.tools[0]["function"]["name"] == "look"
    assert set(policy.tools[0]["function"]["parameters"]["properties"]) == {"at"}
    assert play(environment, "5", "<tool_call>nothing</tool_call>")[1].asked == [first]


@needs_classic
def test_an_environment_without_rewards_is_not_scored() -> None:
    environment = load_environment("verifiers", guessing(rewards=[], weights=[]))
    assert not environment.has_rewards
    assert play(environment, "5", "5")[0] == Reward(0.0)


@needs_classic
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"rewards": ["compared"], "weights": [1.0]}, "compare the answers of a group"),
        ({"numbers": 2}, "too few different rows for evaluation"),
    ],
)
def test_what_cannot_be_played_is_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_environment("verifiers", guessing(**args))
    assert error.value.exit_code == EXIT_USAGE


@needs_classic
def test_what_the_environment_raises_is_no_reward() -> None:
    environment = load_environment("verifiers", guessing(fault="5"))
    with pytest.raises(RuntimeError, match="the number is lost"):
        play(environment, "5", "1", "5")


@needs_classic
def test_its_warnings_go_to_the_log_of_the_run(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    environment = load_environment("verifiers", guessing(rewards=["broken"], weights=[1.0]))
    with caplog.at_level(logging.DEBUG, "minidistill"), pytest.raises(ScoringError):
        play(environment, "3", "3")
    assert "Error calling reward function broken" in caplog.text
    assert not capfd.readouterr().err


@needs_tasksets
def test_a_task_set_is_played_through_an_endpoint_and_scored() -> None:
    environment = load_environment("verifiers", guessing())
    assert (len(environment.train), len(environment.eval)) == (8, 1)
    reward, policy = play(environment, "5", "2", "5")
    assert reward == Reward(2.0, {"right": 1.0, "letters": 1.0})
    system = {"role": "system", "content": "You are a guesser."}
    first = {"role": "user", "content": "Guess a number from 1 to 9. 5"}
    answer = {"role": "assistant", "content": "2"}
    hint = {"role": "user", "content": "higher than 1 letters"}
    assert policy.asked == [[system, first], [system, first, answer, hint]]
    [task] = [t for t in environment.train if t.answer == "5"]
    assert [*map(dict, task.messages)] == [system, first]
    reward, policy = play(environment, "5", "2", "33")
    assert reward == Reward(0.0, {"right": 0.0, "letters": 2.0})  # no room for a third turn
    assert len(policy.asked) == 3


@needs_tasksets
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("5", "EnvError: .*RuntimeError: the number is lost"),
        ("reward 5", "TaskError: .*RuntimeError: the reward is lost"),
    ],
)
def test_what_a_task_set_raises_is_no_reward(fault: str, words: str) -> None:
    environment = load_environment("verifiers", guessing(taskset={"fault": fault}))
    with pytest.raises(ScoringError, match=words):
        play(environment, "5", "1", "5")
    assert play(environment, "4", "4")[0].value == 2.0


@needs_either
def test_signal_handlers_are_restored() -> None:
    def handler(number: int, frame: Any) -> None:
        raise AssertionError

    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, handler) for number in numbers]
    try:
        environment = load_environment("verifiers", guessing())
        play(environment, "5", "5")
        assert [signal.getsignal(number) for number in numbers] == [handler, handler]
        with pytest.raises(UserError):
            load_environment("verifiers", guessing(no_such_argument=1))
        assert [signal.getsignal(number) for number in numbers] == [handler, handler]
    finally:
        for number, previous in zip(numbers, before, strict=True):
            signal.signal(number, previous)


@needs_either
def test_an_environment_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="'no-such-env' cannot be imported") as error:
        load_environment("verifiers", {"env": "no-such-env"})
    assert error.value.exit_code == EXIT_ENVIRONMENT


# -- without the package -----------------------------------------------------------------------


@pytest.mark.parametrize("installed", ["0.1.12", "0.5.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr("minidistill.envs.verifiers.loading.version", lambda name: installed)
    with pytest.raises(UserError, match=f"verifiers {installed} is installed") as error:
        load_environment("verifiers", {"env": "any"})
    assert error.value.exit_code == EXIT_ENVIRONMENT


@pytest.mark.skipif(bool(INSTALLED), reason="verifiers is installed")
def test_the_missing_package_is_named_with_the_extra() -> None:
    with pytest.raises(UserError, match="not installed: verifiers") as error:
        load_environment("verifiers", {"env": "any"})
    assert error.value.exit_code == EXIT_ENVIRONMENT
    assert error.value.fix == "pip install 'minidistill[verifiers]'"
    assert "verifiers" not in sys.modules


@pytest.mark.parametrize(
    "args",
    [
        {"num_train_examples": 0}, {"num_eval_examples": True}, {"seed": "one"}, {"env": ""},
        {"reward_errors": "ignore"},
    ],
)  # fmt: skip
def test_arguments_are_checked_before_the_package_is_needed(args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(args))} = ") as error:
        load_environment("verifiers", {"env": "any", **args})
    assert error.value.exit_code == EXIT_USAGE


def sources(*answers: str) -> Iterator[Source]:
    for number, answer in enumerate(answers):
        message = {"role": "user", "content": f"Say {answer}."}
        yield Source((message,), answer, {"example_id": number, "answer": answer}, number)


def test_rows_are_used_once_and_held_out_first() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    train, held_out = split_rows(sources(*letters, *letters), None, (100, 4), 0, "it")
    assert len(held_out) == 4
    assert sorted(t.answer for t in [*train, *held_out]) == list(letters)
    again = split_rows(sources(*reversed(letters)), None, (100, 4), 0, "it")
    assert {t.answer for t in again[1]} == {t.answer for t in held_out}
    other = split_rows(sources(*letters), None, (100, 4), 1, "it")
    assert {t.answer for t in other[1]} != {t.answer for t in held_out}
    most = split_rows(sources(*letters), None, (3, 100), 0, "it")
    assert tuple(map(len, most)) == (3, 5)  # one in five
    own = split_rows(sources(*letters), sources("a", "a", "c", "d"), (100, 2), 0, "it")
    assert [t.answer for t in own[1]] == ["a", "c"]
    assert [t.answer for t in own[0]] == ["b", *letters[3:]]
    assert len({t.id for split in own for t in split}) == 26
    with pytest.raises(UserError, match="it has too few different rows for training"):
        split_rows(sources("a"), sources("a"), (1, 1), 0, "it")


def test_messages_lose_the_keys_without_a_value() -> None:
    plain = {"role": "assistant", "content": "yes"}
    assert plain_prompt([{**plain, "tool_calls": None, "name": None}]) == (plain,)
    assert plain_prompt("yes?") == ({"role": "user", "content": "yes?"},)


class Rubric:
    def __init__(self, *funcs: Callable[..., Any]) -> None:
        self.funcs = list(funcs)


class Group:
    def __init__(self, *rubrics: Any) -> None:
        self.rubric, self.rubrics, self.funcs = self, rubrics, list[Any]()


def test_what_a_reward_function_raises_is_noted_where_it_is_called() -> None:
    async def later(completion: str) -> float:
        await asyncio.sleep(0)
        raise KeyError(completion)

    def wrong(completion: str, **rest: Any) -> None:
        return None

    rubric = Rubric(later, wrong, len)
    assert [*rubrics_of(Group(Group(rubric)))][-1] is rubric
    note_errors(rubric)
    note_errors(rubric)
    assert [f.__name__ for f in rubric.funcs] == ["later", "wrong", "len"]

    async def score(completion: str) -> list[str]:
        with noted_errors() as errors:
            with pytest.raises(KeyError):
                await rubric.funcs[0](completion)
            with pytest.raises(TypeError):
                rubric.funcs[1](completion)
            assert rubric.funcs[2](completion) == len(completion)
        return errors

    async def both() -> list[list[str]]:
        return await asyncio.gather(score("one"), score("two"))

    one, two = asyncio.run(both())
    assert one == [
        "the reward function later raised KeyError: 'one'",
        "the reward function wrong raised TypeError: float() argument must be a string or a real "
        "number, not 'NoneType'",
    ]
    assert two[0].endswith("KeyError: 'two'")
    with pytest.raises(TypeError):
        rubric.funcs[1]("outside")  # noted nowhere
