"""Which context the teacher reads with a prompt.

It is the environment's, or else the teacher's. If there are several, one is drawn for each prompt
and step. A task may have a context of its own, and there may be examples from a data set: they
stand where `{context}` and `{examples}` are in the text, or else at its end. What is drawn depends
on the seed, the step and the task alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from minidistill.config import Config
from minidistill.config.contexts import ContextConfig
from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.protocol import Environment
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.tasks.examples import Examples
from minidistill.types import Context, Task

_MARK = re.compile(r"\{(context|examples)\}")


@dataclass(frozen=True, slots=True)
class Choices:
    """The contexts of an environment's prompts."""

    contexts: Sequence[Context]
    weights: Sequence[float] = (1.0,)
    examples: Examples | None = None
    own: bool = False
    """They were written for this environment, so that a mark in them is no part of the text."""

    def every(self, env: str, task: Task, chosen: Sequence[int] | None = None) -> list[Context]:
        """All contexts that a task's prompt may have, or those with the indices `chosen`.

        Raises UserError if one cannot be made.
        """
        contexts = self.contexts if chosen is None else [self.contexts[i] for i in chosen]
        return [self._of(context, env, task) for context in contexts]

    def draw(self, seed: int, step: int, env: str, task: Task) -> Context:
        """The context of a task's prompt in a step; step 0 is for evaluations."""
        index = 0
        if len(self.contexts) > 1:
            rng = np.random.default_rng(stable_seed(seed, "context", step, env, task.id))
            ends = list(accumulate(self.weights))
            index = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
        return self._of(self.contexts[min(index, len(self.contexts) - 1)], env, task)

    def _of(self, context: Context, env: str, task: Task) -> Context:
        parts: dict[str, str] = {}
        own = getattr(task, "context", None)  # tasks of other classes may lack it
        if own is not None:
            parts["context"] = own
        if self.examples is not None:
            parts["examples"] = self.examples.text(task)
        marks = set(_MARK.findall(context.text))
        if self.own and (missing := sorted(marks - parts.keys())):
            what = "it has no context of its own" if "context" in missing else "there are none"
            raise UserError(
                f"task {task.id} of {env}: {{{missing[0]}}} is in the context, and {what}",
                where=getattr(task, "place", "") or "orchestrator.env",
                fix='name the column with args.context_column, or "examples" in its table, or '
                "remove the mark",
            )
        if not parts:
            return context
        text = _MARK.sub(lambda mark: parts.get(mark[1], mark[0]), context.text)
        text += "".join(part for key, part in parts.items() if key not in marks)
        shared = own is None and self.examples is not None and not self.examples.per_prompt
        name = context.name
        if not self.own:
            name = env if len(self.contexts) == 1 else f"{env}/{name}"
        name = name if shared else f"{name}/{task.id}"
        return Context(text, name, context.group)


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts of a run's prompts, by environment."""

    default: Choices
    """Of environments that have none of their own."""
    by_env: Mapping[str, Choices]
    seed: int = 0

    @classmethod
    def single(cls, text: str) -> Contexts:
        """The same context for every prompt."""
        return cls(Choices([Context(text)]), {})

    @classmethod
    def of(
        cls,
        config: Config,
        trained: Mapping[str, Environment],
        evaluated: Mapping[str, Environment],
    ) -> Contexts:
        """The configured contexts. Reads the data sets of examples: raises UserError for those."""
        orchestrator = config.orchestrator
        teacher, settings = orchestrator.teacher_model, orchestrator.eval
        default = _listed(teacher.contexts, "") if teacher.contexts else None
        default = default or Choices([Context(teacher.context)])
        held_out = [env.eval for env in (*trained.values(), *evaluated.values())]
        by_env: dict[str, Choices] = {}
        eval_envs = settings.env if settings is not None and settings.env else []
        for env in (*eval_envs, *orchestrator.env):  # of equal names, that of training counts
            examples = None
            if env.examples is not None:
                examples = Examples.load(env.examples, held_out, env.name)
            choices = _own(env)
            if choices is not None or examples is not None:
                base = choices or (default if default.contexts[0].text else _EMPTY)
                own = choices is not None
                by_env[env.name] = Choices(base.contexts, base.weights, examples, own)
        return cls(default, by_env, config.seed)

    @property
    def are_drawn(self) -> bool:
        """Whether a prompt has another context in another step."""
        return any(len(c.contexts) > 1 for c in (self.default, *self.by_env.values()))

    def every(self, env: str, task: Task, chosen: Sequence[int] | None = None) -> list[Context]:
        """All contexts that a task's prompt may have, or those with these indices."""
        return self.by_env.get(env, self.default).every(env, task, chosen)

    def draw(self, env: str, task: Task, step: int = 0) -> Context:
        """The context of a task's prompt in a step; step 0 is for evaluations."""
        return self.by_env.get(env, self.default).draw(self.seed, step, env, task)


_EMPTY = Choices([Context("", "examples", "examples")])


def _own(env: EnvConfig) -> Choices | None:
    """What the table of an environment says; None if it says nothing."""
    if env.contexts:
        return _listed(env.contexts, f"{env.name}/")
    if env.brings_context:
        return Choices([Context("", env.name, env.name)])
    if env.context is None:
        return None
    return Choices([Context(env.context, env.name, env.name)])


def _listed(contexts: Sequence[ContextConfig], prefix: str) -> Choices:
    names = [f"{prefix}{c.name or i}" for i, c in enumerate(contexts, start=1)]
    made = [Context(c.context, name, name) for c, name in zip(contexts, names, strict=True)]
    return Choices(made, [c.weight for c in contexts])
