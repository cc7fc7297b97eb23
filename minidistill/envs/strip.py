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
        kept = []
        for message in messages:
            content = message.get("content")
            if content and texts[1] and texts[1] in content:
                for text in texts:
                    content = content.replace(text, "")
                if message["role"] in SYSTEM_ROLES and not content.strip():
                    continue
                message = {**message, "content": content}
            kept.append(message)
        return kept
