"""The arguments of `self-prompts`, and the environment over the file that they lead to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minidistill.envs import jsonl
from minidistill.envs.arguments import require_argument
from minidistill.envs.jsonl import JsonlEnv
from minidistill.envs.rewards import build

ID = "self-prompts"
CONTEXT = "context"
"""Of `topics`: the subject is the teacher's context."""
COUNT, TEMPERATURE, MAX_TOKENS = 256, 0.8, 128


@dataclass(frozen=True, slots=True)
class Settings:
    """How the prompts are sampled. With the model and its template it decides what they are."""

    count: int
    """Prompts in both splits together."""
    at_least: int
    """How many are enough if the model repeats itself before it has written `count`."""
    temperature: float
    max_tokens: int
    """A text that has not ended by then is left out."""
    seed: int
    topics: tuple[str, ...]
    """What the user's turns are about, in turn; empty for anything."""
    about_context: bool
    """The user's turns are those that the model expects with the context in its system message."""

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Settings:
        """The settings among the arguments of `load`. Raises UserError for values out of range."""
        count, max_tokens = args.get("count", COUNT), args.get("max_tokens", MAX_TOKENS)
        at_least = count if args.get("at_least") is None else args["at_least"]
        temperature, seed = args.get("temperature", TEMPERATURE), args.get("seed", 0)
        topics, whole = args.get("topics"), "use a whole number above"
        _require(_is_whole(count) and count > 1, "count", count, f"{whole} 1")
        enough = _is_whole(at_least) and 1 < at_least <= count
        _require(enough, "at_least", at_least, f"{whole} 1, and at most count")
        _require(_is_whole(max_tokens) and max_tokens > 0, "max_tokens", max_tokens, f"{whole} 0")
        _require(_is_whole(seed), "seed", seed, "use a whole number")
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        usable = is_number and math.isfinite(temperature) and temperature > 0
        _require(usable, "temperature", temperature, "use a number above 0: greedy texts are equal")
        about_context = topics == CONTEXT
        texts = () if topics is None or about_context else topics
        listed = isinstance(texts, list | tuple) and all(isinstance(t, str) and t for t in texts)
        fix = f'use a list of texts, or "{CONTEXT}" for the subject of the context'
        _require(listed and (topics is None or len(topics) > 0), "topics", topics, fix)
        found = float(temperature), max_tokens, seed, tuple(texts), about_context
        return cls(count, at_least, *found)


def load(
    path: str | None = None,
    count: int = COUNT,
    at_least: int | None = None,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
    topics: list[str] | str | None = None,
    reward: str | dict[str, Any] | None = None,
    num_eval_examples: int | None = None,
    seed: int = 0,
) -> JsonlEnv:
    """The environment over the file `path` of prompts, which the run has sampled.

    `count`, `at_least`, `temperature`, `max_tokens`, `topics` and `seed` are the settings of the
    sampling; see `Settings`. `reward`, `num_eval_examples` and `seed` are those of `jsonl`: the
    hash of a text decides whether it is held out. Before there is a file, the environment has its
    reward and no tasks. Raises UserError for an argument that it cannot use.
    """
    given: dict[str, object] = {"count": count, "at_least": at_least}
    given |= {"temperature": temperature, "max_tokens": max_tokens}
    Settings.of({**given, "topics": topics, "seed": seed})
    named = path is None or (isinstance(path, str) and path != "")
    _require(named, "path", path, "name a file, or leave path out")
    if path is None or not Path(path).expanduser().exists():
        scoring = None if reward in (None, "none") else build(reward)
        fix = "use one that needs no answer, such as length, or none"
        _require(scoring is None or not scoring.needs_answer, "reward", reward, fix)
        return JsonlEnv([], [], reward, scoring)
    return jsonl.load(path, reward=reward, num_eval_examples=num_eval_examples, seed=seed)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_require = partial(require_argument, ID, names_argument=True)
