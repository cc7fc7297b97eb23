"""torchrun's variables, left over or incomplete: what is waited for is said, and not for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.trainer.distributed import rank_group
from minidistill.trainer.distributed.rank_group import RankGroup, launched_by_torchrun

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def set_environment(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(name, value)


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("", "", "", ""), None),
        (("0", "1", "127.0.0.1", "29500"), None),
        (("3", "", "", ""), None),
        (("1", "2", "127.0.0.1", "29500"), (1, 2)),
        (("0", "2", "node", "29500"), (0, 2)),
    ],
)
def test_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], expected: tuple[int, int] | None
) -> None:
    set_environment(monkeypatch, *values)
    assert launched_by_torchrun() == expected


@pytest.mark.parametrize(
    "values",
    [
        ("", "2", "127.0.0.1", "29500"),
        ("1", "2", "", ""),
        ("2", "2", "127.0.0.1", "29500"),
        ("one", "2", "127.0.0.1", "29500"),
        ("0", "2", "127.0.0.1", "port"),
    ],
)
def test_an_incomplete_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    set_environment(monkeypatch, *values)
    assert cli.main(["run", "configs/sokoban.toml"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "not in full: RANK=" in error
    assert "env -u RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT minidistill run" in error


@pytest.mark.parametrize(("rank", "others"), [(0, "the other ranks at"), (1, "rank 0 at")])
def test_a_rank_says_what_it_waits_for_and_gives_up(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    port: str,
    rank: int,
    others: str,
) -> None:
    set_environment(monkeypatch, str(rank), "2", "127.0.0.1", port)
    monkeypatch.setattr(rank_group, "SILENT_SECONDS", 0.2)
    for limit in ("JOIN_TIMEOUT", "DRIVER_TIMEOUT"):
        monkeypatch.setattr(rank_group, limit, timedelta(seconds=1.5))
    group = RankGroup(rank, 2)
    with pytest.raises(UserError, match=f"rank {rank} of 2 waits for {others}") as caught:
        group.join(torch.device("cpu"), None, 60.0)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "-u WORLD_SIZE" in caught.value.fix
    (message,) = caplog.messages
    assert f"127.0.0.1:{port}" in message
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment ask for it" in message
    assert "to run alone instead: env -u RANK" in message


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_can_be_ended(port: str, signum: int) -> None:
    program = (
        "import torch; from minidistill.trainer.distributed import rank_group as g; "
        "g.SILENT_SECONDS = 0.2; g.RankGroup(0, 2).join(torch.device('cpu'), None, 60.0)"
    )
    variables = dict(zip(NAMES, ("0", "2", "127.0.0.1", port), strict=True))
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, env=os.environ | variables | paths
    ) as process:
        try:
            assert process.stderr is not None
            assert b"waits for the other ranks" in process.stderr.readline()
            process.send_signal(signum)
            assert process.wait(10) == -signum
        finally:
            process.kill()


def test_handlers_come_back_after_the_wait(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    set_environment(monkeypatch, "0", "2", "127.0.0.1", port)
    monkeypatch.setattr(rank_group, "JOIN_TIMEOUT", timedelta(seconds=1))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError):
        RankGroup(0, 2).join(torch.device("cpu"), None, 60.0)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        set_environment(monkeypatch, "0", "2", "127.0.0.1", str(taken.getsockname()[1]))
        monkeypatch.setattr(rank_group, "JOIN_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(UserError, match="did not meet") as caught:
            RankGroup(0, 2).join(torch.device("cpu"), None, 60.0)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


@pytest.mark.parametrize("agent", [False, True], ids=["own store", "torchrun's store"])
def test_ranks_that_do_not_come_are_told_from_a_network_that_fails(
    monkeypatch: pytest.MonkeyPatch, agent: bool
) -> None:
    """With torchrun's store the ranks meet later, when they look for each other's addresses."""
    store = dist.HashStore()

    def rendezvous(*args: Any, **kwargs: Any) -> Any:
        if not agent:
            raise dist.DistNetworkError("timed out")
        return iter([(store, 0, 2)])

    set_environment(monkeypatch, "0", "2", "127.0.0.1", "29500")
    monkeypatch.setattr(rank_group, "rendezvous", rendezvous)
    with pytest.raises(UserError, match=r"waits for the other ranks.*did not meet"):
        RankGroup(0, 2).join(torch.device("cpu"), None, 0.3)
    if agent:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
        with pytest.raises(UserError, match="cannot form a group with the other ranks") as caught:
            RankGroup(0, 2).join(torch.device("cpu"), None, 0.3)
        assert "GLOO_SOCKET_IFNAME" in caught.value.fix
        assert caught.value.exit_code == EXIT_ENVIRONMENT
