"""The number of ranks and their devices, with and without torchrun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minidistill.errors import EXIT_USAGE, UserError
from minidistill.placement.machine import Machine
from minidistill.placement.placement import Placement
from minidistill.placement.planner import plan_run

BATCH = ("--orchestrator.batch_size", "48")
EMBEDDED = ("--inference.engine", "embedded", *BATCH)
Configure = Callable[..., Any]


def placement(loaded: Any, gpus: int = 0, torchrun: tuple[int, int] = (1, 1)) -> Placement:
    """On a machine with `gpus`. `torchrun` is the number of ranks on all machines, and on this."""
    machine = Machine(gpus, 80 << 30, vllm=False, bf16=gpus > 0, torchrun_ranks=torchrun[0],
                      torchrun_local_ranks=torchrun[1])  # fmt: skip
    return plan_run(loaded, machine).placement


@pytest.mark.parametrize(
    ("flags", "torchrun", "message"),
    [
        (("--trainer.world_size", "5"), (1, 1), "do not divide orchestrator.batch_size"),
        (("--trainer.world_size", "2"), (4, 4), "torchrun starts 4 processes"),
    ],
)
def test_refusals(
    configure: Configure, flags: tuple[str, ...], torchrun: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        placement(configure(*BATCH, *flags), torchrun=torchrun)
    assert caught.value.exit_code == EXIT_USAGE


def test_ranks_on_a_cpu(configure: Configure) -> None:
    assert placement(configure()).ranks == 1
    two = placement(configure("--trainer.world_size", "2"))
    assert (two.ranks, [d.type for d in two.devices]) == (2, ["cpu", "cpu"])


def test_each_gpu_of_the_trainer_is_a_rank(configure: Configure) -> None:
    two = (*EMBEDDED, "--trainer_gpu_ids", "2,3")
    assert [d.index for d in placement(configure(*two), gpus=8).devices] == [2, 3]
    with pytest.raises(UserError, match="world_size = 4, but 2 GPUs train"):
        placement(configure(*two, "--trainer.world_size", "4"), gpus=8)
    machines = placement(configure(*two), gpus=8, torchrun=(4, 2))
    assert (machines.ranks, [d.index for d in machines.devices]) == (4, [2, 3])
    three = configure(*EMBEDDED, "--trainer_gpu_ids", "2,3,4")
    with pytest.raises(UserError, match="torchrun starts 2 processes on this machine"):
        placement(three, gpus=8, torchrun=(4, 2))


def test_the_number_of_ranks_is_read_from_torchruns_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (Machine.local().torchrun_ranks, Machine.local().torchrun_local_ranks) == (1, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (Machine.local().torchrun_ranks, Machine.local().torchrun_local_ranks) == (4, 2)


@pytest.mark.parametrize(
    ("flags", "sharded"),
    [
        ((), False),
        (("--trainer.shard",), True),
        (("--no-trainer.model.lora",), True),
        (("--no-trainer.model.lora", "--no-trainer.shard"), False),
    ],
)
def test_which_weights_are_sharded(
    configure: Configure, flags: tuple[str, ...], sharded: bool
) -> None:
    assert placement(configure("--trainer.world_size", "2", *flags)).sharded == sharded
    assert not placement(configure(*flags)).sharded, "a single rank"
