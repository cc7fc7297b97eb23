"""Rows as tasks, with an error that names the row for everything malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidistill.envs.content import text_content
from minidistill.envs.jsonl.rows import LINE, Row, Source, read_rows
from minidistill.errors import UserError
from minidistill.types import Task

ROLES = ("system", "user", "assistant")
KEYS = ("prompt", "messages", "answer", "id")
"""What a row's columns are called by default. A `context` is never taken unless it is asked for."""


@dataclass(frozen=True, slots=True)
class Line(Task):
    """A row as a task: `data` holds its other columns, `place` is where it is."""

    data: dict[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what."""

    named: Mapping[str, str] = field(default_factory=dict)
    """The column for each of `KEYS` and "context" that is called otherwise, or asked for."""
    drop_reply: bool = False
    """Whether an assistant's message at the end is removed; it is the answer of a row without."""

    def column(self, key: str) -> str | None:
        """The column of a key; None for one that is not read."""
        if key in self.named:
            return self.named[key]
        other = {"prompt": "messages", "messages": "prompt"}.get(key)
        return None if key == "context" or other in self.named else key


def read_lines(
    source: Source, columns: Columns, places: dict[str, str], prefix: str = ""
) -> list[Line]:
    """Read the tasks of a source.

    A task without an id is numbered by its row, with `prefix`. `places` maps the ids read so far
    to their places, and is updated.
    """
    lines = []
    absent = dict.fromkeys(columns.named.values())
    for row in read_rows(source):
        absent = {name: None for name in absent if name not in row.values}
        line = _line(row, columns, prefix)
        if line.id in places:
            raise UserError(
                f"the id {line.id!r} is already used at {places[line.id]}",
                where=line.place,
                fix="give each line its own id; by default it is the line's number",
            )
        places[line.id] = line.place
        lines.append(line)
    if not lines:
        is_text = source.format == "text"
        fix = "write one prompt on each line" if is_text else f"write lines of {LINE}"
        raise UserError("the file has no prompts", where=source.path, fix=fix)
    if absent:
        what = f"no row has a column {next(iter(absent))!r}"
        raise UserError(what, where=source.path, fix="correct args.columns")
    return lines


def refusal(argument: str, value: object, fix: str) -> UserError:
    """The error for an unusable argument of the environment."""
    return UserError(f"{argument} = {value!r} cannot be used", where=f"args.{argument}", fix=fix)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _line(row: Row, columns: Columns, prefix: str) -> Line:
    values, place = row.values, row.place
    names = {key: columns.column(key) for key in (*KEYS, "context")}
    messages, reply = _messages(values, names, place, columns.drop_reply)
    answer, id = (
        None if (name := names[key]) is None else values.get(name) for key in ("answer", "id")
    )
    answer = reply if answer is None else answer
    if row.typed:
        answer, id = _as_text(answer), _as_text(id)
    id = str(id) if is_int(id) else id
    of_context = names["context"]
    return Line(
        id=f"{prefix}{row.number}" if id is None else _check_text(id, _name(names, "id"), place),
        messages=tuple(messages),
        answer=None if answer is None else _check_text(answer, _name(names, "answer"), place),
        context=None if of_context is None else _context(values, of_context, place),
        data={key: value for key, value in values.items() if key not in names.values()},
        place=place,
    )


def _messages(
    values: Mapping[str, Any], names: Mapping[str, str | None], place: str, drop_reply: bool
) -> tuple[list[dict[str, str]], str | None]:
    """The messages of a row, from the one column that has them, and a reply that is dropped."""
    read = {key: name for key in ("prompt", "messages") if (name := names[key]) is not None}
    given = [key for key, name in read.items() if values.get(name) is not None]
    if len(given) != 1:
        both = [f"`{name}`" for name in read.values()]
        what = f"both {' and '.join(both)}" if given else f"neither {' nor '.join(both)}"
        fix = f"write {LINE}, or say in `columns` where they are; it has {', '.join(values)}"
        if len(both) == 1:  # `columns` names it
            what = f"no {both[0]}"
            fix = f"write one, or name another column in `columns`; it has {', '.join(values)}"
        raise UserError(what, place, fix)
    key, name, value = given[0], read[given[0]], values[read[given[0]]]
    if key == "prompt" and not isinstance(value, list):
        value = [{"role": "user", "content": _check_text(value, name, place)}]
    return _check_messages(value, name, place, drop_reply)


def _name(names: Mapping[str, str | None], key: str) -> str:
    """What a key's column is called, for messages."""
    return names[key] or key


def _as_text(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


def _context(values: Mapping[str, Any], name: str, place: str) -> str:
    """A row's context: a text, or several of which each is a paragraph."""
    value = values.get(name)
    if value is None:
        fix = f"write its context, or correct the column's name; it has {', '.join(values)}"
        raise UserError(f"the row has no `{name}`", place, fix)
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise UserError(f"`{name}` is empty", place, "write a text, or remove the row")
    return "\n\n".join(_check_text(text, name, place) for text in texts)


def _check_messages(
    messages: object, name: str, place: str, drop_reply: bool
) -> tuple[list[dict[str, str]], str | None]:
    """The messages, with the text parts of a content as one string, and a reply that is dropped."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a cell of a CSV file
        try:
            messages = json.loads(messages)
        except ValueError as error:
            what = f"`{name}` is not a list of messages as JSON: {error}"
            raise UserError(what, place, f"write {LINE}") from None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"`{name}` is not a list of messages", place, f"write {LINE}")
    plain = []
    for index, message in enumerate(messages):
        part = f"{name}[{index}]"
        if isinstance(message, dict):  # a data set's messages have the same keys, used or not
            message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            fix = "give each message these two keys and no other"
            raise UserError(f"`{part}` is not an object of role and content", place, fix)
        if message["role"] not in ROLES:
            fix = f"use one of {', '.join(ROLES)}"
            raise UserError(f"`{part}` has the role {message['role']!r}", place, fix)
        plain.append({"role": message["role"], "content": _content(message, part, place)})
    reply = None
    if drop_reply and plain[-1]["role"] == "assistant":
        reply = plain.pop()["content"]
    if not plain or plain[-1]["role"] != "user":
        fix = "remove what follows the last user message; put an answer into `answer`, or set "
        fix += "drop_reply = true"
        raise UserError(f"`{name}` does not end with a user message", place, fix)
    return plain, reply


def _content(message: dict[str, Any], name: str, place: str) -> str:
    try:
        content = text_content(message["content"])
    except ValueError as error:
        fix = 'write the content as text, or as parts {"type": "text", "text": "…"}'
        raise UserError(f"`{name}.content`: {error}", place, fix) from None
    return _check_text(content, f"{name}.content", place)


def _check_text(value: object, name: str, place: str) -> str:
    """Return `value`, or raise UserError unless it is text, not blank, and encodes as UTF-8."""
    if not isinstance(value, str):
        shown = json.dumps(value, default=lambda other: type(other).__name__)[:40]
        what = f"`{name}` is {shown}, not text"
        raise UserError(what, place, "put it between quotation marks")
    if not value.strip():
        raise UserError(f"`{name}` is empty", place, "write a text, or remove the line")
    if any("\ud800" <= char <= "\udfff" for char in value):
        what = f"`{name}` has an unpaired surrogate"
        raise UserError(what, place, "write the character itself")
    return value
