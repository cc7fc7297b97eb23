"""Fixtures of several folders, GPUs for GPU tests only, and the distribution over workers."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL
from support.paths import SOKOBAN

from minidistill.system.threads import settle_threads

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker; subprocesses inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
settle_threads()  # before torch is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the golden files of the scoreboard again instead of comparing with them"
    parser.addoption("--regenerate-goldens", action="store_true", help=text)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of workers of `-n auto`.

    At most two, because some tests start several processes that take a GiB each. None on a machine
    with GPUs, because GPU tests need the whole GPU.
    """
    import torch

    return 0 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))


# Files that share engines or a server, and so a worker
TOGETHER = {
    "test_vllm_engine.py": "vLLM's engines",
    "test_vllm_gpu.py": "vLLM's engines",
    "test_vllm_async.py": "vLLM's engines",
    "test_vllm_teacher.py": "vLLM's engines",
    "test_vllm_server.py": "vLLM's servers",
    "test_vllm_servers.py": "vLLM's servers",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, files that share a fixture of the session share a worker too."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(Path(file).name, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    torch.cuda.is_available()  # starts CUDA while its GPUs are visible: see the hook below
    # what takes minutes first: otherwise one of two workers has nothing to do at the end
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of garbage need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many GPU tests were only rehearsed."""
    import torch

    passed = terminalreporter.stats.get("passed", [])
    rehearsed = sum("gpu" in report.keywords for report in passed)
    if rehearsed and not torch.cuda.is_available():
        terminalreporter.write_line(
            f"{rehearsed} GPU tests were rehearsed on the CPU, because this machine has no GPU"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests not marked `gpu`, and the processes that they start, see a machine without GPUs.

    Otherwise `auto` settings would put them on a GPU, with vLLM. The hook also covers the set-up of
    fixtures, of any scope.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "gpu" not in item.keywords:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr("torch.cuda.is_available", lambda: False)
            patch.setattr("torch.cuda.device_count", lambda: 0)
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keeps generated levels out of the user's cache. Workers share one cache."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder is inside the run's
        folder = folder.parent
    (folder / "cache").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _forked_subprocesses() -> Any:
    """Spares ranks and engines the seconds that their imports take, except on GPUs."""
    from support import forked
    from support.gpus import REHEARSED

    with pytest.MonkeyPatch.context() as patch:
        if REHEARSED:
            patch.setattr("minidistill.system.subprocesses.Popen", forked.popen)
        yield


@pytest.fixture
def configure() -> Callable[..., Any]:
    """The shipped configuration with overrides: `configure("--max_steps", "3").config`."""
    from minidistill.config import load_config

    return lambda *flags: load_config([SOKOBAN, *flags])


@pytest.fixture
def minimal_config(tmp_path: Path) -> str:
    """The path of a file with the smallest configuration."""
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only shipped files can be loaded: the hub is offline and its cache empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
