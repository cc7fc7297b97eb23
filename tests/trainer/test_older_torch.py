"""What torch 2.11 lacks has a substitute there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minidistill.trainer.distributed.fsdp import ShardedModels


class Model(nn.Module):
    """As much of a causal model as sharding needs."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))

    def get_decoder(self) -> nn.Module:
        return nn.Sequential(nn.ModuleList(self.base_model))


@pytest.mark.parametrize("older", [False, True])
def test_weights_are_sharded_without_the_new_collectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    if older:
        for name in ("all_gather_single", "reduce_scatter_single"):
            monkeypatch.delattr(dist, name, raising=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Model()
        inputs = torch.randn(3, 4)
        expected = model.base_model(inputs)
        sharded = ShardedModels([model], set(), torch.device("cpu"), 1)
        headless = sharded.headless(model)
        sharded.begin_pass()
        output = headless(input=inputs)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert all(p.grad is not None for p in sharded.parameters())
    finally:
        dist.destroy_process_group()
