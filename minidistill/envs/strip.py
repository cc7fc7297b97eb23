"""What the student does not read of a request: the part that is to be baked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Strip:
    """Makes the student's view of messages, which the teacher reads as they are.

    "system" leaves out the messages with instructions. "context" leaves out the text of the
    context, wherever it is; a message with instructions of which nothing is left goes with it.
    """

    part: Literal["system", "context"]

    def student(self, messages: Sequence[dict[str, Any]], context: str) -> list[dict[str, Any]]:
        """The student's messages. `messages` have contents that are text."""
        if self.part == "system":
            return [message for message in messages if message["role"] not in SYSTEM_ROLES]
        texts = [context, context.strip()]  # a file ends in a line break that a program may drop
        if not texts[1]:
            return [*messages]
        kept = []
        for message in messages:
            left = {**message}
            if content := message.get("content"):
                left["content"] = _without(texts, content)
            if calls := message.get("tool_calls"):
                left["tool_calls"] = [_call_without(texts, call) for call in calls]
            gone = left != message and message["role"] in SYSTEM_ROLES
            if not (gone and not left["content"].strip()):
                kept.append(left)
        return kept


def _call_without(texts: Sequence[str], call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = _without(texts, function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}}


def _without(texts: Sequence[str], value: Any) -> Any:
    """A value of JSON without these texts."""
    match value:
        case str():
            for text in texts:
                value = value.replace(text, "")
        case dict():
            value = {key: _without(texts, each) for key, each in value.items()}
        case list():
            value = [_without(texts, each) for each in value]
    return value
