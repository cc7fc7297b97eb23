"""A user's program that asks the student over an API: each of its runs is a conversation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.envs.agent.programs import Limits, Program, Programs
from minidistill.envs.endpoint import Endpoint
from minidistill.envs.jsonl.lines import Line
from minidistill.envs.multi_turn import Policy
from minidistill.envs.outcomes import ScoringError, to_reward
from minidistill.envs.strip import Strip
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.foreign import describe
from minidistill.system.scratch import ScratchFolder
from minidistill.types import Message, Question, Task, Turn

LARGEST_TASK = 1 << 16
"""Bytes of a task's JSON in an environment variable. The kernel takes twice that."""
# What a program gets of the run's environment variables; others hold keys that it need not have
PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH"),
)
LOCAL = "127.0.0.1,localhost"
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a program is started, and its limits."""

    command: Sequence[str]
    folder: Path | None
    """Its current directory; None is that of the run."""
    passed: Sequence[str]
    """Further environment variables of the run that it gets."""
    max_requests: int
    limits: Limits


class AgentEnvironment:
    """Starts the program for each task, with an endpoint of its own.

    `reward` is a function of the task, the last conversation and the program's output, "json" for
    the last line of its output, or None.
    """

    def __init__(
        self,
        train: Sequence[Line],
        evaluation: Sequence[Line],
        settings: Settings,
        strip: Strip,
        reward: Function | str | None,
    ) -> None:
        self.train, self.eval, self.settings = train, evaluation, settings
        self.strip, self.reward = strip, reward
        self.has_rewards = reward is not None
        self.programs = Programs(settings.limits)
        self._scratch: ScratchFolder | None = None
        self._numbers = itertools.count()

    async def rollout(self, task: Task, policy: Policy) -> Any:
        """Run the program to its end. Returns its reward, 0 without one."""
        program: list[Program] = []
        exceeded = False

        def end() -> None:
            nonlocal exceeded
            exceeded = True
            for each in program:
                each.end()

        most = self.settings.max_requests
        async with Endpoint(policy, most, end) as endpoint:
            variables, file = self._variables(task, endpoint)
            settings, output = self.settings, ""
            try:
                output = await self.programs.run(
                    settings.command, variables, settings.folder, program.append
                )
            except ScoringError:
                if not exceeded:
                    raise
            finally:
                if file is not None:
                    file.unlink(missing_ok=True)
        if exceeded:
            what = f"its program asked for more than {most} answers (max_requests)"
            raise ScoringError(what, kind="requests")
        if not endpoint.requests:
            raise ScoringError("its program ended without a request", kind="crashed")
        return await self._rewarded(task, endpoint.messages, output)

    async def _rewarded(self, task: Task, messages: list[dict[str, Any]], output: str) -> Any:
        if self.reward is None:
            return 0.0
        if isinstance(self.reward, str):
            value: Any = _last_line(output)
        else:
            value = await in_thread(self.reward, task, messages, output)
        try:
            return to_reward(value)
        except ScoringError as error:
            raise ScoringError(str(error), kind="reward") from None

    def _variables(self, task: Task, endpoint: Endpoint) -> tuple[dict[str, str], Path | None]:
        """The program's environment variables, and the file of a task that is too large for one."""
        text, file = json.dumps(_data(task)), None
        variables = self.variables()
        variables["OPENAI_BASE_URL"] = variables["OPENAI_API_BASE"] = endpoint.url
        variables["OPENAI_API_KEY"] = endpoint.key
        if len(text) <= LARGEST_TASK:
            variables["MINIDISTILL_TASK"] = text
        else:
            if self._scratch is None:
                self._scratch = ScratchFolder()
            file = self._scratch.path / f"task-{next(self._numbers)}.json"
            file.write_text(text)
            variables["MINIDISTILL_TASK_FILE"] = str(file)
        return variables, file

    def variables(self) -> dict[str, str]:
        """The environment variables that are the same for each task."""
        names = [*PASSED, *self.settings.passed]
        found = {
            name: value
            for name, value in os.environ.items()
            if name in names or name.startswith("LC_")
        }
        for name in ("NO_PROXY", "no_proxy"):  # the endpoint is on this machine
            found[name] = ",".join(filter(None, [found.get(name), LOCAL]))
        return found

    def check_ready(self) -> None:
        """Raise UserError (exit code 3) if the program is not there."""
        command, folder = self.settings.command[0], self.settings.folder
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"agent: the folder {str(folder)!r} is not there",
                where="args.cwd",
                fix="name a folder",
                exit_code=EXIT_ENVIRONMENT,
            )
        path = self.variables().get("PATH", os.defpath)
        inside = os.path.join(folder or ".", command) if os.sep in command else command
        if shutil.which(inside, path=path) is None:
            raise UserError(
                f"agent: the program {command!r} is not there or cannot be executed",
                where="args.command",
                fix="name a program in PATH, or a file that can be executed",
                exit_code=EXIT_ENVIRONMENT,
            )

    def first_question(self, task: Task, seconds: float) -> Question:
        """What the program asks first. It is ended then.

        Raises ScoringError if it asks nothing within `seconds`.
        """
        return asyncio.run(self._first_question(task, seconds))

    async def _first_question(self, task: Task, seconds: float) -> Question:
        policy = _Listening()
        playing = asyncio.ensure_future(self.rollout(task, policy))
        asked = asyncio.ensure_future(policy.asked.wait())
        await asyncio.wait([playing, asked], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        question = policy.question
        for each in (playing, asked):
            each.cancel()
        await asyncio.wait([playing, asked])
        if question is not None:
            return question
        if not playing.cancelled() and isinstance(error := playing.exception(), ScoringError):
            raise error
        raise ScoringError(f"its program asked nothing within turn_timeout = {seconds:g} s")

    def close(self) -> None:
        """End the programs that still run."""
        self.programs.close()
        if self._scratch is not None:
            self._scratch.close()


class _Listening:
    """A policy that keeps what it is asked first, and does not answer."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.question: Question | None = None

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Turn:
        self.question = Question(messages, tools, max_tokens, tuple(stop))
        self.asked.set()
        return await asyncio.get_running_loop().create_future()

    def forget(self, turn: Turn) -> None:
        """There is none."""


def _data(task: Task) -> dict[str, Any]:
    """The row of a task."""
    assert isinstance(task, Line)
    return task.data


def _last_line(output: str) -> Mapping[str, Any]:
    """The reward in the last line of a program's output."""
    lines = [line for line in output.splitlines() if line.strip()]
    example = '{"reward": 0.5, "metrics": {"steps": 3}}'

    def failure(what: str) -> ScoringError:
        text = f"the last line of its program's output {what}, such as {example}"
        return ScoringError(text, kind="reward")

    if not lines:
        raise failure("is to have the reward, and there is none")
    try:
        value = json.loads(lines[-1])
    except (ValueError, RecursionError):
        raise failure("is no JSON") from None
    if not isinstance(value, dict) or "reward" not in value or value.keys() - {"reward", "metrics"}:
        raise failure("is no object of reward and metrics")
    metrics = value.get("metrics", {})
    if not isinstance(metrics, dict) or "reward" in metrics:
        raise failure("has metrics that cannot be read")
    return {"reward": value["reward"], **metrics}


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, which may be left behind."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def resolve(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def call() -> None:
        value, error = None, None
        try:
            value = function(*arguments)
        except BaseException as raised:  # it is the function's failure, whatever it is
            error = ScoringError(f"its reward failed: {describe(raised)}", kind="reward")
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(resolve, value, error)

    threading.Thread(target=call, name="reward of an agent", daemon=True).start()
    return await future
