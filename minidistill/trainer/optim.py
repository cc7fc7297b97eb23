"""AdamW over the trained parameters, and learning rates as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.limits import fp32_copy_bytes
from minidistill.trainer.distributed.fsdp import full_tensor, sharded_like
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.policy import Policy


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step, counted from 1: linear warm-up, then the configured decay."""
    peak, schedule = config.trainer.peak_lr, config.trainer.scheduler
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    span = schedule.decay_steps or max(1, config.max_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps - 1) / span)
    shape = 1 - done if schedule.type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (peak - schedule.min_lr) * shape


def rate_depends_on_max_steps(config: Config) -> bool:
    """Whether the learning rate of a step would be another one in a run of another length."""
    schedule = config.trainer.scheduler
    return schedule.type != "constant" and schedule.decay_steps is None


class Optimizer:
    """AdamW with a clipped global norm, whose state is plain tensors by parameter name.

    A parameter in half precision has an fp32 copy, its master: gradients add up there over
    micro-batches, and updates too. Otherwise what is smaller than the last digit would be lost.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        optim = config.trainer.optim
        self.named = policy.parameters
        self.max_norm = optim.max_norm
        half = [(n, p) for n, p in self.named if fp32_copy_bytes(p.itemsize)]
        self.masters = {n: torch.nn.Parameter(p.detach().float()) for n, p in half}
        self.stepped = {n: self.masters.get(n, p) for n, p in self.named}
        """The tensors that are updated, and that hold the gradients between passes."""
        for name, parameter in half:
            hook = partial(_move_gradient, self.masters[name])
            parameter.register_post_accumulate_grad_hook(hook)
        self.adamw = torch.optim.AdamW(
            self.stepped.values(),
            lr=config.trainer.peak_lr,
            betas=(optim.betas1, optim.betas2),
            weight_decay=optim.weight_decay,
        )

    def clip(self) -> float:
        """Clip the gradients. Returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.stepped.values(), self.max_norm)
        return float(full_tensor(norm))

    @torch.no_grad()
    @explain_out_of_memory(
        "updating the weights",
        where="trainer.model.lora",
        fix="train an adapter instead of every weight, or train on more GPUs with trainer.shard",
    )
    def step(self, rate: float) -> None:
        """Update the parameters with the clipped gradients, then clear them."""
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        for name, parameter in self.named:
            if name in self.masters:
                parameter.copy_(self.masters[name])
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in (*self.stepped.values(), *(p for _, p in self.named)):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and fp32 copies, named "exp_avg/<parameter>" and so on."""
        state: dict[str, Tensor] = {f"master/{name}": p for name, p in self.masters.items()}
        for name, parameter in self.stepped.items():
            state |= {f"{key}/{name}": v for key, v in self.adamw.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Restore a copy of what `state` returned: a checkpoint's tensors are mapped from its file.

        Raises UserError (exit code 3) if it lacks fp32 copies of these parameters.
        """
        missing = set(self.masters)
        for key, value in state:
            kind, _, name = key.partition("/")
            target = self.stepped[name]
            if kind == "master":
                target.copy_(sharded_like(value, target))
                missing.discard(name)
            elif kind == "step":
                self.adamw.state[target][kind] = value.to("cpu", copy=True)
            else:
                value = value.to(target.device, copy=True)
                self.adamw.state[target][kind] = sharded_like(value, target)
        if missing:
            raise UserError(
                "the checkpoint's weights have another number format than this run's",
                where="model.dtype, trainer.model.lora.dtype",
                fix="resume on the kind of device that the run was started on",
                exit_code=EXIT_ENVIRONMENT,
            )


@torch.no_grad()
def _move_gradient(master: Tensor, parameter: Tensor) -> None:
    """Add the gradient of one pass to the master's and free it, as soon as it is complete.

    FSDP calls this hook too, with shards, after it has summed the ranks' gradients in fp32.
    """
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "another optimizer has taken the gradient"
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)
