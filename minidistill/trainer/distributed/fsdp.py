"""FSDP2: each rank keeps a shard of every weight, and a layer is unsharded only while it runs.

Under LoRA the frozen base is sharded and the adapter, which is small, stays on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minidistill.models.auto import decoder_layers
from minidistill.trainer.guards import out_of_memory_error


class CollectiveCounter:
    """Counts the collectives of a pass, so that a rank can repeat the pass after an error.

    If a rank runs out of memory in the middle of a pass, the others wait for it in the pass's next
    collective. It repeats the pass with a smaller batch and skips the collectives that took place.
    """

    def __init__(self) -> None:
        self.started = 0
        self.to_skip = 0

    def start(self) -> bool:
        """Count a collective. Returns whether it takes place."""
        self.started += 1
        return self.started > self.to_skip

    def reset(self, to_skip: int = 0) -> None:
        """Begin a pass that skips its first `to_skip` collectives."""
        self.started, self.to_skip = 0, to_skip


class CountedCollective:
    """An all-gather or a reduce-scatter as FSDP calls it, counted."""

    def __init__(self, counter: CollectiveCounter, collective: Callable[..., Any]) -> None:
        self.counter, self.collective = counter, collective

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        if self.counter.start():
            return self.collective(output_tensor, input_tensor, **options)
        output_tensor.zero_()  # the results of this pass are not used
        return None


class HeadlessModel(nn.Module):
    """A model run up to its head, as FSDP's outermost module.

    It also holds the head's weight, tied or not. That stays unsharded after the forward pass,
    because the objective takes it as a tensor.
    """

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal
        self.has_run = False

    def forward(self, **inputs: Any) -> Any:
        self.has_run = True
        return self.causal.base_model(**inputs)


class ShardedModels:
    """Models whose weights are sharded over the ranks.

    Every pass is collective, except between `unshard` and `reshard`.
    """

    def __init__(
        self,
        models: Sequence[Any],
        replicated: set[nn.Parameter],
        device: torch.device,
        ranks: int,
    ) -> None:
        """Shard `models`, each of which every rank holds in full; the first is the student's.

        `replicated` parameters stay as they are.
        """
        self._counter = CollectiveCounter()
        mesh = init_device_mesh(device.type, (ranks,))
        # `Any`: fully_shard adds FSDPModule's methods
        self._headless: list[Any] = [
            _shard(model, replicated, mesh, self._counter) for model in models
        ]
        self.weights: list[tuple[str, nn.Parameter]] = list(models[0].named_parameters())
        """The student's weights as this rank keeps them between passes."""

    def headless(self, causal: Any) -> nn.Module:
        """One of the models, up to its head."""
        return next(headless for headless in self._headless if headless.causal is causal)

    def parameters(self) -> Iterator[nn.Parameter]:
        for headless in self._headless:
            yield from headless.parameters()

    def unshard(self, models: Sequence[Any]) -> None:
        """Keep every weight of these models on every rank, until `reshard`."""
        for headless in self._headless:
            if any(headless.causal is model for model in models):
                headless.set_reshard_after_forward(False)
                for module in _fsdp_modules(headless):
                    module.unshard()

    def reshard(self) -> None:
        """Keep a shard of every weight on each rank again."""
        for headless in self._headless:
            headless.set_reshard_after_forward(True)
            headless.set_reshard_after_forward(False, recurse=False)
            for module in _fsdp_modules(headless):
                module.reshard()

    def begin_pass(self) -> None:
        """Start a pass on every rank, from shards."""
        self.reshard()
        self._counter.reset()

    def repeat_pass(self, message: str) -> None:
        """Repeat the pass that failed on this rank. The other ranks continue theirs.

        Raises UserError (exit code 3) with the allocator's `message` if this torch cannot do it.
        """
        if not can_repeat_passes():
            raise out_of_memory_error(
                "training with sharded weights, where torch "
                f"{torch.__version__} cannot repeat a pass (a newer torch can)",
                message,
                where="trainer.micro_batch_tokens",
                fix="set a smaller trainer.micro_batch_tokens or trainer.model.ac.freq = 1, "
                "or install a newer torch",
            )
        for headless in self._headless:
            if headless.has_run:
                headless.reset_iter_state()
        started = self._counter.started
        self.begin_pass()
        self._counter.reset(to_skip=started)


def can_repeat_passes() -> bool:
    """Whether FSDP can forget a pass that has failed. torch 2.11 cannot."""
    return hasattr(FSDPModule, "reset_iter_state")


def _shard(
    model: Any, replicated: set[nn.Parameter], mesh: Any, counter: CollectiveCounter
) -> HeadlessModel:
    headless = HeadlessModel(model)
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "ignored_params": replicated}
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True, **options)
    fully_shard(headless, reshard_after_forward=False, **options)
    counted = partial(CountedCollective, counter)
    for module in _fsdp_modules(headless):
        # sum: the loss is already divided by the step's tokens, and gloo has no mean
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        module.set_custom_all_gather(counted(_collective("all_gather_single")))
        module.set_custom_reduce_scatter(counted(_collective("reduce_scatter_single")))
    return headless


def _collective(name: str) -> Callable[..., Any]:
    """A collective by its present name, or by the name it had in torch 2.11."""
    older = {
        "all_gather_single": "all_gather_into_tensor",
        "reduce_scatter_single": "reduce_scatter_tensor",
    }
    return getattr(dist, name, None) or getattr(dist, older[name])


def _fsdp_modules(headless: nn.Module) -> list[Any]:
    return [m for m in headless.modules() if isinstance(m, FSDPModule)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has only a shard of the tensor; FSDP then sums its gradient."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. A collective for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Shard a tensor, which every rank has in full, as `target` is sharded."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
