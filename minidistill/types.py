"""The data of a run, in the order it flows: Task → Prompt → Completion → Rollout → TokenFigures.

All are frozen; derived values are properties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Message = Mapping[str, Any]
Metrics = dict[str, float]
Advance = Callable[[int], None]
"""Progress: called with the number of units done since the last call."""
Phase = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Shows progress: `Display.phase`."""


class Role(Enum):
    """Whose weights a pass runs with."""

    STUDENT = "student"
    """The policy that is trained."""
    TEACHER = "teacher"
    """The weights that the student is to match: they score the completions, and may sample them.
    The base, the student itself, a moving average of it, or another model."""
    BASE = "base"
    """The model as it was loaded, for measuring drift. It differs from the teacher if the teacher
    is live, averaged or another model."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem of an environment: its id, the chat messages to show, and what scoring needs."""

    id: str
    messages: tuple[Message, ...]
    answer: Any = None
    context: str | None = field(default=None, kw_only=True)
    """What the teacher reads for this task alone, if there is such a text: see
    `minidistill.tasks.contexts`."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A completion's score and the named figures behind it."""

    value: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """What the teacher reads in addition to a prompt."""

    text: str
    name: str = "context"
    """For metrics and records. A context of one task has the task's id in it."""
    group: str = "context"
    """The name of the configured context that it was made from."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer of the policy in a conversation, as an environment reads it."""

    text: str
    """Without special tokens and the end of the turn."""
    truncated: bool = False
    """It was cut off at `max_tokens`. If it has no tokens, the conversation has no room left."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """The sampler's, in nats."""
    prompt_tokens: int = 0
    """How many tokens were read before it."""


@dataclass(frozen=True, slots=True)
class Question:
    """What an environment asks the policy in a conversation."""

    messages: Sequence[Message]
    """The whole conversation so far."""
    tools: Sequence[Message] = ()
    """The functions that the chat template describes, as OpenAI's API has them."""
    max_tokens: int | None = None
    """Of the answer, if it is to be shorter than the run's turns."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, without being part of its text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The two views of one task: what the student reads and what the teacher reads."""

    env: str
    task: Task
    student_text: str
    teacher_text: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    own_context_ids: tuple[int, ...] = ()
    """What the student reads with the context added; empty if that is the teacher's view. It is
    not if the teacher is another model with a chat template of its own."""
    context: Context = Context("")

    def ids(self, role: Role, *, context: bool) -> tuple[int, ...]:
        """What a role reads, with the context or without it."""
        if not context:
            return self.student_ids
        own = () if role is Role.TEACHER else self.own_context_ids
        return own or self.teacher_ids


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. What is drawn depends on its seed alone, not on the batch."""

    prompt_ids: tuple[int, ...]
    seed: int
    teacher_ids: tuple[int, ...] = ()
    """If given, the teacher scores the completion after this prompt as soon as it is sampled."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy; log-probs are then those at temperature 1."""
    top_ids: int = 0
    """How many of the most likely ids to return at each position, for estimators that need them."""


@dataclass(frozen=True, slots=True)
class Inserted:
    """Tokens of a conversation that the environment wrote: attended to, and never predicted."""

    at: int
    """How many sampled tokens come before them."""
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled token ids with the sampler's log-probs (nats, at the sampling temperature).

    That of a conversation has the tokens of all its turns. `stop` is "eos" (the end-of-sequence id
    is the last token), "length", or "stop" if a program asked to end its answer at a text.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: str
    top_ids: np.ndarray | None = None
    """The sampler's k most likely ids at each token, int array (tokens, k), if requested."""
    versions: tuple[tuple[int, int], ...] = ()
    """Pairs (first token, version of the weights that sampled from there on). Empty if the engine
    does not report versions."""
    inserted: tuple[Inserted, ...] = ()
    """What an environment wrote between the turns of a conversation, in order."""

    @property
    def sequence(self) -> tuple[int, ...]:
        """Everything after the prompt: the sampled tokens with what is inserted in its place."""
        ids: list[int] = []
        before = 0
        for inserted in self.inserted:
            ids += self.token_ids[before : inserted.at]
            ids += inserted.ids
            before = inserted.at
        return (*ids, *self.token_ids[before:])

    @property
    def sampled_at(self) -> tuple[int, ...]:
        """The place of each sampled token in the sequence."""
        places: list[int] = []
        before = shift = 0
        for inserted in self.inserted:
            places += range(before + shift, inserted.at + shift)
            before, shift = inserted.at, shift + len(inserted.ids)
        return (*places, *range(before + shift, len(self.token_ids) + shift))

    @property
    def truncated(self) -> bool:
        return self.stop == "length"

    def token_versions(self, default: int) -> list[int]:
        """The version that sampled each token; `default` if the engine reported none."""
        by_token = [default] * len(self.token_ids)
        for first, version in self.versions:
            by_token[first:] = [version] * (len(by_token) - first)
        return by_token


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """The teacher's log-probs of one completion, scored by an engine, in nats.

    `logprobs` has log q(y) of each token. `top` has log q at the completion's `top_ids`, float
    array (tokens, k), if the estimator needs it.
    """

    logprobs: Sequence[float]
    top: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One scored sample of a prompt. `reward` is None if rewards are not computed, `teacher` if the
    trainer runs the teacher itself."""

    prompt: Prompt
    sample: int
    completion: Completion
    text: str
    reward: Reward | None = None
    advantage: float = 0.0
    policy_version: int = 0
    teacher: TeacherScores | None = None
    part: int = 0
    """Its number among the samples of its conversation, which has several if a chat template cannot
    extend what it has rendered."""
    first: Prompt | None = None
    """The prompt that the conversation was drawn with, if its group is not that of `prompt`."""

    @property
    def group(self) -> Prompt:
        """The prompt whose samples are compared with each other."""
        return self.first or self.prompt

    @property
    def student_length(self) -> int:
        return len(self.prompt.student_ids) + len(self.completion.sequence)

    @property
    def teacher_length(self) -> int:
        return len(self.prompt.teacher_ids) + len(self.completion.sequence)


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """Per-token results of one rollout's loss, for metrics, the records and the terminal.

    Each is a CPU tensor with one value a completion token: fp32, log-probs and divergences in nats,
    or bool. With `π` the student, `q` the teacher and `μ` the sampler.
    """

    loss: Tensor
    logp: Tensor
    """log π(y)"""
    teacher_logp: Tensor
    """log q(y)"""
    kl: Tensor
    """KL(π‖q). If an engine scored the sampled tokens only, its estimate log π(y) - log q(y), or
    that of KL(q‖π), log q(y) - log π(y), for samples of the teacher."""
    entropy: Tensor
    """Of the student."""
    teacher_entropy: Tensor | None
    """None if an engine scored the teacher."""
    ratio: Tensor
    """π(y) / μ(y), before truncation."""
    masked: Tensor
    """bool: the ratio left the token out of the loss."""
    ratio_clipped: Tensor
    """bool: the ratio was truncated."""
    kl_clipped: Tensor
    """bool: `kl_clip` bounded the distillation term."""
