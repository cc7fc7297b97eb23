"""HTTP requests to an OpenAI-compatible server, with time limits and repetitions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minidistill.envs.outcomes import CannotScoreError, ScoringError, describe
from minidistill.envs.rewards.arguments import check_text
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.http import (
    FIRST_WAIT,
    LONGEST_WAIT,
    REPEATED,
    BadAnswerError,
    BrokenError,
    ask,
    headers,
    hidden,
    opening,
    quoted,
    read_key,
)

if TYPE_CHECKING:
    import httpx

PATH, MODELS = "/chat/completions", "/models"
LARGEST_ANSWER = 4 << 20  # bytes
REACH_SECONDS = 10.0  # that a server gets to answer before the run
CLOSED_SECONDS = 0.2  # how often to check whether the run has ended

Answered = Callable[[int, str | ScoringError], None]


class _RepeatError(Exception):
    """A request that may succeed later, after at least `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class JudgeServer:
    """Asks a server. `body` has the fields of a request besides the messages."""

    def __init__(
        self,
        url: str,
        body: dict[str, Any],
        key: str,
        timeout: float,
        budget: float,
        concurrency: int,
    ) -> None:
        self.url, self.body, self._key = url, body, key
        self.timeout, self.budget, self.concurrency = timeout, budget, concurrency
        self._closed = False

    def ask_all(self, questions: Sequence[str], answered: Answered) -> None:
        """Ask `concurrency` questions at a time; `answered` gets each number and answer.

        If it raises, the requests in flight are cancelled. Raises CannotScoreError after `close`.
        """
        asyncio.run(self._ask_all(questions, answered))

    def check_reached(self) -> None:
        """Ask for the list of models, which costs nothing and which some servers do not have.

        Raises UserError (exit code 3) if there is no answer in time, or if the key is refused.
        """
        import httpx

        seconds = min(self.timeout, REACH_SECONDS)
        fix = "start the server, or correct url"

        async def status_of_answer() -> int:
            # a limit of httpx's is for each read: a server that sends byte after byte passes it
            async with (
                asyncio.timeout(seconds),
                self._open() as client,
                client.stream("GET", self.url + MODELS) as response,
            ):
                return response.status_code

        try:
            status = asyncio.run(status_of_answer())
        except TimeoutError:
            problem = f"no answer within {seconds:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            problem = quoted(str(error), self._key) or type(error).__name__
        else:
            if status not in (401, 403):
                return
            key = "key_env, and the key in that environment variable"
            problem = f"it refuses the key (HTTP {status})"
            fix = f"correct {key}" if self._key else "set key_env: the server asks for a key"
        raise UserError(
            f"the judge at {self.url} cannot be asked: {problem}",
            where="args.reward",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        )

    def close(self) -> None:
        self._closed = True

    def _open(self) -> httpx.AsyncClient:
        """A client, by way of the environment's proxies."""
        import httpx

        limits = httpx.Limits(max_connections=self.concurrency)
        with opening(self._key, "args.reward.url"):
            return httpx.AsyncClient(
                headers=headers(self._key), timeout=None, limits=limits, follow_redirects=False
            )

    async def _ask_all(self, questions: Sequence[str], answered: Answered) -> None:
        free = asyncio.Semaphore(self.concurrency)
        async with self._open() as client:

            async def ask(number: int) -> tuple[int, str | ScoringError]:
                async with free:
                    return number, await self._ask(client, questions[number])

            tasks = {asyncio.create_task(ask(number)) for number in range(len(questions))}
            left = tasks
            try:
                while left:
                    done, left = await asyncio.wait(
                        left, timeout=CLOSED_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        answered(*task.result())
                    if left and self._closed:
                        raise CannotScoreError("the run has ended")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: httpx.AsyncClient, question: str) -> str | ScoringError:
        """The judge's answer to one question, or why there is none within the budget."""
        now = asyncio.get_running_loop().time
        end, wait, requests = now() + self.budget, FIRST_WAIT, 0
        while True:
            requests += 1
            seconds = min(self.timeout, end - now())
            try:
                async with asyncio.timeout(seconds):
                    return await self._request(client, question)
            except ScoringError as error:
                return error
            except TimeoutError:
                reason, at_least = f"no answer within {seconds:.3g} s", 0.0
            except _RepeatError as error:
                reason, at_least = str(error), error.wait
            except Exception as error:
                return self._error(hidden(describe(error), self._key))
            pause = max(wait, at_least)
            if now() + pause >= end:
                times = f" ({requests} times in {self.budget:g} s)" if requests > 1 else ""
                return ScoringError(f"the judge at {self.url} failed{times}: {reason}", slow=True)
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _request(self, client: httpx.AsyncClient, question: str) -> str:
        """The answer to one request. Raises ScoringError or _RepeatError."""
        question = question.encode("utf-8", "replace").decode()  # no unpaired surrogates
        body = {**self.body, "messages": [{"role": "user", "content": question}]}
        try:
            answer = await ask(client, "POST", self.url + PATH, body, self._key, LARGEST_ANSWER)
        except BrokenError as error:
            raise _RepeatError(str(error)) from None
        except BadAnswerError as error:
            raise self._error(str(error)) from None
        if answer.status in REPEATED:
            raise _RepeatError(answer.message(), answer.wait)
        if answer.status != 200:
            raise self._error(answer.message())
        try:
            content = json.loads(answer.data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise self._error(f"its answer is no chat completion: {answer.beginning}")
        # of one without a score the end is shown
        return content.replace(self._key, "***") if self._key else content

    def _error(self, reason: str) -> ScoringError:
        return ScoringError(f"the judge at {self.url} failed: {reason}")


def read_judge_key(name: str | None) -> str:
    """The API key in the environment variable `name`, "" without one. Raises UserError."""
    if name is None:
        return ""
    check_text("key_env", name)
    where = "args.reward.key_env"
    key = read_key(name, where)
    if not key:
        raise UserError(
            f"the environment variable {name}, which holds the judge's API key, is not set",
            where=where,
            fix=f"export {name}=…, or leave out key_env for a server without keys",
            exit_code=EXIT_ENVIRONMENT,
        )
    return key
