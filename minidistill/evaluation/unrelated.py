"""Questions that have nothing to do with a run's tasks, for measuring drift."""

from __future__ import annotations

from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Prompt, Task

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


def unrelated_prompts(builder: PromptBuilder) -> list[Prompt]:
    """Both views of the questions: without the context and with it."""
    tasks = (Task(str(i), ({"role": "user", "content": q},)) for i, q in enumerate(UNRELATED))
    return [builder.build("unrelated", task) for task in tasks]
