"""What a bake sets where nothing else is said. `docs/bake.md` has the measurements behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings of a run, for a kind of machine."""

    steps: int
    batch_size: int
    """Rollouts of a step; each has a prompt of its own."""
    max_tokens: int
    """Of a completion."""
    lr: float
    rank: int
    prompts: int
    """That the model writes."""
    prompt_tokens: int
    """Of such a prompt, at most."""
    held_out: int
    """Prompts for the figures before and after training."""


CPU = Defaults(
    steps=40,
    batch_size=16,
    max_tokens=32,
    lr=1e-3,
    rank=16,
    prompts=256,
    prompt_tokens=64,
    held_out=32,
)
"""A small model on a few cores, within minutes."""
GPU = Defaults(
    steps=100,
    batch_size=64,
    max_tokens=256,
    lr=1e-4,
    rank=16,
    prompts=1000,
    prompt_tokens=128,
    held_out=64,
)


def defaults(gpus: int) -> Defaults:
    """Those of a machine with so many GPUs."""
    return GPU if gpus else CPU
