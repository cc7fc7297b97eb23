"""An id of another class than str holds code: it is made plain where a task enters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from support import raising

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.protocol import Environment, take_tasks
from minidistill.envs.registry import load_environments
from minidistill.errors import UserError
from minidistill.types import Message, Task

MESSAGES = ({"role": "user", "content": "Hello"},)


def load(place: str = "") -> Environment:
    config = EnvConfig(id="support.raising:load", args={"place": place}, score_timeout="off")
    return load_environments([config], "orchestrator.env")[config.name]


def fail(*arguments: Any) -> NoReturn:
    raise SystemExit("read")


class Code(str):
    __slots__ = ()
    __str__ = __repr__ = __hash__ = __eq__ = __format__ = fail  # type: ignore[assignment]


class Number(int):
    __str__ = __repr__ = __hash__ = __eq__ = __format__ = fail  # type: ignore[assignment]


class Level(IntEnum):
    FIRST = 7


@dataclass(frozen=True)
class Own(Task):
    extra: int = 3


class Fixed(NamedTuple):
    id: Any
    messages: tuple[Message, ...] = MESSAGES
    answer: Any = None


@pytest.fixture(params=["list", "one by one", "made together"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads a task as an environment gives it, in each of three ways."""

    def read(task: Any) -> Any:
        monkeypatch.setattr(raising, "TASKS", [task])
        if request.param == "list":
            monkeypatch.setattr(raising.Env, "train", [task])
        return take_tasks(load("make_tasks" if "made" in request.param else "").train, [0])[0]

    monkeypatch.setitem(raising.FAULTS, "exit", lambda: None)
    return read


@pytest.mark.parametrize(
    ("id", "plain"),
    [
        ("a", "a"), (7, 7), (Code("a"), "a"), (np.str_("a"), "a"), (Code("\ud800"), "\ud800"),
        (Number(7), 7), (Level.FIRST, 7),
    ],
    ids=["text", "number", "code", "numpy", "surrogate", "a number's code", "enum"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Task, Own])
def test_the_id_is_plain_and_the_rest_of_the_task_stays(
    read: Any, kind: Any, id: Any, plain: Any
) -> None:
    given = kind(id, MESSAGES, "answer")
    task = read(given)
    assert type(task) is kind
    assert type(task.id) is type(plain)
    assert task.id == plain
    assert (task.messages, task.answer) == (MESSAGES, "answer")
    assert getattr(task, "extra", 3) == 3
    assert (task is given) == (id in ("a", 7) if type(id) in (str, int) else False)


def test_a_task_whose_id_cannot_be_replaced_is_refused_with_the_environments_name(
    read: Any,
) -> None:
    assert read(Fixed("a")) == Fixed("a")
    with pytest.raises(UserError, match=r"support\.raising:load.*AttributeError") as caught:
        read(Fixed(Code("a")))
    assert caught.value.where == "orchestrator.env.0"


def test_an_id_that_is_read_with_an_error_is_refused(read: Any) -> None:
    class Late:
        messages, answer = MESSAGES, None

        @property
        def id(self) -> str:
            raise SystemExit(0)

    with pytest.raises(UserError, match=r"support\.raising:load.*sys\.exit\(0\)"):
        read(Late())
