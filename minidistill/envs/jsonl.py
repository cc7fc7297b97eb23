"""`jsonl`: a file of prompts as an environment, with or without a reward."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidistill.envs.registry import import_function
from minidistill.errors import UserError
from minidistill.types import Reward, Task

ROLES = ("system", "user", "assistant")
OWN_KEYS = {"prompt", "messages", "answer", "id"}
EVAL_SHARE = 10  # one task in ten is held out where nothing else is said
LINE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class Line(Task):
    """A line of a file as a task: `data` holds its other keys, `place` is file:line."""

    data: dict[str, Any] = field(default_factory=dict)
    place: str = ""


Scoring = Callable[[Line, str], Reward]


@dataclass(frozen=True, slots=True)
class JsonlEnv:
    """Prompts in two splits. Without a scoring function there are no rewards to weigh or show."""

    train: Sequence[Line]
    eval: Sequence[Line]
    scoring: Scoring | None

    @property
    def has_rewards(self) -> bool:
        return self.scoring is not None

    def score(self, task: Task, completion: str) -> Reward:
        """The completion's reward, 0 where there is no scoring function."""
        if self.scoring is None:
            return Reward(0.0)
        assert isinstance(task, Line)
        return self.scoring(task, completion)


def load(
    path: str,
    eval_path: str | None = None,
    reward: str | None = None,
    num_train_examples: int | None = None,
    num_eval_examples: int | None = None,
    seed: int = 0,
) -> JsonlEnv:
    """An environment from `path`, a file with a JSON object a line.

    Held-out tasks are those of `eval_path`, else `num_eval_examples` of `path` (a tenth, at least
    one). Both numbers are upper bounds, and `seed` decides which tasks they keep: a task's place
    in the file does not matter, and tasks with the same messages stay on one side (where there are
    only such groups, one group is held out, however large). `reward` is "exact", "regex",
    "module:function" or "none". Raises UserError for a file or an argument it cannot use.
    """
    for name, count in (("num_train_examples", num_train_examples),
                        ("num_eval_examples", num_eval_examples)):  # fmt: skip
        if count is not None and (not _is_int(count) or count < 1):
            raise _refusal(name, count, "use a whole number above 0")
    if not _is_int(seed):
        raise _refusal("seed", seed, "use a whole number")
    places: dict[str, str] = {}
    lines, others = _read("path", path, places), []
    if eval_path is not None:
        others = _read("eval_path", eval_path, places, prefix="eval/")
        _refuse_shared(lines, others)
    scoring = _scoring(reward, [*lines, *others])
    train, held_out = _shuffled(lines, seed), _shuffled(others, seed)[:num_eval_examples]
    if eval_path is None:
        train, held_out = _split(train, num_eval_examples, path)
    return JsonlEnv(train[:num_train_examples], held_out, scoring)


# -- reading -----------------------------------------------------------------------------------


def _read(name: str, path: object, places: dict[str, str], prefix: str = "") -> list[Line]:
    """The tasks of a file. `places` has the ids so far, with where they stand; it is added to."""
    if not isinstance(path, str) or not path:
        raise _refusal(name, path, "give a file's path as text")
    file = Path(path).expanduser()
    try:
        data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise UserError(
            f"jsonl: cannot read {path}: {getattr(error, 'strerror', None) or error}",
            where=str(file.absolute()),
            fix=f"{name} is relative to the current directory, {Path.cwd()}",
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            "jsonl: the text is not UTF-8", f"{path}:{number}", "save the file as UTF-8"
        ) from None
    lines = []
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        line = _line(row, f"{path}:{number}", f"{prefix}{number}")
        if line.id in places:
            raise UserError(
                f"jsonl: the id {line.id!r} is that of {places[line.id]} too",
                where=line.place,
                fix="give each line its own id; by default it is the line's number",
            )
        places[line.id] = line.place
        lines.append(line)
    if not lines:
        raise UserError("jsonl: the file has no prompts", where=path, fix=f"write lines of {LINE}")
    return lines


def _line(row: str, place: str, number: str) -> Line:
    try:
        found = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise UserError(f"jsonl: not JSON: {error}", place, f"write a line as {LINE}") from None
    if not isinstance(found, dict):
        raise UserError("jsonl: not a JSON object", place, f"write a line as {LINE}")
    prompt, messages = found.get("prompt"), found.get("messages")
    if (prompt is None) == (messages is None):
        what = "neither `prompt` nor" if prompt is None else "both `prompt` and"
        raise UserError(f"jsonl: {what} `messages`", place, f"write {LINE}")
    if messages is None:
        messages = [{"role": "user", "content": _text(prompt, "prompt", place)}]
    answer, id = found.get("answer"), found.get("id")
    return Line(
        id=number if id is None else _text(str(id) if _is_int(id) else id, "id", place),
        messages=tuple(_messages(messages, place)),
        answer=None if answer is None else _text(answer, "answer", place),
        data={key: value for key, value in found.items() if key not in OWN_KEYS},
        place=place,
    )


def _messages(found: object, place: str) -> list[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise UserError("jsonl: `messages` is not a list of messages", place, f"write {LINE}")
    for index, message in enumerate(found):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            fix = "give each message these two keys and no other"
            raise UserError(f"jsonl: `{name}` is not an object of role and content", place, fix)
        if message["role"] not in ROLES:
            fix = f"use one of {', '.join(ROLES)}"
            raise UserError(f"jsonl: `{name}` has the role {message['role']!r}", place, fix)
        _text(message["content"], f"{name}.content", place)
    if found[-1]["role"] != "user":
        fix = "leave out what follows the last user message; an answer goes into `answer`"
        raise UserError("jsonl: `messages` does not end with a user's message", place, fix)
    return found


def _text(value: object, name: str, place: str) -> str:
    """`value`, refused unless it is text that says something and can be written down."""
    if not isinstance(value, str):
        raise UserError(f"jsonl: `{name}` is {json.dumps(value)[:40]}, not text", place,
                        "put it between quotation marks")  # fmt: skip
    if not value.strip():
        raise UserError(f"jsonl: `{name}` is empty", place, "write a text, or remove the line")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(f"jsonl: `{name}` has half of a surrogate pair", place,
                        "write the character itself")  # fmt: skip
    return value


# -- splitting ---------------------------------------------------------------------------------


def _shuffled(lines: Sequence[Line], seed: int) -> list[Line]:
    """In an order that the seed and the messages decide, not the file."""
    return sorted(
        lines, key=lambda line: hashlib.blake2b(f"{seed}/{_same(line)}".encode()).digest()
    )


def _same(task: Line) -> str:
    """Equal for tasks that show the model the same."""
    return json.dumps([[m["role"], m["content"]] for m in task.messages])


def _split(lines: Sequence[Line], count: int | None, path: str) -> tuple[list[Line], list[Line]]:
    """Training and held-out tasks: of the latter `count`, where groups of equal messages add up
    to that, else less."""
    wanted = max(1, len(lines) // EVAL_SHARE) if count is None else count
    groups: dict[str, list[Line]] = {}
    for task in lines:
        groups.setdefault(_same(task), []).append(task)
    held_out: list[Line] = []
    for group in groups.values():
        if len(held_out) + len(group) <= wanted:
            held_out += group
    # every prompt is there more often than that: one of them whole
    held_out = held_out or min(groups.values(), key=len)
    ids = {task.id for task in held_out}
    train = [task for task in lines if task.id not in ids]
    if not train:
        raise UserError(
            f"jsonl: holding out {len(held_out)} of {len(lines)} tasks ({len(groups)} different "
            "prompts) leaves none to train on",
            where=path,
            fix="add prompts, lower num_eval_examples, or give held-out ones in eval_path",
        )
    return train, held_out


def _refuse_shared(train: Sequence[Line], held_out: Sequence[Line]) -> None:
    seen = {_same(task): task.place for task in reversed(train)}
    for task in held_out:
        if (place := seen.get(_same(task))) is not None:
            raise UserError(
                f"jsonl: this held-out prompt is trained on too, at {place}",
                where=task.place,
                fix="remove one of the two lines",
            )


# -- rewards -----------------------------------------------------------------------------------


def _scoring(reward: object, lines: Sequence[Line]) -> Scoring | None:
    if reward is None or reward == "none":
        return None
    if reward == "exact":
        _need_answers(reward, lines)
        return lambda task, text: Reward(float(text.strip() == task.answer.strip()))
    if reward == "regex":
        _need_answers(reward, lines)
        patterns = {line.answer: _pattern(line) for line in lines}
        return lambda task, text: Reward(float(bool(patterns[task.answer].search(text))))
    if isinstance(reward, str) and ":" in reward:
        function = import_function(reward, "args.reward", "reward")
        return lambda task, text: _as_reward(function(task, text))
    raise _refusal("reward", reward, 'use "none", "exact", "regex" or "module:function"')


def _need_answers(reward: object, lines: Sequence[Line]) -> None:
    for line in lines:
        if line.answer is None:
            raise UserError(
                f'jsonl: reward = "{reward}" needs an `answer`, and this line has none',
                where=line.place,
                fix="add it to every line, or leave `reward` out",
            )


def _pattern(line: Line) -> re.Pattern[str]:
    try:
        return re.compile(line.answer)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"jsonl: the answer {line.answer!r} is no regular expression: {error}",
            where=line.place,
            fix='mend the pattern, or use reward = "exact"',
        ) from None


def _as_reward(value: Any) -> Reward:
    return value if isinstance(value, Reward) else Reward(float(value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusal(name: str, value: object, fix: str) -> UserError:
    return UserError(f"jsonl: {name} = {value!r} cannot be used", where=f"args.{name}", fix=fix)
