"""Puts the configurations into the package. All else that a build needs is in pyproject.toml.

`configs/` stays where users of a checkout look for it. An editable install reads it there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigurations(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "minidistill" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "configs", target, ignore=caches)


setup(cmdclass={"build_py": BuildWithConfigurations})
