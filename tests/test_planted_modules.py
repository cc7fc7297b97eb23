"""Files in the current directory that have the names of modules: no process imports them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.levels import Recipe
from minidistill.envs.sokoban.workers import WorkerProcess
from minidistill.system import subprocesses
from minidistill.system.subprocesses import Subprocess

OPTIONAL = (  # may not be installed
    *("wandb", "tensorboard", "trackio"),
    *("flash_attn", "bitsandbytes", "sentencepiece"),
)
# of the standard library, installed, found by the interpreter itself
PLANTED = (
    *("json", "random", "socket", "dataclasses", "torch", "numpy", "yaml", "httpx", "pydantic"),
    *("sitecustomize", "usercustomize", *OPTIONAL),
)
ENVIRONMENT = """\
from minidistill.envs import Reward, Task
import my_words  # what it imports from its own folder is found too

class MyTask(Task):  # which the trainer's ranks unpickle
    pass

class Environment:
    train = [MyTask(str(n), ({"role": "user", "content": str(n)},), "1") for n in range(8)]
    eval = [MyTask("held-out", ({"role": "user", "content": "9"},), "1")]
    def score(self, task, completion):
        return Reward(float(my_words.GOOD in completion))

def load():
    return Environment()
"""
CONFIG = """\
max_steps = 1
output_dir = "out"
trainer.world_size = 2
orchestrator.batch_size = 4
orchestrator.sampling.max_tokens = 4
orchestrator.teacher_model.context = "Think. "
[[orchestrator.env]]
id = "my_env:load"
"""


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current directory, where planted modules note that they were imported."""
    library = tmp_path_factory.mktemp("library")
    (library / "minidistill").symlink_to(ROOT / "minidistill")
    (library / "minidistill_kernels").symlink_to(ROOT / "kernels" / "minidistill_kernels")
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(
            "import os\nwith open(os.environ['NOTES'], 'a') as file: file.write(__name__ + ' ')\n"
        )
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(library))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def minidistill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minidistill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def imported(folder: Path) -> str:
    """The planted modules that some process has imported."""
    notes = folder / "notes"
    return notes.read_text() if notes.exists() else ""


def test_a_run_with_ranks_and_a_scoring_process(folder: Path) -> None:
    """What its configuration names in the current directory is found in all of them."""
    (folder / "my_env.py").write_text(ENVIRONMENT)
    (folder / "my_words.py").write_text('GOOD = "1"\n')
    (folder / "run.toml").write_text(CONFIG)
    done = minidistill("run", "run.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert imported(folder) == ""
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_a_command_without_an_environment_of_ones_own(folder: Path) -> None:
    (folder / "run.toml").write_text(CONFIG.replace("my_env:load", "sokoban-env"))
    done = minidistill("config", "run.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert imported(folder) == ""


def test_benchmarks_are_all_that_is_imported_for_them(folder: Path) -> None:
    (folder / "bench").mkdir()
    (folder / "bench" / "__init__.py").touch()
    (folder / "bench" / "kernels.py").write_text(
        "import json, socket\ndef main(rest): return len(rest)\n"
    )
    assert minidistill("bench", "kernels").returncode == 0
    assert imported(folder) == ""


def test_processes_that_make_levels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "Popen", subprocess.Popen)
    worker = WorkerProcess(Recipe.of(Difficulty(4, 7, 4, 7, 1, 3), 0, "train", 64))
    try:
        worker.ask([3])
        assert worker.receive()[0] == 3
    finally:
        worker.close()
    assert imported(folder) == ""


def test_what_a_subprocess_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM starts its workers."""
    monkeypatch.setattr(subprocesses, "Popen", subprocess.Popen)
    monkeypatch.syspath_prepend(str(TESTS))
    child = Subprocess("support.reporting_child", [], [])
    try:
        assert child.popen.wait(20) == 0
        assert child.last_words().endswith(f"last output: {sys.modules['json'].__file__}")
    finally:
        child.close()
    assert imported(folder) == ""
