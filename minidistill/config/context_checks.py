"""Contexts and weights of environments that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from minidistill.config.contexts import ContextConfig
from minidistill.config.orchestrator import AGENT, EnvConfig
from minidistill.config.problem import Problem
from minidistill.config.schema import Config
from minidistill.config.schema_tree import Path

_TEACHER: Path = ("orchestrator", "teacher_model")
_ENV: Path = ("orchestrator", "env")
_EVAL_ENV: Path = ("orchestrator", "eval", "env")


def context_problems(config: Config) -> Iterator[Problem]:
    """The contradictions between contexts."""
    orchestrator = config.orchestrator
    teacher, evaluation = orchestrator.teacher_model, orchestrator.eval
    tables = [(_ENV, env) for env in orchestrator.env]
    evaluated = evaluation.env if evaluation is not None and evaluation.env else []
    places: list[tuple[Path, str | None, Sequence[ContextConfig] | None]] = [
        (_TEACHER, teacher.context or None, teacher.contexts)
    ]
    for path, envs in ((_ENV, orchestrator.env), (_EVAL_ENV, evaluated)):
        places += [((*path, i), env.context, env.contexts) for i, env in enumerate(envs)]
    for place, context, contexts in places:
        yield from _choices(place, context, contexts)
    for path, envs in ((_ENV, orchestrator.env), (_EVAL_ENV, evaluated)):
        for index, env in enumerate(envs):
            yield from _of_program((*path, index), env)
    has_default = bool(teacher.context.strip()) or bool(teacher.contexts)
    without = [i for i, (_, env) in enumerate(tables) if not has_default and _takes_default(env)]
    blank = all(
        env.context is not None and not env.context.strip() and env.examples is None
        for env in orchestrator.env
    )
    if without or blank:
        key = ".".join((*map(str, _TEACHER), "context"))
        what = f"{key} is empty, so there is nothing to distill"
        if without and len(without) < len(tables):
            what = f"{key} is empty, and {tables[without[0]][1].name!r} has no context of its own"
        elif not without:
            what = "the context of every environment is empty, so there is nothing to distill"
        yield Problem(
            what,
            'set context = "…" or context_file = "…" in [orchestrator.teacher_model]',
            (key,),
        )
    yield from _evaluated(orchestrator.env, evaluated)
    yield from _weights(orchestrator.env)


def _takes_default(env: EnvConfig) -> bool:
    return (
        not env.brings_context
        and env.context is None
        and env.contexts is None
        and env.examples is None
    )


def _of_program(place: Path, env: EnvConfig) -> Iterator[Problem]:
    """An agent's requests have what the teacher reads: it cannot be chosen here."""
    if env.id != AGENT:
        return
    for key in ("contexts", "examples"):
        if getattr(env, key) is not None:
            what = f"{env.name!r} has {key}, but its program decides what its requests have"
            yield Problem(what, f"remove {key}", ((*place, key),))
    if env.brings_context and env.context is not None:
        yield Problem(
            f'{env.name!r} has a context, which strip = "system" does not read',
            'set args.strip = "context", or remove it',
            ((*place, "context"),),
        )


def _choices(
    place: Path, context: str | None, contexts: Sequence[ContextConfig] | None
) -> Iterator[Problem]:
    if contexts is None:
        return
    if context is not None:
        yield Problem("both context and contexts are set", "keep one of the two", (place,))
    for index, choice in enumerate(contexts):
        if not choice.context.strip():
            what = "one of the contexts is empty"
            fix = 'set its context = "…" or context_file = "…"'
            yield Problem(what, fix, ((*place, "contexts", index),))
    names = Counter(choice.name or str(i) for i, choice in enumerate(contexts, start=1))
    for name, count in names.items():
        if count > 1:
            what = f"{count} contexts are named {name!r}"
            yield Problem(what, "give each its own `name`", ((*place, "contexts"),))


def _evaluated(trained: Sequence[EnvConfig], evaluated: Sequence[EnvConfig]) -> Iterator[Problem]:
    by_name = {env.name: env for env in trained}
    for index, env in enumerate(evaluated):
        place = (*_EVAL_ENV, index)
        if env.weight is not None:
            what = f"{env.name!r} has a weight, which is for training"
            yield Problem(what, "remove it", ((*place, "weight"),))
        other = by_name.get(env.name)
        if other is None or _takes_default(env):
            continue
        own = env.context, env.contexts, env.examples
        if own != (other.context, other.contexts, other.examples):
            what = f"{env.name!r} has other contexts in evaluation than in training"
            fix = "leave them out here: it has those of training. Or give it another `name`"
            yield Problem(what, fix, (place,))


def _weights(envs: Sequence[EnvConfig]) -> Iterator[Problem]:
    without = [index for index, env in enumerate(envs) if env.weight is None]
    if without and len(without) < len(envs):
        yield Problem(
            f"{envs[without[0]].name!r} has no weight, and other environments have one",
            "give each environment a weight, or none",
            ((*_ENV, without[0]),),
        )
