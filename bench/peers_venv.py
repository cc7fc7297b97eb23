"""The virtual environment in which `bench.peers` runs TRL.

It is made in the cache folder, beside the models of the benchmarks. Packages that this environment
has are used from it, torch and transformers among them, so that both sides run the same versions.
What TRL needs besides is installed into its own, and nothing into this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from minidistill.errors import EXIT_ENVIRONMENT, UserError

TRL = "trl==1.16.0"
"""As in the extra `bench` of pyproject.toml."""


def trl_python() -> Path:
    """The interpreter with TRL. The first call makes its environment (a minute).

    Raises UserError (exit code 3) if TRL cannot be installed.
    """
    major, minor = sys.version_info[:2]
    folder = cache() / f"{TRL.replace('==', '-')}-py{major}{minor}"
    python = folder / "bin" / "python"
    if imports_trl(python):
        return python
    print(f"making an environment for {TRL} in {folder}", flush=True)
    venv.create(folder, clear=True, symlinks=True)
    (site_packages(folder) / "minidistill-bench.pth").write_text(f"{own_packages()}\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", TRL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not imports_trl(python):
        lines = (result.stderr or result.stdout).strip().splitlines() or ["it cannot be imported"]
        raise UserError(
            f"{TRL} was not installed: {lines[-1]}",
            where="bench.peers",
            fix=f"make {TRL} available to pip, with its package index or PIP_FIND_LINKS",
            exit_code=EXIT_ENVIRONMENT,
        )
    return python


def imports_trl(python: Path) -> bool:
    """Whether it has this version of TRL and everything that the peer imports."""
    if not python.exists():
        return False
    version = TRL.partition("==")[2]
    code = f"import trl, datasets, peft; assert trl.__version__ == {version!r}"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "minidistill"


def own_packages() -> str:
    return sysconfig.get_path("purelib")


def site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
