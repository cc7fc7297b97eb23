"""Reading a file of prompts, with an error that names the line for everything malformed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidistill.envs.content import text_content
from minidistill.errors import UserError
from minidistill.system.files import InvalidJsonError, parse_json, read_text
from minidistill.types import Task

ROLES = ("system", "user", "assistant")
RESERVED_KEYS = {"prompt", "messages", "answer", "id"}
LINE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class Line(Task):
    """A line of a file as a task: `data` holds its other keys, `place` is file:line."""

    data: dict[str, Any] = field(default_factory=dict)
    place: str = ""


def read_lines(argument: str, path: object, places: dict[str, str], prefix: str = "") -> list[Line]:
    """Read the tasks of the file `path`, given as `argument` of the environment.

    A task without an id is numbered by its line, with `prefix`. `places` maps the ids read so far
    to file:line, and is updated.
    """
    if not isinstance(path, str) or not path:
        raise refusal(argument, path, "give the path of a file")
    lines = []
    file = Path(path).expanduser()
    fix = f"{argument} = {path!r} is relative to the current directory, {Path.cwd()}"
    rows = read_text(file, where=f"args.{argument}", fix=fix).split("\n")
    for number, text in enumerate(rows, start=1):
        if not text.strip():
            continue
        line = _parse_line(text, f"{path}:{number}", f"{prefix}{number}")
        if line.id in places:
            raise UserError(
                f"jsonl: the id {line.id!r} is already used at {places[line.id]}",
                where=line.place,
                fix="give each line its own id; by default it is the line's number",
            )
        places[line.id] = line.place
        lines.append(line)
    if not lines:
        raise UserError("jsonl: the file has no prompts", where=path, fix=f"write lines of {LINE}")
    return lines


def refusal(argument: str, value: object, fix: str) -> UserError:
    """The error for an unusable argument of the environment."""
    return UserError(
        f"jsonl: {argument} = {value!r} cannot be used", where=f"args.{argument}", fix=fix
    )


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_line(text: str, place: str, number: str) -> Line:
    try:
        row = parse_json(text)
    except InvalidJsonError as error:
        where = f"{place}, column {error.column}" if error.column else place
        raise UserError(f"jsonl: not JSON: {error}", where, f"write a line as {LINE}") from None
    if not isinstance(row, dict):
        raise UserError("jsonl: not a JSON object", place, f"write a line as {LINE}")
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        what = "neither `prompt` nor" if prompt is None else "both `prompt` and"
        raise UserError(f"jsonl: {what} `messages`", place, f"write {LINE}")
    if messages is None:
        messages = [{"role": "user", "content": _check_text(prompt, "prompt", place)}]
    answer, id = row.get("answer"), row.get("id")
    return Line(
        id=number if id is None else _check_text(str(id) if is_int(id) else id, "id", place),
        messages=tuple(_check_messages(messages, place)),
        answer=None if answer is None else _check_text(answer, "answer", place),
        data={key: value for key, value in row.items() if key not in RESERVED_KEYS},
        place=place,
    )


def _check_messages(messages: object, place: str) -> list[dict[str, str]]:
    """The messages, with the text parts of a content as one string."""
    if not isinstance(messages, list) or not messages:
        raise UserError("jsonl: `messages` is not a list of messages", place, f"write {LINE}")
    plain = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            fix = "give each message these two keys and no other"
            raise UserError(f"jsonl: `{name}` is not an object of role and content", place, fix)
        if message["role"] not in ROLES:
            fix = f"use one of {', '.join(ROLES)}"
            raise UserError(f"jsonl: `{name}` has the role {message['role']!r}", place, fix)
        plain.append({"role": message["role"], "content": _content(message, name, place)})
    if messages[-1]["role"] != "user":
        fix = "remove what follows the last user message; put an answer into `answer`"
        raise UserError("jsonl: `messages` does not end with a user message", place, fix)
    return plain


def _content(message: dict[str, Any], name: str, place: str) -> str:
    try:
        content = text_content(message["content"])
    except ValueError as error:
        fix = 'write the content as text, or as parts {"type": "text", "text": "…"}'
        raise UserError(f"jsonl: `{name}.content`: {error}", place, fix) from None
    return _check_text(content, f"{name}.content", place)


def _check_text(value: object, name: str, place: str) -> str:
    """Return `value`, or raise UserError unless it is text, not blank, and encodes as UTF-8."""
    if not isinstance(value, str):
        what = f"jsonl: `{name}` is {json.dumps(value)[:40]}, not text"
        raise UserError(what, place, "put it between quotation marks")
    if not value.strip():
        raise UserError(f"jsonl: `{name}` is empty", place, "write a text, or remove the line")
    if any("\ud800" <= char <= "\udfff" for char in value):
        what = f"jsonl: `{name}` has an unpaired surrogate"
        raise UserError(what, place, "write the character itself")
    return value
