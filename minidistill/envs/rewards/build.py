"""From `reward` in an environment's args to the object that scores with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from minidistill.envs.outcomes import to_reward
from minidistill.envs.registry import arguments, did_you_mean, import_function, signature_of
from minidistill.envs.rewards.arguments import refusal
from minidistill.envs.rewards.json_text import Json
from minidistill.envs.rewards.judge import Judge
from minidistill.envs.rewards.text import Contains, Exact, Length, NotContains, Regex
from minidistill.types import Reward, Task

BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    "exact": Exact,
    "contains": Contains,
    "not_contains": NotContains,
    "regex": Regex,
    "length": Length,
    "json": Json,
    "judge": Judge,
}


class RewardFunction(Protocol):
    """Scores a completion. It may also have `score_all` and `close`: see `Environment`."""

    @property
    def scores_in_process(self) -> bool:
        """Whether it is quick and cannot hang, or limits its own time."""

    @property
    def needs_answer(self) -> bool:
        """Whether every task needs an `answer`."""

    def check(self, task: Task) -> None:
        """Raise ValueError if the task's answer cannot be used."""

    def score(self, task: Task, completion: str) -> Reward: ...


def build(reward: object) -> RewardFunction:
    """The reward that `reward` names: a type, a table with a `type`, or "module:function".

    Raises UserError for a type, or arguments of it, that cannot be used.
    """
    table = dict(reward) if isinstance(reward, dict) else {"type": reward}
    type = table.pop("type", None)
    if isinstance(type, str) and type in BUILT_IN:
        factory = BUILT_IN[type]
    elif isinstance(type, str) and ":" in type:
        return _function(type, table)
    else:
        close = did_you_mean(type, BUILT_IN) if isinstance(type, str) else ""
        names = ", ".join(f'"{name}"' for name in BUILT_IN)
        fix = f'{close}use one of {names}, "module:function" or "none"'
        if isinstance(reward, dict) and type is None:
            fix = f"add `type` to the table: one of {names}"
        raise refusal("", reward, fix)
    signature = inspect.signature(factory)
    try:
        signature.bind(**table)
    except TypeError as error:
        raise refusal("", reward, arguments(type, signature), str(error)) from None
    return factory(**table)


@dataclass(frozen=True, slots=True)
class _Function:
    """A function of the task and the completion."""

    function: Callable[[Task, str], Any]
    has_task = True  # as far as is known
    scores_in_process = False
    needs_answer = False

    def check(self, task: Task) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        return to_reward(self.function(task, completion))


def _function(path: str, table: dict[str, Any]) -> _Function:
    if table:
        raise refusal("", path, "a function takes no arguments; use those of the line: task.data")
    function = import_function(path, "args.reward", "reward")
    signature = signature_of(function)
    try:
        if signature is not None:
            signature.bind(None, "")
    except TypeError as error:
        raise refusal("", path, "write it as `def reward(task, completion)`", str(error)) from None
    return _Function(function)
