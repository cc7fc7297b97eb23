"""Questions that have nothing to do with a run's tasks, for measuring drift."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Context, Prompt, Task

DRIFT_TOKENS = 32  # longest completion on an unrelated prompt
UNRELATED = (
    "Say hello.",
    "What color is the sky?",
    "Name a fruit.",
    "How many days are in a week?",
    "What do bees make?",
    "Write a short poem about the sea.",
    "What is the opposite of hot?",
    "Tell me about cats.",
    "What is two plus two?",
    "Give me some advice.",
    "What season comes after winter?",
    "How do plants grow?",
    "Name three animals.",
    "What is a book?",
    "Recommend a drink.",
    "Say good night.",
)


def unrelated_prompts(
    builder: PromptBuilder, contexts: Sequence[Context] = (Context(""),)
) -> list[Prompt]:
    """Both views of the questions: without a context, and with one of these in turn."""
    tasks = (Task(str(i), ({"role": "user", "content": q},)) for i, q in enumerate(UNRELATED))
    return [
        builder.build("unrelated", task, context=context)
        for task, context in zip(tasks, cycle(contexts), strict=False)
    ]
