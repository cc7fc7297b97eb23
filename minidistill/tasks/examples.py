"""Few-shot contexts: examples from a data set, never the prompt's own row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidistill.config.contexts import ExamplesConfig
from minidistill.envs.content import text_content
from minidistill.envs.jsonl import Line
from minidistill.envs.jsonl.env import read_dataset
from minidistill.envs.protocol import TasksMadeTogether
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.types import Task

_PART = re.compile(r"\{(prompt|answer)\}")


@dataclass(frozen=True, slots=True)
class Example:
    """A row of the data set."""

    question: str
    text: str


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples that prompts may have in their context."""

    rows: Sequence[Example]
    k: int
    seed: int
    per_prompt: bool

    @classmethod
    def load(
        cls, settings: ExamplesConfig, held_out: Iterable[Sequence[Task]], env: str
    ) -> Examples:
        """Read a data set, without the rows of `held_out` prompts.

        Splits that generate their tasks are not compared with it. Raises UserError for rows without
        an answer, and if there are too few.
        """
        hidden = {
            _question(task)
            for tasks in held_out
            if not isinstance(tasks, TasksMadeTogether)
            for task in tasks
        }
        rows: dict[str, Example] = {}
        for line in _read(settings, env):
            question = _question(line)
            if line.answer is None:
                what = "this example has no answer"
                raise UserError(what, line.place, "give each example an answer")
            parts = {"prompt": _shown(line), "answer": line.answer}
            text = _PART.sub(lambda mark, parts=parts: parts[mark[1]], settings.template)  # type: ignore[misc]
            if question not in hidden:  # of equal prompts, the first is an example
                rows.setdefault(question, Example(question, text))
        if len(rows) <= settings.k:
            raise UserError(
                f"{settings.path} has {len(rows)} different prompts that are not held out, too few "
                f"for {settings.k} examples besides a prompt's own row",
                where="orchestrator.env.examples",
                fix="add rows, or lower k",
            )
        return cls([*rows.values()], settings.k, settings.seed, settings.per_prompt)

    def text(self, task: Task) -> str:
        """The examples of a task's prompt. They depend on the seed and its messages alone."""
        own = _question(task)
        key = own if self.per_prompt else ""
        rng = np.random.default_rng(stable_seed(self.seed, "examples", key))
        chosen: dict[int, None] = {}
        while len(chosen) < self.k:
            index = int(rng.integers(len(self.rows)))
            if self.rows[index].question != own:
                chosen[index] = None
        return "".join(self.rows[index].text for index in chosen)


def _read(settings: ExamplesConfig, env: str) -> list[Line]:
    try:
        return read_dataset(settings.path, settings.args, f"the examples of {env}")
    except UserError as error:
        where = error.where.replace("args.", "orchestrator.env.examples.", 1)
        raise UserError(error.what, where, error.fix, error.exit_code) from None


def _question(task: Task) -> str:
    """Equal for tasks with the same messages."""
    return "\0".join(f"{m['role']}\0{_content(m)}" for m in task.messages)


def _shown(task: Task) -> str:
    """The messages' texts, which are one in most data sets."""
    return "\n".join(_content(message) for message in task.messages)


def _content(message: Any) -> str:
    return text_content(message.get("content")) or ""
