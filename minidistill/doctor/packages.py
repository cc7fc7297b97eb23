"""Python and the packages that minidistill needs, in the versions that it works with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

import tomli
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from minidistill.doctor.result import Result, failed, passed

SHOWN = ("torch", "triton", "transformers", "peft")
"""Packages whose versions are said."""


def python() -> Result:
    """Python is new enough, and the system is one that is supported."""
    needed, _ = needs()
    version = platform.python_version()
    text = f"{version} on {platform.system()} {platform.machine()}"
    if not SpecifierSet(needed).contains(version, prereleases=True):
        return failed(f"{text}, and minidistill needs {needed}", f"use Python {needed}")
    if sys.platform != "linux":
        return failed(text, "use Linux: minidistill is made for it")
    return passed(text)


def packages() -> Result:
    """Everything that minidistill needs is installed, in a version within its range."""
    _, requirements = needs()
    problems, fixes = [], []
    for requirement in requirements:
        found = installed(requirement.name)
        if found is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is not {requirement.specifier}")
        else:
            continue
        fixes.append(f"'{requirement.name}{requirement.specifier}'")
    if problems:
        return failed("; ".join(problems), f"pip install {' '.join(fixes)}")
    return passed(", ".join(f"{name} {installed(name)}" for name in SHOWN if installed(name)))


def installed(package: str) -> str | None:
    """The version that is installed according to its metadata, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def needs() -> tuple[str, list[Requirement]]:
    """The versions of Python and the packages that apply here, without extras.

    From the metadata of the package, or of the checkout that runs.
    """
    try:
        facts = metadata.metadata("minidistill")
        python, lines = facts["Requires-Python"], facts.get_all("Requires-Dist") or []
    except metadata.PackageNotFoundError:
        path = Path(__file__).parents[2] / "pyproject.toml"
        project = tomli.loads(path.read_text(encoding="utf-8"))["project"]
        python, lines = project["requires-python"], project["dependencies"]
    requirements = map(Requirement, lines)
    return python, [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
