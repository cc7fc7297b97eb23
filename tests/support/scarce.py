"""A trainer rank that runs out of memory, in place of `minidistill.trainer.distributed.worker`.

The variable SCARCE says on which rank, where in the pass, and above how many tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import minidistill_kernels
from minidistill.trainer import trainer
from minidistill.trainer.distributed import worker
from minidistill.trainer.distributed.fsdp import decoder_layers

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB"


def limit(place: str, size: int) -> Callable[[], None]:
    """Make passes of more than `size` tokens fail at `place`. Returns a function that undoes it."""
    states, distill = trainer.hidden_states, minidistill_kernels.linear_distill
    too_large = False

    def fail(*anything: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    def fail_in_backward(module: Any, inputs: Any, output: Any) -> None:
        output.register_hook(fail)

    def limited(policy: Any, tokens: Any, *context: Any) -> torch.Tensor:
        nonlocal too_large
        too_large = tokens.ids_BL.numel() > size
        student = torch.is_grad_enabled()
        layer = decoder_layers(policy.causal)[1]
        if too_large and place == ("forward" if student else "teacher"):
            handle = layer.register_forward_pre_hook(fail)
        elif too_large and student and place == "backward":
            handle = layer.register_forward_hook(fail_in_backward)
        else:
            return states(policy, tokens, *context)
        try:
            return states(policy, tokens, *context)
        finally:
            handle.remove()

    def limited_loss(*arguments: Any, **named: Any) -> Any:
        if too_large and place == "loss":
            fail()
        return distill(*arguments, **named)

    def undo() -> None:
        trainer.hidden_states, minidistill_kernels.linear_distill = states, distill

    trainer.hidden_states, minidistill_kernels.linear_distill = limited, limited_loss
    return undo


if __name__ == "__main__":
    number, place, size = os.environ["SCARCE"].split(":")
    if sys.argv[1] == number:
        limit(place, int(size))
    worker.main(sys.argv[1:])
