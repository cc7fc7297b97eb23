"""What a vLLM server may answer. Everything that is used of an answer is checked here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from minidistill.system.http import Answer, BadAnswerError, one_line

HIGHEST = 1e-3  # of a log-prob: rounding puts it above 0
LOWEST = -9999.0  # what vLLM sends for minus infinity
LONGEST_NAME = 1000  # characters of a model's name, which may be a path
T = TypeVar("T")


class NotFiniteError(BadAnswerError):
    """A log-prob is NaN or infinite: the server's model is broken."""


class AbortedError(Exception):
    """The server gave a request up, and would answer it if it is sent again."""


def read_model(answer: Answer) -> tuple[str, int | None] | None:
    """The name of the model that is no adapter, and its longest sequence if the server says it.

    None if there is no model. Raises BadAnswerError, like the functions below.
    """
    for index, card in enumerate(_field(_value(answer), "data", list)):
        place = f"data[{index}]"
        if not isinstance(card, dict):
            raise BadAnswerError(f"{place} is {_kind(card)}")
        if card.get("parent"):
            continue
        name, length = _field(card, "id", str, place), card.get("max_model_len")
        if not (name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            raise BadAnswerError(f"{place}.id is no name: {_kind(name)}")
        if length is not None and not (_is_int(length) and length > 0):
            raise BadAnswerError(f"{place}.max_model_len is {_kind(length)}")
        return name, length
    return None


def read_sample(
    answer: Answer, model: str, max_tokens: int, vocabulary: int, eos_ids: AbstractSet[int]
) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """The token ids of the answer's only choice, their log-probs, and "eos" or "length".

    `model` is the name of the model or adapter that was asked. Raises also NotFiniteError and
    AbortedError.
    """
    choice = _choice(answer, model)
    reason = choice.get("finish_reason")
    if reason == "abort":
        raise AbortedError("it aborted a request")
    if reason not in ("stop", "length"):
        raise BadAnswerError(f"finish_reason is {_kind(reason)}, not stop or length")
    ids = _field(choice, "token_ids", list, "the choice")
    _check_ids(ids, reason, max_tokens, vocabulary, eos_ids)
    logprobs = _field(
        _field(choice, "logprobs", dict, "the choice"), "token_logprobs", list, "logprobs"
    )
    if len(logprobs) != len(ids):
        raise BadAnswerError(f"it has {len(ids)} tokens and {len(logprobs)} log-probs")
    stop = "length" if reason == "length" else "eos"
    return tuple(ids), tuple(map(_logprob, logprobs)), stop


def _check_ids(
    ids: Sequence[Any], reason: str, max_tokens: int, vocabulary: int, eos_ids: AbstractSet[int]
) -> None:
    """Raise BadAnswerError unless these can be a completion that ended for this reason."""
    if not 1 <= len(ids) <= max_tokens:
        raise BadAnswerError(f"it has {len(ids)} tokens, and 1 to {max_tokens} were asked for")
    for token in ids:
        if not _is_int(token) or not 0 <= token < vocabulary:
            raise BadAnswerError(f"a token id is {_kind(token)}, not from 0 to {vocabulary - 1}")
    if not eos_ids.isdisjoint(ids[:-1]):
        raise BadAnswerError("a completion goes on after its end-of-sequence token")
    if reason == "stop" and ids[-1] not in eos_ids:
        raise BadAnswerError("a completion stops without an end-of-sequence token")
    if reason == "length" and len(ids) < max_tokens:
        raise BadAnswerError(f"it was cut off after {len(ids)} of {max_tokens} tokens")


def read_scores(
    answer: Answer, model: str, prompt: Sequence[int], completion: Sequence[int]
) -> list[float]:
    """The log-probs of the completion's tokens, which were sent after the prompt's to `model`.

    Raises also NotFiniteError.
    """
    rows = _field(_choice(answer, model), "prompt_logprobs", list, "the choice")
    if len(rows) != len(prompt) + len(completion):
        sent = len(prompt) + len(completion)
        raise BadAnswerError(f"it has log-probs of {len(rows)} tokens, and {sent} were sent")
    scores = []
    for row, token in zip(rows[len(prompt) :], completion, strict=True):
        if not isinstance(row, dict) or not isinstance(entry := row.get(str(token)), dict):
            raise BadAnswerError(f"it has no log-prob of the token {token}, which was sent")
        scores.append(_logprob(entry.get("logprob")))
    return scores


def _choice(answer: Answer, model: str) -> dict[str, Any]:
    value = _value(answer)
    if value.get("model", model) != model:
        raise BadAnswerError(f"it is of the model {_kind(value['model'])}, and {model} was asked")
    choices = _field(value, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswerError(f"it has {len(choices)} choices, and one was asked for")
    return choices[0]


def _value(answer: Answer) -> dict[str, Any]:
    value = answer.json()
    if not isinstance(value, dict):
        raise BadAnswerError(f"it is {_kind(value)}, not an object")
    if "error" in value:
        raise BadAnswerError(f"it is an error: {answer.message()}")
    return value


def _field(value: dict[str, Any], name: str, kind: type[T], place: str = "it") -> T:
    found = value.get(name)
    if not isinstance(found, kind):
        wrong = "has no" if found is None else "has a wrong"
        what = "" if found is None else f": {_kind(found)}"
        raise BadAnswerError(f"{place} {wrong} {name}{what}")
    return found


def _logprob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswerError(f"a log-prob is {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer above 1e308
        number = math.inf
    if not math.isfinite(number):
        raise NotFiniteError(f"a log-prob is {number}")
    if number <= LOWEST:
        raise NotFiniteError(f"a log-prob is {number:g}, as vLLM writes minus infinity")
    if number > HIGHEST:
        raise BadAnswerError(f"a log-prob is {number:g}, above 0")
    return number


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """A value of JSON in a message: itself if it is short, else its kind."""
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "a huge number"
    if isinstance(value, str):
        return repr(one_line(value[:60]))
    return "a list" if isinstance(value, list) else "an object"
