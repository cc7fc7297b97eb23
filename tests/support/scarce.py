"""A trainer rank that runs out of memory, in place of `minidistill.trainer.distributed.worker`.

The variable SCARCE says on which rank, where in the pass, and above how many tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from minidistill.trainer import gradients
from minidistill.trainer.distributed import fsdp as sharding
from minidistill.trainer.distributed import worker as rank

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB"


def limit(place: str, size: int) -> Callable[[], None]:
    """Passes of more than so many tokens fail from here on, at `place`. Returns its undoing."""
    states, distill = gradients.hidden_states, gradients.linear_distill
    much = False

    def fail(*anything: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    def later(module: Any, inputs: Any, output: Any) -> None:
        output.register_hook(fail)

    def limited(policy: Any, tokens: Any, *context: Any) -> torch.Tensor:
        nonlocal much
        much = tokens.ids_BL.numel() > size
        student = torch.is_grad_enabled()
        layer = sharding._layers(policy.causal.base_model)[1]
        if much and place == ("forward" if student else "teacher"):
            handle = layer.register_forward_pre_hook(fail)
        elif much and student and place == "backward":
            handle = layer.register_forward_hook(later)
        else:
            return states(policy, tokens, *context)
        try:
            return states(policy, tokens, *context)
        finally:
            handle.remove()

    def limited_loss(*arguments: Any, **named: Any) -> Any:
        if much and place == "loss":
            fail()
        return distill(*arguments, **named)

    def undo() -> None:
        gradients.hidden_states, gradients.linear_distill = states, distill

    gradients.hidden_states, gradients.linear_distill = limited, limited_loss
    return undo


if __name__ == "__main__":
    number, place, size = os.environ["SCARCE"].split(":")
    if sys.argv[1] == number:
        limit(place, int(size))
    rank.main(sys.argv[1:])
