"""Tokens and floating-point operations of a step."""

from __future__ import annotations

from dataclasses import dataclass

from minidistill.config import Config
from minidistill.placement.limits import completion_tokens
from minidistill.placement.model_shape import ModelShape, Shapes
from minidistill.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class Work:
    """Upper bounds for a stage in one step, with every sequence of the longest length."""

    tokens: int
    flops: int


def step_work(config: Config, placement: Placement, shapes: Shapes) -> dict[str, Work]:
    """The work of sampling, of the teacher and of training.

    With P parameters in the layers and D = vocabulary × hidden in the LM head:

    sample   2 P (one prompt per group + completions) + 2 D completions
    teacher  2 P tokens + 2 D completions
    train    4 P tokens + 4 D completions: the forward pass, and a backward pass without weight
             gradients. Training all weights adds 2 P tokens, checkpointing a layer its forward.

    If the teacher samples and an engine scores it, its log-probs come with the samples, and the
    stage `teacher` has no work. In the trainer, tokens have one prompt per group too if the
    attention shares prompts. Attention between tokens is left out. The teacher's context is counted
    with every prompt, although it is prefilled once per run if it is cached.
    """
    orchestrator = config.orchestrator
    rollouts, longest = orchestrator.batch_size, placement.max_length
    longest_completion = completion_tokens(config, longest)
    completions = rollouts * longest_completion
    groups = rollouts // orchestrator.rollouts_per_example
    sampled = groups * (longest - longest_completion) + completions
    shares = placement.attention.shares_prompts
    trained = sampled if shares else rollouts * longest
    scored = sampled if shares and placement.teacher.scorer == "trainer" else rollouts * longest
    scored_completions = completions
    shape = shapes.student
    body, head = _parameters(shape)
    from_teacher = config.orchestrator.sample_from == "teacher"
    if from_teacher and placement.teacher.scorer == "engine":  # the sampler's log-probs are enough
        scored = scored_completions = 0
    passes = 4.0 if config.trainer.model.lora else 6.0
    if freq := placement.ac_freq:
        passes += 2 * -(-shape.layers // freq) / shape.layers
    teacher_body, teacher_head = _parameters(shapes.teacher)
    sampler_body, sampler_head = _parameters(shapes.teacher if from_teacher else shape)
    return {
        "sample": Work(sampled, 2 * sampler_body * sampled + 2 * sampler_head * completions),
        "teacher": Work(scored, 2 * teacher_body * scored + 2 * teacher_head * scored_completions),
        "train": Work(trained, int(passes * body * trained) + 4 * head * completions),
    }


def _parameters(shape: ModelShape) -> tuple[int, int]:
    """P and D of `step_work`."""
    return shape.body, shape.vocab * shape.hidden
