"""Several ranks on several GPUs, with NCCL and FSDP2. Rehearsed with ranks on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gpus import REHEARSED, TWO_GPUS, size
from support.runs import TINY, plan_on_gpus, records, run_on_gpus

from minidistill.errors import EXIT_OK

pytestmark = [pytest.mark.gpu, TWO_GPUS]
SHORT = (
    *TINY, "--inference.engine", "embedded", "--model.dtype", "float32",
    "--max_steps", size("4", "2"), "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline",
)  # fmt: skip
LAYOUTS = {
    "lora": (),
    "lora, sharded": ("--trainer.shard",),
    "full, sharded": ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4"),
    "full, replicated": (
        "--no-trainer.model.lora", "--trainer.optim.lr", "5e-4", "--no-trainer.shard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_as_one(tmp_path: Path, layout: str) -> None:
    if REHEARSED and layout != "lora, sharded":  # test_ranks.py runs the others on a CPU
        plan_on_gpus(*SHORT, *LAYOUTS[layout], "--trainer_gpu_ids", "0,1")
        return
    for count in (1, 2):
        flags = (*SHORT, *LAYOUTS[layout])
        gpus = ("--trainer_gpu_ids", ",".join(map(str, range(count))))
        ranks = ("--trainer.world_size", str(count))
        if count == 1:  # one rank has nothing to shard
            flags = tuple(flag for flag in flags if "trainer.shard" not in flag)
        path = tmp_path / str(count)
        assert run_on_gpus(path, (*flags, *gpus), (*flags, *ranks)) == EXIT_OK
    one, two = (
        [record for record in records(tmp_path / name) if "teacher_kl" in record] for name in "12"
    )
    assert [record["step"] for record in one] == list(range(1, int(size("4", "2")) + 1))
    for ours, theirs in zip(two, one, strict=True):
        for key in ("teacher_kl", "loss/total", "optim/grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-4)
