"""The reward `judge`: another model, served over HTTP, gives each completion a score."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minidistill.envs.content import text_content
from minidistill.envs.outcomes import Attempt, Outcome, Report, ScoringError
from minidistill.envs.rewards.arguments import (
    check_bool,
    check_count,
    check_seconds,
    check_text,
    refusal,
)
from minidistill.envs.rewards.judge_cache import ScoreCache
from minidistill.envs.rewards.judge_http import JudgeServer, read_judge_key
from minidistill.system.http import check_address
from minidistill.types import Message, Reward, Task

_PLACEHOLDER = re.compile(r"\{(prompt|completion|answer)\}")
_SCORE = re.compile(r"(?:score\s*[:=]\s*)?([+-]?\d+(?:\.\d+)?)\.?", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")  # without user and password
_RESERVED = ("model", "messages", "stream", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A score from an OpenAI-compatible server, from 0 to 1.

    `prompt` is what the judge reads; {prompt}, {completion} and {answer} in it are replaced by the
    task's messages, the completion and the task's answer. The last line of what it answers has to
    be a number in `scale` = [low, high], or "score: " and a number; or the answer is JSON with the
    key "score". Anything else is a failure. `key_env` names the environment variable with the API
    key. `body` has further fields of the request.

    A request takes up to `timeout` seconds. It is repeated, after longer and longer waits, until
    `budget` seconds have passed for this completion; up to `concurrency` completions are judged at
    a time. Scores are kept, with `cache` on disk too, and an equal question is not asked again.
    """

    url: str
    model: str
    prompt: str
    key_env: str | None = None
    scale: Sequence[float] = (0, 1)
    body: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    timeout: float = 60.0
    budget: float = 120.0
    concurrency: int = 16
    cache: bool = True
    scores_in_process = True  # within its own time limits
    _server: JudgeServer = field(init=False, repr=False)
    _scores: ScoreCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("url", "model", "prompt"):
            check_text(name, getattr(self, name))
        if not _URL.fullmatch(self.url) or not _is_address(self.url):
            fix = 'give the part before /chat/completions, like "http://localhost:8000/v1"'
            raise refusal("url", "…", fix, "not an http address without user and password")
        if "{completion}" not in self.prompt:
            raise refusal("prompt", self.prompt, "show the judge the {completion}")
        self._check_scale()
        if not isinstance(self.body, dict) or not set(self.body).isdisjoint(_RESERVED):
            fix = f"give a table of other fields than {', '.join(_RESERVED)}"
            raise refusal("body", self.body, fix)
        check_seconds("timeout", self.timeout)
        check_seconds("budget", self.budget)
        check_count("concurrency", self.concurrency)
        check_bool("cache", self.cache)
        identity = [self.url, self.model, self.prompt, list(self.scale), self.body]
        server = JudgeServer(
            self.url.rstrip("/"),
            {**self.body, "model": self.model},
            read_judge_key(self.key_env),
            self.timeout,
            self.budget,
            self.concurrency,
        )
        object.__setattr__(self, "_server", server)
        object.__setattr__(self, "_scores", ScoreCache(_hash(identity), self.cache))

    def _check_scale(self) -> None:
        scale = self.scale
        numbers = isinstance(scale, list | tuple) and len(scale) == 2
        if numbers:
            numbers = all(
                isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
                for x in scale
            )
        if not numbers or scale[0] >= scale[1]:
            raise refusal("scale", scale, "give two numbers, the lowest and the highest score")

    @property
    def needs_answer(self) -> bool:
        return "{answer}" in self.prompt

    def check(self, task: Task) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        outcomes: list[Outcome] = []
        self.score_all([Attempt(task, completion)], lambda _, outcome: outcomes.append(outcome))
        if isinstance(outcomes[0], ScoringError):
            raise outcomes[0]
        return outcomes[0]

    def score_all(self, attempts: Sequence[Attempt], report: Report) -> None:
        """Ask for the attempts that are not in the cache, each different question once."""
        asked: dict[str, list[int]] = {}  # by question
        for index, attempt in enumerate(attempts):
            question = self._question(attempt)
            score = self._scores.get(_hash(question))
            if score is None:
                asked.setdefault(question, []).append(index)
            else:
                report(index, self._reward(score))
        questions = list(asked)

        def answered(number: int, answer: str | ScoringError) -> None:
            question = questions[number]
            score = answer if isinstance(answer, ScoringError) else self._parse(answer)
            if not isinstance(score, ScoringError):
                self._scores.put(_hash(question), score)
            outcome = score if isinstance(score, ScoringError) else self._reward(score)
            for index in asked[question]:
                report(index, outcome)

        if questions:
            self._server.ask_all(questions, answered)

    def check_ready(self) -> None:
        """Raise UserError (exit code 3) if the server is not reached, or refuses the key."""
        self._server.check_reached()

    def close(self) -> None:
        """Stop asking."""
        self._server.close()

    def _question(self, attempt: Attempt) -> str:
        values = {
            "prompt": _text(attempt.task.messages),
            "completion": attempt.completion,
            "answer": attempt.task.answer,
        }
        # in one pass: what replaces a placeholder may hold others
        return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), self.prompt)

    def _parse(self, answer: str) -> float | ScoringError:
        """The judge's score in its own scale."""
        low, high = self.scale
        score = _read_score(answer)
        if score is None:
            return ScoringError(f"the judge's answer has no score: {answer.strip()[-200:]!r}")
        if not low <= score <= high:
            return ScoringError(f"the judge's score {score:g} is not from {low:g} to {high:g}")
        return score

    def _reward(self, score: float) -> Reward:
        low, high = self.scale
        return Reward((score - low) / (high - low), {"judge_score": score})


def _read_score(answer: str) -> float | None:
    """The number that the answer ends with, alone on its line, or that its JSON has."""
    lines = answer.strip().splitlines() or [""]
    if match := _SCORE.fullmatch(lines[-1].strip(" \t*_`#")):
        return float(match[1])
    try:
        value = json.loads(answer)
        score = value["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return float(score) if is_number and abs(score) < 1e300 else None


def _is_address(url: str) -> bool:
    try:
        return bool(check_address(url))
    except ValueError:
        return False


def _text(messages: Sequence[Message]) -> str:
    """The messages as the judge reads them: a single one as it is, several with their roles."""
    if len(messages) == 1:
        return str(text_content(messages[0]["content"]))
    return "\n\n".join(f"{m['role']}: {text_content(m['content'])}" for m in messages)


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
