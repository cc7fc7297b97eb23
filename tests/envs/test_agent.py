"""Programs that ask the policy: how they are started, ended, and what becomes of their faults."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agents import PROGRAM
from support.processes import MARK, left_behind, marked, new_mark, start, wait_for

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.agent import load
from minidistill.envs.episodes import Episode, EpisodeRounds
from minidistill.envs.isolated import close_environments
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import ScoringError
from minidistill.envs.registry import load_environments
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.types import Reward, Turn


class Stage:
    """Programs with a policy that says the number of the episode and of the turn."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], **args: Any) -> None:
        limits = {k: args.pop(k) for k in ("turn_timeout", "episode_timeout") if k in args}
        path = folder / "tasks.jsonl"
        held_out = [{"question": "held out"}]
        for file, values in ((path, rows), (folder / "eval.jsonl", held_out)):
            file.write_text("".join(json.dumps(row) + "\n" for row in values))
        args = {"command": PROGRAM, "path": str(path), "reward": "json", "env": [MARK], **args}
        args["eval_path"] = str(folder / "eval.jsonl")
        config = EnvConfig(id="agent", args=args, **limits)
        environment: Any = load_environments([config], "")["agent"]
        assert isinstance(environment, MultiTurnEnvironment)
        self.environment = environment
        tasks = {task.id: task for task in environment.train}
        self.episodes = [
            Episode(environment, tasks[str(i)], rewarded=True) for i in range(1, len(rows) + 1)
        ]
        self.rounds = EpisodeRounds(self.episodes)
        self.asked: list[list[int]] = []

    def play(self, patience: Any = lambda episode: None) -> list[Any]:
        try:
            while waiting := self.rounds.wait():
                self.asked.append([self.episodes.index(e) for e in waiting])
                for episode in waiting:
                    question = episode.asked
                    patience(episode)
                    if question is not None:
                        text = f"{self.episodes.index(episode)}.{len(episode.turns)}"
                        self.rounds.answer(episode, Turn(text, False, (1,), (0.0,)), question)
        finally:
            self.rounds.close()
        return [e.outcome for e in self.episodes]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    value = new_mark()
    monkeypatch.setenv(MARK, value)
    return value


def programs_of(mark: str) -> dict[int, str]:
    return {pid: text for pid, text in marked(mark).items() if "agent_program" in text}


@pytest.fixture
def staged(tmp_path: Path, mark: str) -> Iterator[Any]:
    stages: list[Stage] = []

    def make(*rows: dict[str, Any], **args: Any) -> Stage:
        stages.append(Stage(tmp_path, list(rows), **args))
        return stages[-1]

    yield make
    close_environments([stage.environment for stage in stages])
    assert not {p: c for p, c in left_behind(mark).items() if p != os.getpid()}


def error(outcome: Any) -> ScoringError:
    assert isinstance(outcome, ScoringError)
    return outcome


def test_programs_run_at_once(staged: Any) -> None:
    stage = staged(*[{"question": f"Q{i}", "turns": 2} for i in range(6)], turn_timeout=120)
    assert all(isinstance(outcome, Reward) for outcome in stage.play())
    assert stage.asked == [list(range(6))] * 2
    for number, episode in enumerate(stage.episodes):
        first, second = (question.messages for question, _ in episode.turns)
        assert first[1] == {"role": "user", "content": f"Q{number}"}
        assert second[2] == {"role": "assistant", "content": f"{number}.0"}


@pytest.mark.parametrize(
    ("do", "args", "kind", "said"),
    [
        ("silent", {}, "crashed", "without a request"),
        ("crash", {}, "crashed", "exit code 1; last output: it is broken"),
        ("flood", {"max_output": 1 << 20}, "flooded", "more than 1048576 bytes"),
        ("fork", {"max_processes": 20}, "processes", "more than 20 (max_processes)"),
        ("memory", {"max_memory": 0.1}, "memory", "more than 0.1 (max_memory)"),
        ("insist", {"max_requests": 3}, "requests", "more than 3 answers"),
        ("hang", {"turn_timeout": 0.6}, "timed_out", "turn_timeout = 0.6 s"),
    ],
)
def test_a_program_that_fails_is_ended_with_all_it_has_started(
    staged: Any, mark: str, do: str, args: dict[str, Any], kind: str, said: str
) -> None:
    stage = staged({"question": "Q", "do": do}, {"question": "Q2"}, **args)
    failed, other = stage.play()
    assert said in str(error(failed))
    assert error(failed).kind == kind
    assert isinstance(other, Reward)
    wait_for(lambda: not programs_of(mark), 10)


def test_what_a_program_leaves_behind_is_ended_with_it(staged: Any, mark: str) -> None:
    stage = staged({"question": "Q", "do": "leave"})
    seen: list[int] = []
    assert isinstance(stage.play(lambda _: seen.append(len(marked(mark))))[0], Reward)
    assert seen[0] >= 3  # the supervisor, the program, and what has no parent any more
    assert not {p for p in marked(mark) if p != os.getpid()}


def test_programs_end_with_the_rounds(staged: Any, mark: str) -> None:
    """As after Ctrl-C, which is raised in the thread that waits."""
    stage = staged({"question": "Q", "do": "hang"}, {"question": "Q2", "do": "hang"})

    def interrupt(episode: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.play(interrupt)
    stage.environment.close()
    assert not programs_of(mark)


def test_a_request_that_its_program_gives_up_and_repeats(staged: Any) -> None:
    """The first answer, which nobody has read, is forgotten; an equal one that was read is not."""
    stage = staged({"question": "Q", "do": "retry"})

    def late(episode: Any) -> None:
        if not episode.turns:
            gone = episode.clock.seconds() + 0.2
            wait_for(lambda: episode.clock.seconds() > gone)

    assert isinstance(stage.play(late)[0], Reward)
    [episode] = stage.episodes
    turns = [turn for _, turn in episode.turns]
    assert len(turns) == 3
    assert episode.forgotten == [turns[0]]
    assert len({json.dumps(question.messages) for question, _ in episode.turns}) == 1


def test_an_answer_to_a_program_that_has_ended_is_forgotten(staged: Any) -> None:
    stage = staged({"question": "Q", "do": "abandon"})

    def late(episode: Any) -> None:
        if episode.turns:
            wait_for(lambda: episode.outcome is not None)

    stage.play(late)
    [episode] = stage.episodes
    assert isinstance(episode.outcome, (Reward, ScoringError))
    assert [turn.text for turn in episode.forgotten] == ["0.1"]


def test_several_answers_to_one_request(staged: Any) -> None:
    stage = staged({"question": "Q", "n": 3})
    assert isinstance(stage.play()[0], Reward)
    assert stage.asked == [[0]] * 3


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("", "is no JSON"),
        ("[1]", "no object"),
        ('{"reward": NaN}', "not finite"),
        ('{"reward": 1, "metrics": {"a": NaN}}', "not finite"),
        ('{"reward": "good"}', "returned"),
        ('{"reward": 1, "note": 2}', "no object of reward and metrics"),
    ],
)
def test_a_reward_that_is_none(staged: Any, last: str, said: str) -> None:
    failure = error(staged({"question": "Q", "last": last}).play()[0])
    assert said in str(failure)
    assert failure.kind == "reward"


def by_words(task: Any, messages: list[Any], output: str) -> dict[str, float]:
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == "0.0"
    return {"reward": float(task.data["worth"]), "lines": len(output.splitlines())}


def test_a_reward_of_a_function(staged: Any) -> None:
    row = {"question": "Q", "worth": 0.25, "last": "end"}
    stage = staged(row, reward="envs.test_agent:by_words")
    assert stage.play() == [Reward(0.25, {"lines": 2.0})]


def test_a_task_that_is_too_large_for_a_variable_is_a_file(staged: Any) -> None:
    question = "long " * 40_000
    stage = staged({"question": question})
    assert isinstance(stage.play()[0], Reward)
    [(asked, _)] = stage.episodes[0].turns
    assert asked.messages[1]["content"] == question


def test_a_program_gets_no_other_variables(
    staged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("WANTED", "yes")
    monkeypatch.setenv("OPENAI_API_KEY", "the user's own")
    stage = staged(
        {"question": "Q", "do": "show"},
        command=shlex.join(PROGRAM),
        cwd=str(tmp_path),
        env=[MARK, "WANTED"],
    )
    stage.play()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "SECRET_TOKEN" not in seen
    assert seen["WANTED"] == "yes"
    assert seen["OPENAI_API_KEY"] != "the user's own"
    assert seen["OPENAI_BASE_URL"].startswith("http://127.0.0.1:")
    assert json.loads(seen["MINIDISTILL_TASK"]) == {"question": "Q", "do": "show"}
    assert "127.0.0.1" in seen["NO_PROXY"]


def test_the_key_is_in_no_command_line(staged: Any, mark: str, tmp_path: Path) -> None:
    stage = staged({"question": "Q", "do": "show"}, cwd=str(tmp_path))
    commands: list[str] = []
    stage.play(lambda _: commands.extend(programs_of(mark).values()))
    key = json.loads((tmp_path / "seen.json").read_text())["OPENAI_API_KEY"]
    assert len(commands) == 2  # the program's and its supervisor's
    assert not [command for command in commands if key in command]


def test_programs_end_with_a_run_that_is_killed(tmp_path: Path, mark: str) -> None:
    """The kernel closes the sockets of the run, which their supervisors wait for."""
    for name in ("tasks", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "do": "hang"}) + "\n")
    args = str([*PROGRAM]), str(tmp_path / "tasks.jsonl"), str(tmp_path / "eval.jsonl"), str([MARK])
    code = (
        "import asyncio\n"
        "from minidistill.envs.agent import load\n"
        "from minidistill.types import Turn\n"
        "async def policy(messages, **more): return Turn('Yes.', False, (1,), (0.0,))\n"
        "policy.forget = lambda turn: None\n"
        "env = load({}, {!r}, {!r}, env={})\n"
        "asyncio.run(env.rollout(env.train[0], policy))\n"
    ).format(*args)
    run = start([sys.executable, "-c", code], as_users_do=True)
    wait_for(lambda: len(programs_of(mark)) == 3)  # the run's own command line has the name too
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not {p: c for p, c in left_behind(mark).items() if p != os.getpid()}


def test_its_first_question_is_known_without_an_answer(staged: Any, mark: str) -> None:
    stage = staged({"question": "Q"}, {"question": "Q", "do": "silent", "number": 2})
    agent = stage.environment.environment
    question = agent.first_question(stage.episodes[0].task, 30.0)
    assert [message["role"] for message in question.messages] == ["system", "user"]
    with pytest.raises(ScoringError, match="without a request"):
        agent.first_question(stage.episodes[1].task, 30.0)
    with pytest.raises(ScoringError, match="asked nothing"):
        agent.first_question(stage.episodes[0].task, 0.001)
    assert not programs_of(mark)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"command": []}, "command"),
        ({"command": "'open"}, "quote"),
        ({"strip": "user"}, "strip"),
        ({"reward": "best"}, "reward"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_memory": -1}, "max_memory"),
        ({"env": "HOME"}, "env"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match=said):
        load(**{"command": "true", "path": str(path), **args})


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    environment = load(["no-such-program"], str(path))
    with pytest.raises(UserError, match="not there") as refused:
        environment.check_ready()
    assert refused.value.exit_code == EXIT_ENVIRONMENT
    load("true", str(path)).check_ready()


def test_equal_rows_are_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(f'{{"a": {i % 4}}}\n' for i in range(12)))
    environment = load("true", str(path), num_eval_examples=3)
    rows = [{task.data["a"] for task in split} for split in (environment.train, environment.eval)]
    assert len(environment.eval) == 3
    assert not rows[0] & rows[1]
