"""The process of one check: `python -m minidistill.doctor.probe NAME DESCRIPTOR`.

The result goes to the file descriptor, as JSON. What the check prints is shown if it fails.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module

from minidistill.doctor.catalog import CHECKS, Check
from minidistill.doctor.isolated import LONGEST
from minidistill.doctor.result import Result, failed
from minidistill.errors import UserError, bounded, printable
from minidistill.system.foreign import describe
from minidistill.system.threads import settle_threads

TEXT = 2000  # characters of a part of a result


def look(check: Check) -> Result:
    """Make a check in this process. Whatever it raises is its failure."""
    module, _, name = check.function.partition(":")
    try:
        function: Callable[[], Result] = getattr(import_module(module), name)
        return function()
    except UserError as error:
        return failed(error.what, error.fix or check.fix)
    except ModuleNotFoundError as error:
        return failed(f"the package {error.name} is missing", f"pip install {error.name}")
    except BaseException as error:  # also what is no Exception: packages may raise anything
        return failed(describe(error), check.fix)


def main(arguments: list[str]) -> None:
    name, descriptor = arguments
    settle_threads()  # before torch loads OpenMP
    result = look(next(check for check in CHECKS if check.name == name))
    parts = {key: bounded(printable(text), TEXT) for key, text in asdict(result).items()}
    answer = json.dumps(parts).encode()
    assert len(answer) < LONGEST
    os.write(int(descriptor), answer)


if __name__ == "__main__":
    main(sys.argv[1:])
