"""Install packages with uv, which takes a fraction of pip's time. Without uv, with pip.

`python -m tools.install ARGUMENTS` does what `pip install ARGUMENTS` does in the environment of
this Python. pip's own settings apply: uv is told of them. If one of them means nothing to uv, or
if uv fails, pip installs. Modules are compiled too: under PYTHONDONTWRITEBYTECODE each process
would compile what it imports again.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

FOR_UV = {
    "cert": "SSL_CERT_FILE",
    "constraint": "UV_CONSTRAINT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "no-cache-dir": "UV_NO_CACHE",
    "timeout": "UV_HTTP_TIMEOUT",
    "trusted-host": "UV_INSECURE_HOST",
}
"""Variables that tell uv what a setting tells pip."""
FOR_PIP_ALONE = {
    *("config-file", "disable-pip-version-check", "no-color", "no-input", "progress-bar"),
    *("quiet", "require-virtualenv", "retries", "root-user-action", "verbose"),
}
"""Settings that change nothing about what is installed."""
SCOPES = ("global", "install", ":env:")
"""Where pip has its settings from. A later one beats an earlier one."""


def main(arguments: Sequence[str]) -> int:
    """Install, and return the exit code."""
    settings = uv_settings()
    if settings is not None and _has_uv():
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode"]
        command += ["--python", sys.executable]
        # as pip does it: the best version in all indexes, not the first index that has any
        command += ["--index-strategy", "unsafe-best-match"]
        if subprocess.run([*command, *arguments], env={**settings, **os.environ}).returncode == 0:
            return 0
        print("uv could not install this: trying pip", file=sys.stderr)
    return _pip(["install", "--quiet", *arguments]).returncode


def uv_settings() -> dict[str, str] | None:
    """Variables with which uv installs as pip does with its settings.

    None if uv has no equivalent of one of them.
    """
    loud = {**os.environ, "PIP_QUIET": "0"}  # a quiet pip lists nothing
    listed = _pip(["config", "list"], env=loud, capture_output=True, text=True, check=True).stdout
    by_scope: dict[str, dict[str, str]] = {scope: {} for scope in SCOPES}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        scope, _, key = name.rpartition(".")
        if scope in by_scope:  # the others are those of other commands
            by_scope[scope][key] = str(ast.literal_eval(value))
    settings = {key: value for scope in SCOPES for key, value in by_scope[scope].items()}
    if settings.keys() - FOR_UV.keys() - FOR_PIP_ALONE:
        return None
    separators = {"find-links": ","}
    return {
        FOR_UV[key]: separators.get(key, " ").join(value.split())
        for key, value in settings.items()
        if key in FOR_UV
    }


def _has_uv() -> bool:
    if importlib.util.find_spec("uv") is not None:
        return True
    return _pip(["install", "--quiet", "uv"], capture_output=True).returncode == 0


def _pip(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
