"""What a bake sets: its arguments, and defaults for everything that they leave open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minidistill.baking.context import FLAG as CONTEXT
from minidistill.baking.prompts import FLAG as PROMPTS
from minidistill.baking.prompts import prompts_args
from minidistill.config import schema_tree as tree
from minidistill.config.overrides import Override

MODEL, STEPS, OUT, ENV = "--model", "--steps", "--out", "--env"
DEFAULT = "bake's default"
"""Where a setting is from that neither an argument nor an override gives."""
PLACEMENT = "orchestrator.teacher_model.context_placement"
TEXT = "orchestrator.teacher_model.context"
_AT_LEAST = 32
"""Prompts that are enough where a model of a narrow task repeats itself."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings for a kind of machine. `docs/bake.md` says where they are from."""

    model: str
    """That `init` proposes."""
    steps: int
    batch_size: int
    """Rollouts of a step."""
    max_tokens: int
    """Of a completion."""
    lr: float | Literal["auto"]
    rank: int
    prompts: int
    """That the model writes."""
    prompt_tokens: int
    """Of such a prompt, at most."""
    held_out: int
    """Prompts for the figures before and after training."""

    @classmethod
    def of(cls, gpus: int) -> Defaults:
        """Those of a machine with so many GPUs."""
        return GPU if gpus else CPU


# A small model on a few cores, within minutes
CPU = Defaults(
    model="HuggingFaceTB/SmolLM2-360M-Instruct",
    steps=40,
    batch_size=16,
    max_tokens=32,
    lr=1e-3,
    rank=16,
    prompts=160,
    prompt_tokens=64,
    held_out=32,
)
GPU = Defaults(
    model="Qwen/Qwen3-4B-Instruct-2507",
    steps=100,
    batch_size=64,
    max_tokens=256,
    lr="auto",
    rank=16,
    prompts=1000,
    prompt_tokens=128,
    held_out=64,
)


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of a bake."""

    model: str
    context: str
    prompts: str | Path | None = None
    steps: int | None = None
    out: str | Path | None = None
    env: str | None = None
    """The id of an environment with a reward, which `init` takes."""

    def flags(self) -> dict[str, str]:
        """The flags of the arguments that are given, by the setting that each decides."""
        optional = (
            ("max_steps", STEPS, self.steps),
            ("output_dir", OUT, self.out),
            ("orchestrator.env.0.args.path", PROMPTS, self.prompts),
            ("orchestrator.env.0.id", ENV, self.env),
        )
        flags = {key: flag for key, flag, value in optional if value is not None}
        return {"model.name": MODEL, TEXT: CONTEXT} | flags

    def overrides(self, chosen: Defaults) -> list[Override]:
        """What the arguments say, and what a bake is. Raises UserError for prompts of no kind."""
        steps = chosen.steps if self.steps is None else self.steps
        return [
            *([] if self.out is None else [override("output_dir", str(self.out), OUT)]),
            override("max_steps", steps, DEFAULT if self.steps is None else STEPS),
            override("model.name", self.model, MODEL),
            override("trainer.model.lora.rank", chosen.rank),
            override("trainer.optim.lr", chosen.lr),
            override("trainer.scheduler.type", "cosine"),
            override("trainer.scheduler.warmup_steps", 5),
            *self._objective(),
            override("orchestrator.batch_size", chosen.batch_size),
            override("orchestrator.sampling.max_tokens", chosen.max_tokens),
            override(PLACEMENT, "system"),
            # an empty line, because the context may follow the template's own system message
            override(TEXT, f"\n\n{self.context}", CONTEXT),
            *self._tasks(chosen),
            override("orchestrator.eval.interval", 0),
            override("orchestrator.eval.num_examples", chosen.held_out),
        ]

    def _objective(self) -> list[Override]:
        """Distillation alone, or with an environment's reward."""
        pure = self.env is None
        weights = {"adv": 0.0, "teacher": 1.0, "student": 1.0}
        if not pure:
            weights = dict.fromkeys(weights, 0.5)
        return [
            *(override(f"trainer.loss.{name}_tau", weight) for name, weight in weights.items()),
            override("orchestrator.rollouts_per_example", 2 if pure else 4),
            override("orchestrator.buffer.skip_verification", True)
            if pure
            else override("orchestrator.teacher_model.eval_baseline", True),
        ]

    def _tasks(self, chosen: Defaults) -> list[Override]:
        if self.env is not None:
            return [override("orchestrator.env", [{"id": self.env}], ENV)]
        questions = override("orchestrator.eval.env", [{"id": "questions"}])
        if self.prompts is not None:
            env = {"id": "jsonl", "args": prompts_args(self.prompts)}
            return [override("orchestrator.env", [env], PROMPTS), questions]
        args = {"count": chosen.prompts, "at_least": _AT_LEAST, "max_tokens": chosen.prompt_tokens}
        env = {"id": "self-prompts", "args": args}
        return [override("orchestrator.env", [env]), questions]


def override(key: str, value: Any, flag: str = DEFAULT) -> Override:
    """A setting by its dotted name, and what gives it."""
    located = tree.locate(key.split("."))
    assert located is not None, key
    return Override(located[0], value, flag)
