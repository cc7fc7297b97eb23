"""FSDP2: each rank keeps a part of every weight, and a layer is whole only while it runs.

Under LoRA the frozen base is divided and the adapter, which is small, stays on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minidistill.config import Config

if TYPE_CHECKING:
    from minidistill.trainer.policy import Policy


class Exchanges:
    """Counts what the ranks gather and reduce in a pass.

    One that ran out of memory in the middle of it, while the others wait for its part of the rest,
    makes the pass again with less: what took place already is then left out.
    """

    def __init__(self) -> None:
        self.made = self.skipped = 0

    def due(self) -> bool:
        """Whether the next one is to take place."""
        self.made += 1
        return self.made > self.skipped


class Exchange:
    """An all-gather or a reduce-scatter as FSDP calls it, counted."""

    def __init__(self, exchanges: Exchanges, exchange: Callable[..., Any]) -> None:
        self.exchanges, self.exchange = exchanges, exchange

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **how: Any) -> Any:
        if self.exchanges.due():
            return self.exchange(output_tensor, input_tensor, **how)
        output_tensor.zero_()  # nothing of this pass is used
        return None


class Trunk(nn.Module):
    """A model run up to its head. FSDP's outermost module: it holds the head's weight too, tied or
    not, which stays whole from the forward pass on, for the objective takes it as a tensor."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal
        self.has_run = False

    def forward(self, **inputs: Any) -> Any:
        self.has_run = True
        return self.causal.base_model(**inputs)


def shards(config: Config, size: int) -> bool:
    """Whether `size` ranks divide the weights among them."""
    asked = config.trainer.shard
    return size > 1 and (config.trainer.model.lora is False if asked == "auto" else asked)


def shard(policy: Policy) -> None:
    """Divide the policy's models, each of which is whole on every rank before."""
    mesh = init_device_mesh(policy.device.type, (policy.world.size,))
    own = {p for n, p in policy.model.named_parameters() if policy.lora and ".lora_" in n}
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for causal in (policy.student, *policy.reference_models.values()):
        trunk = Trunk(causal)
        settings: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "ignored_params": own}
        for layer in _layers(causal.base_model):
            fully_shard(layer, reshard_after_forward=True, **settings)
        fully_shard(trunk, reshard_after_forward=False, **settings)
        for module in _divided(trunk):
            # a sum, which the loss's normaliser already makes a mean; gloo knows no other
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            counted = partial(Exchange, policy.exchanges)
            module.set_custom_all_gather(counted(dist.all_gather_single))
            module.set_custom_reduce_scatter(counted(dist.reduce_scatter_single))
        policy.trunks.append(trunk)
    policy.divided = list(policy.student.named_parameters())


def _layers(body: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda found: len(found), default=[]))


def _divided(trunk: nn.Module) -> list[Any]:
    return [m for m in trunk.modules() if isinstance(m, FSDPModule)]


def gather(trunk: Any) -> None:
    """Make every weight whole on every rank, until `release`: passes then need no other rank."""
    trunk.set_reshard_after_forward(False)
    for module in _divided(trunk):
        module.unshard()


def release(trunk: Any) -> None:
    """Back to a part of every weight on each rank."""
    trunk.set_reshard_after_forward(True)
    trunk.set_reshard_after_forward(False, recurse=False)
    for module in _divided(trunk):
        module.reshard()


def begin_pass(policy: Policy) -> None:
    """Every rank is at the same place, with its part of every weight."""
    policy.release()
    policy.exchanges.made = policy.exchanges.skipped = 0


def repeat_pass(policy: Policy) -> None:
    """The pass at hand failed here: to the other ranks the one that is made next is its rest."""
    for trunk in policy.trunks:
        if trunk.has_run:
            trunk.reset_iter_state()
    begun = policy.exchanges.made
    begin_pass(policy)
    policy.exchanges.skipped = begun


def is_divided(tensor: Tensor) -> bool:
    """Whether this rank has a part of the tensor only; FSDP then sums its gradient."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A tensor that every rank has, divided as `target` is."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
