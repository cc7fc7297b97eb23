"""Measuring every prompt before the first step, and leaving out those that are too long.

Prompts are rendered one at a time and not kept, so memory does not grow with their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile, zip_longest
from typing import Any, Literal

from minidistill.envs.protocol import Environment, TasksMadeTogether, take_tasks
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.tasks.lengths import PromptLimit, length
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.sampling import Fingerprint, TaskSampler
from minidistill.types import Advance, Context, Phase, Prompt, Task

logger = logging.getLogger(__name__)
GENERATED = 32
"""Prompts measured of a split that generates its tasks. Later ones are measured when drawn."""
TRIES = 64
"""Prompts that a step may draw for each of its own, until all of them fit."""
KEPT = 32
"""Prompts, and contexts, kept for the checks of the model and for measuring drift."""

MANY = 16
"""Contexts of a prompt that are all measured. Of more, so many of the longest are."""
WHOLE = 4
"""Prompts, evenly spaced, that are measured with all contexts, however many there are."""

Overlong = Literal["refuse", "drop"]


@contextmanager
def no_progress(name: str, total: int, unit: str) -> Iterator[Advance]:
    yield lambda count: None


@dataclass(frozen=True, slots=True)
class Measured:
    """What is left of the tasks of environments when those that are too long are left out."""

    train: Mapping[str, Sequence[Task]]
    """By environment."""
    eval: Mapping[str, Sequence[Task]]
    prompts: Sequence[Prompt]
    """The first ones, for the checks of the model."""
    contexts: Sequence[tuple[int, ...]]
    """Ids that the teacher's prompts of an environment begin with, for each, and that all do. At
    least one id of each measured prompt is left over."""
    shown: Sequence[Context]
    """Different contexts of these prompts, for prompts of no environment: of each configured one
    in turn."""
    context_count: int
    """How many different contexts the measured prompts have."""
    fingerprint: str
    """Of all measured prompts: a resumed run must have the same."""


class Measurer:
    """Measures the prompts of environments, and refuses or drops those that are too long."""

    def __init__(
        self, builder: PromptBuilder, overlong: Overlong, phase: Phase = no_progress
    ) -> None:
        self.builder, self.overlong, self.phase = builder, overlong, phase

    def measure(
        self, environments: Mapping[str, Environment], train: PromptLimit, evaluation: PromptLimit
    ) -> Measured:
        """Measure both splits of each environment. Raises UserError."""
        digest = Fingerprint(environments)
        splits: tuple[dict[str, Sequence[Task]], dict[str, Sequence[Task]]] = ({}, {})
        kept: list[Prompt] = []
        contexts: dict[tuple[str, str], tuple[int, ...]] = {}
        different: set[int] = set()
        shown: dict[str, dict[str, Context]] = {}

        def take(prompt: Prompt, fits: bool) -> None:
            digest.add(prompt)
            if fits:
                ids, context = prompt.teacher_ids[:-1], prompt.context
                group = prompt.env, context.group
                contexts[group] = _common(contexts.get(group, ids), ids)
                if context.text:
                    different.add(stable_seed(context.text))
                    of_group = shown.setdefault(context.group, {})
                    if len(of_group) < KEPT:
                        of_group.setdefault(context.text, context)
            if fits and len(kept) < KEPT:
                kept.append(prompt)

        for name, environment in environments.items():
            splits[0][name] = self.fitting(name, environment.train, train, take)
            splits[1][name] = self.fitting(name, environment.eval, evaluation, take)
        known = {*contexts.values(), reduce(_common, contexts.values())}
        in_turn = zip_longest(*(contexts.values() for contexts in shown.values()))
        turns = [context for turn in in_turn for context in turn if context] or [Context("")]
        return Measured(*splits, kept, sorted(known), turns, len(different), digest.hexdigest())

    def fitting(
        self,
        env: str,
        tasks: Sequence[Task],
        limit: PromptLimit,
        take: Callable[[Prompt, bool], None] = lambda prompt, fits: None,
    ) -> Sequence[Task]:
        """The tasks of a split without overlong ones: `tasks` itself if there are none.

        A split is measured whole. Only of one that generates its tasks (`make_tasks`) the first
        ones are measured, and none is left out. If a prompt may have more than `MANY` contexts, a
        few prompts are measured with all of them, and the others with the longest. `take` is called
        with each prompt and whether it fits.

        Raises UserError if the split is empty, if prompts are refused, or if none of them fits.
        """
        refuse_empty(env, tasks)
        generated = isinstance(tasks, TasksMadeTogether)
        count = min(GENERATED, len(tasks)) if generated else len(tasks)
        overlong: list[int] = []
        first: Prompt | None = None
        longest_contexts: list[int] | None = None
        chosen = self.take(env, tasks, count) if generated else map(tasks.__getitem__, range(count))
        with self.phase(f"measure {env}", count, "prompts") as advance:
            for index, task in enumerate(chosen):
                whole = index % max(1, count // WHOLE) == 0
                prompts = self.builder.variants(env, task, None if whole else longest_contexts)
                longest = max(prompts, key=length)
                if index == 0 and len(prompts) > MANY:
                    by_length = sorted(range(len(prompts)), key=lambda i: -length(prompts[i]))
                    longest_contexts = sorted(by_length[:MANY])
                fits = limit.allows(longest)
                if not fits:
                    first = first or longest
                    overlong.append(index)
                for prompt in prompts:
                    take(prompt, fits)
                advance(1)
        if first is None:
            return tasks
        others = f"; {len(overlong)} of {count} prompts are too long" if len(overlong) > 1 else ""
        if self.overlong == "refuse" or len(overlong) == count:
            raise limit.refusal(first, others, dropping=self.overlong == "drop")
        if generated:  # replaced when they are drawn
            return tasks
        logger.warning(
            f"left out {len(overlong)} of {count} prompts of {env} that are too long, "
            f"first: {limit.describe(first)}"
        )
        return _Chosen(tasks, sorted(set(range(count)).difference(overlong)))

    def take(self, env: str, tasks: Sequence[Task], count: int) -> list[Task]:
        """The first `count` tasks of a split, which may take long to make."""
        with self.phase(f"tasks of {env}", count, "tasks") as advance:
            return take_tasks(tasks, range(count), advance)

    def fitting_prompts(
        self, prompts: Sequence[Prompt], limit: PromptLimit
    ) -> tuple[list[Prompt], int]:
        """The prompts that fit, and how many do not. Raises UserError if they are refused, or if
        none is left."""
        kept = [prompt for prompt in prompts if limit.allows(prompt)]
        if len(kept) < len(prompts) and (self.overlong == "refuse" or not kept):
            first = next(p for p in prompts if not limit.allows(p))
            others = "" if kept else f"; none of {len(prompts)} prompts fits"
            raise limit.refusal(first, others, dropping=self.overlong == "drop")
        return kept, len(prompts) - len(kept)

    def draw(
        self, tasks: TaskSampler, step: int, count: int, limit: PromptLimit
    ) -> tuple[list[Prompt], int]:
        """A step's `count` prompts, and how many were too long and have been replaced.

        Both depend on the seed and the step alone. Raises UserError if prompts are refused, or if
        too few of those that are drawn fit.
        """
        chosen = tasks.draw(step, count)
        prompts = [self.builder.build(env, task, step=step) for env, task in chosen]
        overlong: list[Prompt] = []
        attempt = 0
        while places := [i for i, prompt in enumerate(prompts) if not limit.allows(prompt)]:
            overlong += [prompts[i] for i in places]
            if self.overlong == "refuse":
                raise limit.refusal(overlong[0])
            if len(overlong) > TRIES * count:
                drawn = len(overlong) + count - len(places)
                raise limit.refusal(
                    min(overlong, key=length),
                    f". Step {step} drew {drawn} prompts, and {len(overlong)} of them are too "
                    f"long: this is the shortest, the longest has {max(map(length, overlong))} "
                    f"tokens. The step needs {count} with at most {limit.tokens}",
                    dropping=True,
                )
            others = tasks.replacements(step, attempt, [prompts[i].env for i in places])
            for i, (env, task) in zip(places, others, strict=True):
                prompts[i] = self.builder.build(env, task, step=step)
            attempt += 1
        return prompts, len(overlong)


class _Chosen(Sequence[Task]):
    """Some tasks of a split, which may make them when they are asked for."""

    def __init__(self, tasks: Sequence[Task], indices: Sequence[int]) -> None:
        self.tasks, self.indices = tasks, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[self.indices[index]]


def refuse_empty(env: str, tasks: Sequence[Task]) -> None:
    """Raise UserError if a split of the environment has no tasks."""
    if not len(tasks):
        raise UserError(
            f"the environment {env!r} has no tasks in a split",
            where="orchestrator.env",
            fix="give it at least one task for training and one for evaluation",
        )


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that both begin with."""
    if second[: len(first)] == first:
        return first
    pairs = zip(first, second, strict=False)
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
