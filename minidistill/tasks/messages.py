"""Messages as chat templates read them: with contents that are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minidistill.envs.content import text_content
from minidistill.errors import UserError
from minidistill.types import Message


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of the messages, with the text parts of a content as one text.

    Raises UserError for a part that is not text.
    """
    try:
        return [
            {key: text_content(value) if key == "content" else value for key, value in m.items()}
            for m in messages
        ]
    except ValueError as error:
        raise UserError(
            f"a message's content has parts that are not text: {error}",
            where="orchestrator.env",
            fix="give messages whose contents are text",
        ) from None
