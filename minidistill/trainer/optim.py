"""AdamW over the adapter, and learning rates as a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.trainer.model import Policy


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step counted from 1: linear warm-up, then constant, linear or cosine decay."""
    optim, schedule = config.trainer.optim, config.trainer.scheduler
    if step <= schedule.warmup_steps:
        return optim.lr * step / schedule.warmup_steps
    if schedule.type == "constant":
        return optim.lr
    span = schedule.decay_steps or max(1, config.max_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps - 1) / span)
    shape = 1 - done if schedule.type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (optim.lr - schedule.min_lr) * shape


class Optimizer:
    """AdamW with a clipped global norm, whose state is plain tensors by parameter name."""

    def __init__(self, policy: Policy, config: Config) -> None:
        optim = config.trainer.optim
        self.named = policy.parameters
        self.max_norm = optim.max_norm
        self.adamw = torch.optim.AdamW(
            [parameter for _, parameter in self.named],
            lr=optim.lr,
            betas=(optim.betas1, optim.betas2),
            weight_decay=optim.weight_decay,
        )

    def clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        parameters = [parameter for _, parameter in self.named]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm))

    def step(self, rate: float) -> None:
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, named "exp_avg/<parameter>" and so on."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.named
            for key, value in self.adamw.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        names = dict(self.named)
        for key, value in state.items():
            kind, _, name = key.partition("/")
            target = names[name]
            device = target.device if kind != "step" else torch.device("cpu")
            self.adamw.state[target][kind] = value.to(device)
