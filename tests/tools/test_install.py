"""Which installer sets up an environment, and with which settings."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tools import install

ARGUMENTS = ["--no-deps", "--requirement", "requirements.lock"]


class Commands:
    """Stands for the commands that an installation runs: `listed` are pip's settings."""

    def __init__(self, listed: str = "", failing: tuple[str, ...] = ()) -> None:
        self.listed, self.failing = listed, failing
        self.installs: list[tuple[str, list[str], dict[str, str]]] = []
        """The installer, its arguments and its environment."""

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-m"]
        program, *arguments = command[2:]
        if arguments == ["config", "list"]:
            return subprocess.CompletedProcess(command, 0, self.listed)
        self.installs.append((program, arguments, options.get("env") or {}))
        code = int(program in self.failing or arguments[-1] in self.failing)
        return subprocess.CompletedProcess(command, code)

    @property
    def programs(self) -> list[str]:
        """The installers that were given the requirements."""
        return [p for p, arguments, _ in self.installs if arguments[-3:] == ARGUMENTS]


def run(monkeypatch: pytest.MonkeyPatch, commands: Commands, *, uv: bool = True) -> int:
    spec = ModuleSpec("uv", None) if uv else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr(subprocess, "run", commands.run)
    return install.main(ARGUMENTS)


def test_uv_installs_into_this_environment_with_pips_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = Commands("global.find-links='/one /two'\n:env:.timeout='7'\n")
    assert run(monkeypatch, commands) == 0
    assert commands.programs == ["uv"]
    _, arguments, environment = commands.installs[0]
    assert arguments[arguments.index("--python") + 1] == sys.executable
    assert environment["UV_FIND_LINKS"] == "/one,/two"
    assert environment["UV_HTTP_TIMEOUT"] == "7"
    assert environment.items() >= os.environ.items()


def test_settings_of_uv_itself_beat_those_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "file:///uvs")
    commands = Commands("global.index-url='file:///pips'\n")
    assert run(monkeypatch, commands) == 0
    assert commands.installs[0][2]["UV_DEFAULT_INDEX"] == "file:///uvs"


def test_uv_is_installed_first_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    assert run(monkeypatch, commands, uv=False) == 0
    assert [(p, arguments[-1]) for p, arguments, _ in commands.installs] == [
        ("pip", "uv"),
        ("uv", ARGUMENTS[-1]),
    ]


@pytest.mark.parametrize(
    ("commands", "uv", "programs"),
    [
        (Commands(failing=("uv",)), False, ["pip"]),  # no index has it
        (Commands(failing=("uv",)), True, ["uv", "pip"]),
        (Commands("global.no-index='true'\n"), True, ["pip"]),  # of which uv would know nothing
    ],
)
def test_pip_installs_where_uv_cannot(
    commands: Commands, uv: bool, programs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, commands, uv=uv) == 0
    assert commands.programs == programs


def test_a_requirement_that_nothing_can_install_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(monkeypatch, Commands(failing=(ARGUMENTS[-1],))) == 1


def test_pips_settings_mean_the_same_to_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = file:///global\nfind-links = /a\n  /it's\nquiet = 1\n"
        "[install]\nindex-url = file:///install\nno-cache-dir = true\n"
        "[download]\nno-binary = :all:\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_CONSTRAINT", "limits.txt")
    for name in ("HOME", "XDG_CONFIG_DIRS"):  # without this machine's settings
        monkeypatch.setenv(name, str(tmp_path))
    settings = install.uv_settings()
    assert settings is not None
    assert settings["UV_DEFAULT_INDEX"] == "file:///install"
    assert settings["UV_FIND_LINKS"] == "/a,/it's"
    assert settings["UV_NO_CACHE"] == "true"
    assert settings["UV_CONSTRAINT"] == "limits.txt"
