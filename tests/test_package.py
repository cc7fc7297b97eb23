"""The wheel and the sdist: what they hold, and that they run in an environment of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.paths import ROOT

import minidistill
from tools.install import uv_settings

SHIPPED = ("minidistill", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
NOT_SHIPPED = ("tests", "bench", "tools", "docs")
OURS = re.compile(r"minidistill(_kernels)?/|minidistill-[0-9.]+\.dist-info/")
SETTINGS = ("--orchestrator.eval.num_examples", "8", "--orchestrator.batch_size", "8")
# those of a checkout, and what would compile every module again in each process
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")


def check_call(command: list[str], **more: object) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return str(done.stdout)


def build(source: Path, *kinds: str) -> Path:
    """Build in a copy of the checkout, because setuptools leaves its folders there."""
    # in an environment of its own only if this one has too old a setuptools
    isolated = int(version("setuptools").split(".")[0]) < 77
    command = [sys.executable, "-m", "build", *([] if isolated else ["--no-isolation"]), *kinds]
    check_call([*command, "--outdir", str(source / "dist"), str(source)])
    return source / "dist"


def copy(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "runs", "results")
    for name in (*SHIPPED, *NOT_SHIPPED, "MANIFEST.in", "setup.py"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=ignore)
        elif path.exists():
            target.mkdir(exist_ok=True)
            shutil.copy(path, target / name)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist, and the wheel that is made of it."""
    if find_spec("build") is None:
        pytest.skip("needs the package build")
    return build(copy(tmp_path_factory.mktemp("built") / "checkout"))


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    texts = [
        path.read_text()
        for folder in ("minidistill", "configs", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".toml")
    ]
    named = {
        name.strip()
        for text in (*texts, (ROOT / "README.md").read_text())
        for names in re.findall(r"minidistill\[([a-z, -]+)\]", text)
        for name in names.split(",")
    }
    assert named
    assert named <= extras.keys()


@pytest.mark.slow
def test_the_wheel_has_all_that_runs_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    for name in files:
        assert OURS.match(name), name
        assert name.rpartition(".")[2] != "pyc", name
    for folder, place in (
        ("minidistill", "minidistill"),
        ("kernels/minidistill_kernels", "minidistill_kernels"),
        ("configs", "minidistill/configs"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                name = f"{place}/{path.relative_to(ROOT / folder)}"
                assert files.get(name) == path.read_bytes(), f"{name} is missing"
    for data in files.values():
        for place in (str(ROOT), str(Path.home()), str(wheel.parent)):
            assert place.encode() not in data


@pytest.mark.slow
def test_the_metadata(wheel: Path) -> None:
    files = contents(wheel)
    folder = f"minidistill-{minidistill.__version__}.dist-info"
    metadata = message_from_bytes(files[f"{folder}/METADATA"])
    assert metadata["Version"] == minidistill.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# minidistill")
    assert files[f"{folder}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"minidistill = minidistill.cli:entry" in files[f"{folder}/entry_points.txt"]
    # every release is described
    assert f"## {minidistill.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        tops = {name.split("/")[1] for name in file.getnames() if "/" in name}
    assert not tops & set(NOT_SHIPPED)
    (direct,) = build(copy(tmp_path / "checkout"), "--wheel").glob("*.whl")
    assert contents(direct) == contents(wheel)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands run."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def command(
    wheel: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Runs a program of a new environment that has the wheel, in a folder of its own.

    The packages that it needs have the versions that are installed here.
    """
    folder = tmp_path_factory.mktemp("installed")
    python = folder / "venv" / "bin" / "python"
    versions = {d.name: d.version.partition("+")[0] for d in distributions()}
    versions.pop("minidistill", None)
    limits = folder / "limits.txt"
    limits.write_text("".join(f"{name}=={number}\n" for name, number in versions.items()))
    settings = uv_settings() if find_spec("uv") is not None else None
    venv.create(folder / "venv", symlinks=True, with_pip=settings is None)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if settings is not None:
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
        install += ["--python", str(python), "--index-strategy", "unsafe-best-match"]
    environment = {**(settings or {}), **os.environ}
    check_call([*install, "--constraint", str(limits), str(wheel)], env=environment)
    clean = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}

    def call(program: str, *arguments: str) -> str:
        return check_call(
            [str(python.with_name(program)), *arguments],
            cwd=elsewhere,
            env={**clean, "HF_HUB_OFFLINE": "1"},
        )

    return call


@pytest.mark.slow
def test_the_commands_run_from_the_wheel_alone(
    command: Callable[..., str], elsewhere: Path
) -> None:
    place = command("python", "-c", "import minidistill; print(minidistill.__file__)")
    assert "site-packages" in place
    assert not place.startswith(str(ROOT))
    out = command("minidistill", "run", "sokoban", "--max_steps", "2", *SETTINGS)
    assert "step 2/2" in out
    prompts = elsewhere / "prompts.txt"
    prompts.write_text("".join(f"What is {n} times {n}?\n" for n in range(24)))
    out = command(
        *("minidistill", "bake", "--model", "tiny-sokoban", "--context", "You are an expert."),
        *("--prompts", prompts.name, "--steps", "2", "--out", "baked"),
    )
    assert "step 2/2" in out
    code = (
        "from minidistill import Run; r = Run('baked'); "
        "print(r.status, r.adapter.is_dir(), r.report.is_file())"
    )
    assert command("python", "-c", code) == "finished True True\n"
