"""Several ranks on several GPUs: nccl and FSDP2 where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import records, run

from minidistill.errors import EXIT_OK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
BRIEF = ("--inference.engine", "embedded", "--model.dtype", "float32", "--max_steps", "4")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--trainer.shard", "true"),
        ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4"),
        ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4", "--trainer.shard", "false"),
    ],
    ids=["adapter", "adapter, divided", "every weight, divided", "every weight"],
)
def test_two_gpus_train_as_one_does(tmp_path: Path, flags: tuple[str, ...]) -> None:
    for name, ids in (("one", "0"), ("two", "0,1")):
        assert run(tmp_path / name, *BRIEF, *flags, "--trainer_gpu_ids", ids) == EXIT_OK
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in ("teacher_kl", "loss/total", "optim/grad_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-2, abs=1e-4)
