"""What a run has recorded, and the checksums by which a checkpoint counts on it.

`metrics.jsonl` and `SHA256SUMS` grow by lines. `SHA256SUMS` lists the files that are written once,
as `sha256sum -c` reads it. A checkpoint has the length and the checksum of both, so that it counts
on each record of the run. Checksums are kept while the files grow: nothing is read again to save.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from minidistill.reporting.line_file import Extent, LineFile, complete_lines, json_objects
from minidistill.system.files import flush, remove_leftovers, writing

METRICS = "metrics.jsonl"
SUMS = "SHA256SUMS"
REMOVED = "rollouts/removed.txt"
"""Patterns of rollouts' file names, one a line, that the user has removed on purpose."""

_ROLLOUTS = re.compile(r"step_([0-9]{6,})\.(?:jsonl|safetensors)(\.tmp)?")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")

logger = logging.getLogger(__name__)


class _Saved(BaseModel, strict=True):
    """A checkpoint's facts. Those of older versions have no `records`."""

    step: NonNegativeInt
    metrics_lines: NonNegativeInt
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    records: dict[str, Extent] = {}


class Records:
    """The records of the run in the directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.sums = LineFile(path / METRICS), LineFile(path / SUMS)
        self._digests: dict[str, str | None] = {}

    def add(self, sums: Mapping[str, str]) -> None:
        """List files that are complete: their names in the run's directory, and checksums."""
        self.sums.append("".join(f"{sum}  {name}\n" for name, sum in sums.items()))

    def add_files(self, names: Iterable[str]) -> None:
        """List files that are complete, and put them on disk."""
        sums = {}
        for name in names:
            path = self.path / name
            with writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
                flush(path.parent)
        self.add(sums)

    def flush(self) -> dict[str, Any]:
        """Put all records on disk. Returns a checkpoint's facts, which count on them."""
        extents = {file.path.name: file.flush() for file in (self.metrics, self.sums)}
        for folder in (self.path / "rollouts", self.path):  # the names of their files
            with writing(folder):
                flush(folder)
        counted = {name: extent.model_dump() for name, extent in extents.items()}
        return {"metrics_lines": extents[METRICS].lines, "records": counted}

    # -- resuming ------------------------------------------------------------------------------

    def disagreement(self, facts: Mapping[str, Any]) -> str | None:
        """What a checkpoint counts on and the run's files do not have, or None.

        A checkpoint of an older version counts the lines of `metrics.jsonl` only; then each step's
        rollouts have to be there.
        """
        try:
            saved = _Saved.model_validate(facts)
        except ValidationError as error:
            return f"state.json: {first_problem(error)}"
        return _metrics_problem(saved, self.metrics.data()) or self._files_problem(saved)

    def rewind(self, facts: Mapping[str, Any] | None) -> None:
        """Keep what a checkpoint counts on; None is the start. Later steps are repeated.

        `disagreement` has accepted the checkpoint.
        """
        saved = _Saved.model_validate(facts or {"step": 0, "metrics_lines": 0, "seconds": 0.0})
        for name in ("checkpoints", "rollouts", "logs"):
            with writing(self.path / name):
                (self.path / name).mkdir(exist_ok=True)
        extent = saved.records.get(SUMS)
        sums = self._sums(saved.step, extent)
        assert sums is not None
        if extent is not None and extent.of(self.sums.data()) is None:
            logger.warning(f"{SUMS} was damaged, and is made again: the files are as they were")
        removed = [name for _, name in _listed(sums) if self._is_removed(name)]
        if removed:
            logger.warning(f"{len(removed)} files of rollouts are gone, as {REMOVED} says")
        self.metrics.replace(b"".join(complete_lines(self.metrics.data())[: saved.metrics_lines]))
        self.sums.replace(sums)
        remove_leftovers(self.path / "rollouts")
        for file in (self.path / "rollouts").iterdir():
            match = _ROLLOUTS.fullmatch(file.name)
            if match and (match[2] or int(match[1]) > saved.step):
                with writing(file):
                    file.unlink()

    def damage(self) -> str | None:
        """The first listed file that is not as it was when it was listed, or None."""
        return self._changed_file(self.sums.data())

    def listed(self) -> set[str]:
        """The names of the files that are listed."""
        return {name for _, name in _listed(self.sums.data())}

    def all(self) -> Iterator[dict[str, Any]]:
        """The complete records of `metrics.jsonl`."""
        records = json_objects(complete_lines(self.metrics.data()))
        return (record for record in records if isinstance(record.get("step"), int))

    def _files_problem(self, saved: _Saved) -> str | None:
        sums = self._sums(saved.step, saved.records.get(SUMS))
        if sums is None:
            return f"{SUMS} is damaged, and a file that it listed is too"
        if SUMS not in saved.records:
            names = [name for step in range(1, saved.step + 1) for name in rollout_names(step)]
            return self._problem({"is missing": [n for n in names if not self._size(n)]})
        return self._changed_file(sums)

    def _sums(self, step: int, extent: Extent | None) -> bytes | None:
        """`SHA256SUMS` up to a step: as it is, or made again. None if it is another one."""
        if extent is not None and (part := extent.of(self.sums.data())) is not None:
            return part
        names = ["env.json", "baseline.json"]
        names += [name for number in range(1, step + 1) for name in rollout_names(number)]
        again = "".join(f"{sum}  {name}\n" for name in names if (sum := self._digest(name)))
        return again.encode() if extent is None else extent.of(again.encode())

    def _changed_file(self, sums: bytes) -> str | None:
        """The first file of these lines that is not as listed, or None."""
        listed = list(_listed(sums))
        if "".join(f"{sum}  {name}\n" for sum, name in listed).encode() != sums:
            return f"{SUMS} is damaged"
        return self._problem(
            {
                "is damaged": [n for s, n in listed if self._digest(n) not in (s, None)],
                "is missing": [n for _, n in listed if self._digest(n) is None],
            }
        )

    def _problem(self, by_problem: Mapping[str, list[str]]) -> str | None:
        """A sentence about the first of some files, or None without any."""
        for problem, names in by_problem.items():
            names = [name for name in names if not self._is_removed(name)]
            if names:
                others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                hint = f" and {REMOVED} does not name it" if self._is_gone(names[0]) else ""
                return f"{names[0]} {problem}{others}{hint}"
        return None

    def _digest(self, name: str) -> str | None:
        """The checksum of a file, "" if it cannot be read, None if there is none.

        Each file is read once.
        """
        if name not in self._digests:
            path = self.path / name
            self._digests[name] = "" if _is_there(path) else None
            with contextlib.suppress(OSError):
                if path.is_file():
                    with open(path, "rb") as file:
                        self._digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[name]

    def _size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if os.path.isfile(path) else 0

    def _is_removed(self, name: str) -> bool:
        """Whether a file is gone, and the user says that it is."""
        if not self._is_gone(name):
            return False
        patterns: list[str] = []
        with contextlib.suppress(OSError):
            if (self.path / REMOVED).is_file():  # reading a pipe would never end
                patterns = (self.path / REMOVED).read_text(errors="replace").split()
        return any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in patterns)

    def _is_gone(self, name: str) -> bool:
        return name.startswith("rollouts/") and not _is_there(self.path / name)


def _is_there(path: Path) -> bool:
    """Whether there is a file, also one that this user cannot look at."""
    try:
        return path.exists()
    except OSError:
        return True


def rollout_names(step: int) -> tuple[str, str]:
    """The files of a step's rollouts, in the run's directory."""
    return f"rollouts/step_{step:06d}.jsonl", f"rollouts/step_{step:06d}.safetensors"


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a value, and where in it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def _metrics_problem(saved: _Saved, data: bytes) -> str | None:
    extent = saved.records.get(METRICS)
    if extent is not None and extent.lines != saved.metrics_lines:
        return f"state.json: metrics_lines: {METRICS} had {extent.lines} lines"
    if extent is not None and extent.of(data) is not None:
        return None
    lines = complete_lines(data)
    if len(lines) < saved.metrics_lines:
        return f"{METRICS} has {len(lines)} of {saved.metrics_lines} lines"
    for number, line in enumerate(lines[: saved.metrics_lines], 1):
        record = next(json_objects([line]), {})
        if not isinstance(record.get("step"), int):
            return f"line {number} of {METRICS} is damaged"
    return None if extent is None else f"{METRICS} is damaged: it has another checksum"


def _listed(sums: bytes) -> Iterator[tuple[str, str]]:
    """(checksum, name) of each line that is one."""
    for line in complete_lines(sums):
        if match := _SUM.fullmatch(line.decode(errors="replace")[:-1]):
            yield match[1], match[2]
