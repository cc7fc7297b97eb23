"""Tokens and floating-point operations of a step."""

from __future__ import annotations

from dataclasses import dataclass

from minidistill.config import Config
from minidistill.placement.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Work:
    """A stage's tokens and operations in one step, at most: where every sequence is `seq_len`."""

    tokens: int
    flops: int


def step_work(config: Config, shape: ModelShape, teacher: ModelShape) -> dict[str, Work]:
    """The work of sampling, of the teacher and of training.

    With P parameters a token meets in the layers and D = vocabulary × hidden in the LM head:

    sample   2 P (prompts read once a group + completions) + 2 D completions
    teacher  2 P tokens + 2 D completions
    train    4 P tokens + 4 D completions: forward, and backward without the frozen weights' own
             gradients. Training all weights adds 2 P tokens, each checkpointed layer its forward.

    Attention's products between tokens are left out; the teacher's context, read once a run where
    it is cached, is counted with every sequence.
    """
    orchestrator = config.orchestrator
    rollouts, longest = orchestrator.batch_size, config.seq_len
    completions = rollouts * orchestrator.sampling.max_tokens
    groups = rollouts // orchestrator.rollouts_per_example
    read = groups * (longest - orchestrator.sampling.max_tokens) + completions
    tokens = rollouts * longest
    body, head = _met(shape)
    passes = 4.0 if config.trainer.model.lora else 6.0
    if (ac := config.trainer.model.ac) is not None:
        passes += 2 * -(-shape.layers // ac.freq) / shape.layers
    teacher_body, teacher_head = _met(teacher if config.separate_teacher else shape)
    return {
        "sample": Work(read, 2 * body * read + 2 * head * completions),
        "teacher": Work(tokens, 2 * teacher_body * tokens + 2 * teacher_head * completions),
        "train": Work(tokens, int(passes * body * tokens) + 4 * head * completions),
    }


def _met(shape: ModelShape) -> tuple[int, int]:
    """Parameters in the layers, and of the product with the LM head."""
    return shape.parameters - shape.embedding - shape.head, shape.vocab * shape.hidden
