"""A trainer rank that runs out of memory, in place of `minidistill.trainer.distributed.worker`.

The variable MEMORY_LIMIT is RANK:PLACE:TOKENS: the rank, the place in the pass, and the largest
number of tokens that fit. With the variable NO_REPEAT, FSDP cannot repeat passes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

import minidistill_kernels
from minidistill.models.auto import decoder_layers
from minidistill.trainer import trainer
from minidistill.trainer.distributed import worker
from minidistill.trainer.distributed.fsdp import can_repeat_passes

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB"


def limit_memory(place: str, size: int) -> Callable[[], None]:
    """Make passes of more than `size` tokens fail at `place`. Returns a function to undo this."""
    original_states, original_distill = trainer.hidden_states, minidistill_kernels.linear_distill
    too_large = False

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    def fail_in_backward(module: Any, inputs: Any, output: Any) -> None:
        output.register_hook(fail)

    def limited_states(policy: Any, tokens: Any, *context: Any) -> torch.Tensor:
        nonlocal too_large
        too_large = tokens.ids_BL.numel() > size
        student = torch.is_grad_enabled()
        layer = decoder_layers(policy.causal)[1]
        if too_large and place == ("forward" if student else "teacher"):
            handle = layer.register_forward_pre_hook(fail)
        elif too_large and student and place == "backward":
            handle = layer.register_forward_hook(fail_in_backward)
        else:
            return original_states(policy, tokens, *context)
        try:
            return original_states(policy, tokens, *context)
        finally:
            handle.remove()

    def limited_distill(*args: Any, **kwargs: Any) -> Any:
        if too_large and place == "loss":
            fail()
        return original_distill(*args, **kwargs)

    def undo() -> None:
        trainer.hidden_states = original_states
        minidistill_kernels.linear_distill = original_distill

    trainer.hidden_states = limited_states
    minidistill_kernels.linear_distill = limited_distill
    return undo


if __name__ == "__main__":
    rank, place, size = os.environ["MEMORY_LIMIT"].split(":")
    if sys.argv[1] == rank:
        limit_memory(place, int(size))
    if "NO_REPEAT" in os.environ and can_repeat_passes():
        del FSDPModule.reset_iter_state
    worker.main(sys.argv[1:])
