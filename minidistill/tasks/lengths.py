"""How long a prompt may be, so that context, prompt and completion fit into a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from minidistill.config import Config
from minidistill.envs.jsonl import Line
from minidistill.errors import UserError
from minidistill.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """The longest prompt that leaves room for a completion."""

    sequence: int
    """Tokens that context, prompt and completion may have together."""
    max_tokens: int
    """Tokens of the longest completion."""
    name: str
    """What limits the sequence, for messages."""

    @classmethod
    def of(cls, config: Config, max_length: int, *, evaluation: bool = False) -> PromptLimit:
        """The limit of a run whose sequences have at most `max_length` tokens.

        Prompts of an `evaluation` also serve for the KL on held-out prompts, which samples as
        training does.
        """
        orchestrator = config.orchestrator
        max_tokens = orchestrator.sampling.max_tokens
        if evaluation and orchestrator.eval is not None:
            max_tokens = max(max_tokens, orchestrator.eval.sampling.max_tokens or 0)
        at_seq_len = max_length == config.seq_len
        name = "seq_len" if at_seq_len else "the model's longest sequence"
        return cls(max_length, max_tokens, name)

    @property
    def tokens(self) -> int:
        """The most that either view of a prompt may have."""
        return self.sequence - self.max_tokens

    def allows(self, prompt: Prompt) -> bool:
        return length(prompt) <= self.tokens

    def describe(self, prompt: Prompt) -> str:
        """Which prompt it is, its length and the limit."""
        return (
            f"context and prompt ({length(prompt)} tokens, {place(prompt)}) plus max_tokens "
            f"({self.max_tokens}) make {length(prompt) + self.max_tokens} tokens, more than "
            f"{self.name} ({self.sequence})"
        )

    def refusal(self, prompt: Prompt, others: str = "", *, dropping: bool = False) -> UserError:
        """The error for a prompt that is too long, which may say how many others are.

        With `dropping`, such prompts are left out already, and too few would be left.
        """
        fix = (
            "shorten the context or the prompt, lower orchestrator.sampling.max_tokens, or raise "
            "seq_len within the model's limit"
        )
        if not dropping:
            fix += '; orchestrator.overlong = "drop" leaves such prompts out'
        return UserError(self.describe(prompt) + others, where=place(prompt), fix=fix)


def place(prompt: Prompt) -> str:
    """Where a prompt was written: file:line, or else its environment and task."""
    task = prompt.task
    if isinstance(task, Line) and task.place:
        return task.place
    return f"task {task.id} of {prompt.env}"


def length(prompt: Prompt) -> int:
    """The tokens of the longest view of a prompt."""
    views = prompt.student_ids, prompt.teacher_ids, prompt.own_context_ids
    return max(map(len, views))
