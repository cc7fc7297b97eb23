"""The text of a message's content, which is a string or a list of typed parts."""

from __future__ import annotations

from typing import Any


def text_content(content: Any) -> Any:
    """A list of text parts as one string: their texts, one after the other. Others unchanged.

    Chat templates differ in what they do with parts. Each of them writes a string as it is. Raises
    ValueError, with the part's place and type, for a part that is not text.
    """
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise ValueError(f"part {index} is {kind!r}, and only text can be distilled")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"part {index} is not an object of type and text")
        texts.append(part["text"])
    return "".join(texts)
