"""Several ranks on several GPUs, with NCCL and FSDP2."""

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
SHORT = ("--inference.engine", "embedded", "--model.dtype", "float32", "--max_steps", "4")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--trainer.shard", "true"),
        ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4"),
        ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4", "--trainer.shard", "false"),
    ],
    ids=["lora", "lora, sharded", "full, sharded", "full, replicated"],
)
def test_two_gpus_train_as_one(tmp_path: Path, flags: tuple[str, ...]) -> None:
    for name, ids in (("one", "0"), ("two", "0,1")):
        assert run(tmp_path / name, *SHORT, *flags, "--trainer_gpu_ids", ids) == EXIT_OK
    one, two = (
        [record for record in records(tmp_path / name) if "teacher_kl" in record]
        for name in ("one", "two")
    )
    assert [record["step"] for record in one] == [1, 2, 3, 4]
    for ours, theirs in zip(two, one, strict=True):
        for key in ("teacher_kl", "loss/total", "optim/grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-4)
