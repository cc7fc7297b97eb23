"""Who answers a question: the base or the trained model, with the context or without it."""

from __future__ import annotations

from dataclasses import dataclass

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.export.source import Source
from minidistill.types import Context, Role

MARKS = ("{context}", "{examples}")
"""What stands for a text that differs from task to task."""


@dataclass(frozen=True, slots=True)
class View:
    """One who answers: whose weights, and whether the context is read."""

    name: str
    role: Role
    context: bool


BASE = View("base", Role.BASE, False)
BASE_IN_CONTEXT = View("base in context", Role.BASE, True)
STUDENT = View("student", Role.STUDENT, False)
STUDENT_IN_CONTEXT = View("student in context", Role.STUDENT, True)


def find_contexts(config: Config) -> list[Context]:
    """The different contexts of a configuration that are the same for all tasks."""
    teacher, envs = config.orchestrator.teacher_model, config.orchestrator.env
    named = [("context", teacher.context)]
    named += [
        (each.name or str(i), each.context) for i, each in enumerate(teacher.contexts or (), 1)
    ]
    for env in envs:
        if env.examples is None:
            named.append((env.name, env.context or ""))
        named += [
            (f"{env.name}/{each.name or i}", each.context)
            for i, each in enumerate(env.contexts or (), 1)
        ]
    found: dict[str, Context] = {}
    for name, text in named:
        if text.strip() and not any(mark in text for mark in MARKS):
            found.setdefault(text, Context(text, name))
    return list(found.values())


def unknown_context(source: Source) -> UserError:
    return UserError(
        f"no context is known for {source.run}",
        where="--with-context",
        fix="give it with --context FILE or --context TEXT",
    )
