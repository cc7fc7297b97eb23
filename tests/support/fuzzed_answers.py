"""Answers of a vLLM server with one fault, drawn by a number."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from minidistill.engines.server.answers import (
    AbortedError,
    read_model,
    read_sample,
    read_scores,
)
from minidistill.system.http import Answer, BadAnswerError
from support.fake_vllm import VOCABULARY, sample

PROMPT, COMPLETION = (2, 3), (4, 5, 6)
CARDS = {"data": [{"id": "m", "max_model_len": 64}, {"id": "a", "parent": "m"}]}
JUNK = (
    None, True, False, 0, -1, 3, 10**400, -(10**20), 0.5, -0.5, math.nan, math.inf, -math.inf, "",
    "7", "\x1b[2J", "\ud800", "x" * 5000, [], [7], [[]], {}, {"7": {}}, {"error": "no"},
)  # fmt: skip


def takes(number: int) -> bool:
    """Read one answer. Returns whether it was taken; what is taken is as it must be.

    Raises AssertionError if it is not, and whatever else than a refusal reading it raises.
    """
    draw = random.Random(number)
    kind = draw.randrange(3)
    body: dict[str, Any] = {"max_tokens": 3, "prompt": [*PROMPT, *COMPLETION]}
    if kind == 1:
        body["prompt_logprobs"] = 0
    value = json.loads(json.dumps(CARDS if kind == 2 else sample(body)))
    if draw.random() < 0.8:
        value = _with_junk(value, draw)
    data = bytearray(json.dumps(value).encode())
    if draw.random() < 0.3:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.1:
        del data[draw.randrange(len(data)) :]
    answer = Answer(200, bytes(data), "a key")
    try:
        if kind == 0:
            ids, logprobs, stop = read_sample(answer, "m", 3, VOCABULARY, {1})
            assert len(ids) == len(logprobs) <= 3
            assert all(type(token) is int and 0 <= token < VOCABULARY for token in ids)
            assert all(type(p) is float and -math.inf < p < 0.01 for p in logprobs)
            assert stop in ("eos", "length")
        elif kind == 1:
            scores = read_scores(answer, "m", PROMPT, COMPLETION)
            assert len(scores) == len(COMPLETION)
            assert all(type(p) is float and -math.inf < p < 0.01 for p in scores)
        elif (model := read_model(answer)) is not None:
            assert type(model[0]) is str
            assert model[1] is None or model[1] > 0
    except AbortedError:
        return False
    except BadAnswerError as error:
        text = str(error)
        assert len(text) < 1000
        assert text.isprintable()
        return False
    return True


def _with_junk(value: Any, draw: random.Random) -> Any:
    """A copy in which a value, at any depth, is junk, missing or there twice."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(JUNK)
    if isinstance(value, dict):
        key = draw.choice([*value])
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _with_junk(value[key], draw)}
    index = draw.randrange(len(value))
    if draw.random() < 0.1:
        return value[:index] + value[index + 1 :] * draw.choice((1, 2))
    return [*value[:index], _with_junk(value[index], draw), *value[index + 1 :]]
