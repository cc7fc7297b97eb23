"""Calls of tools in an answer's text, as the chat templates of Hermes and Qwen have models write
them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function."""

    name: str
    arguments: Mapping[str, Any]


def parse(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls.

    They are of the functions `names`. If one cannot be read, all of the text is content, and there
    are no calls. Text between calls and after them is dropped, unless it is more than white space:
    then all is content too.
    """
    calls = []
    for match in _CALL.finditer(text):
        try:
            value = json.loads(match[1])
        except (ValueError, RecursionError):
            return text, []
        arguments = value.get("arguments", {}) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or value.get("name") not in names:
            return text, []
        calls.append(ToolCall(value["name"], arguments))
    if not calls:
        return text, []
    before, _, rest = text.partition("<tool_call>")
    if _CALL.sub("", f"<tool_call>{rest}").strip():
        return text, []
    return before.strip(), calls
