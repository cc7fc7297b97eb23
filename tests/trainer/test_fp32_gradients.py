"""Gradients of weights in half precision add up in fp32 over the passes of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidistill.trainer.distributed.fsdp import ShardedModels, full_tensor
from minidistill.trainer.optim import Optimizer

Configure = Callable[..., Any]
# 256 + 255 · 0.5: in bfloat16 every half is lost on 256
SCALES = [256.0] + [0.5] * 255


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, scale: float) -> Tensor:
        return self.weight * scale


class Model(nn.Module):
    """As much of a causal model as the optimizer and sharding need."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Layer()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=0))

    def get_decoder(self) -> nn.Module:
        return nn.Sequential(nn.ModuleList(), self.base_model)

    @property
    def parameters_by_name(self) -> Any:
        return SimpleNamespace(parameters=list(self.named_parameters()))


def check_sum(optimizer: Optimizer) -> None:
    (held,) = optimizer.stepped.values()
    assert held.grad is not None
    assert held.grad.dtype == torch.float32
    assert full_tensor(held.grad).tolist() == [383.5] * 4
    assert optimizer.clip() == 767.0
    optimizer.zero_grad()
    assert held.grad is None


def test_gradients_add_up_in_fp32(configure: Configure) -> None:
    plain, model = Model(), Model()
    config = configure("--trainer.optim.max_norm", "1e9").config
    optimizer = Optimizer(model.parameters_by_name, config)
    for scale in SCALES:
        plain.base_model(scale).sum().backward()
        model.base_model(scale).sum().backward()
        assert model.base_model.weight.grad is None, "none is kept beside the fp32 one"
    assert plain.base_model.weight.grad is not None
    assert plain.base_model.weight.grad.tolist() == [256.0] * 4
    check_sum(optimizer)


def test_gradients_of_sharded_weights_add_up_in_fp32(configure: Configure, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        sharded = ShardedModels([model], set(), torch.device("cpu"), 1)
        config = configure("--trainer.optim.max_norm", "1e9").config
        optimizer = Optimizer(model.parameters_by_name, config)
        for scale in SCALES:
            sharded.begin_pass()
            sharded.headless(model)(scale=scale).sum().backward()
        assert all(p.grad is None for p in sharded.parameters())
        check_sum(optimizer)
    finally:
        dist.destroy_process_group()
