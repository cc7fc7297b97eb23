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
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from minidistill.files import parse_json, write_atomic, writing

METRICS = "metrics.jsonl"
SUMS = "SHA256SUMS"
REMOVED = "rollouts/removed.txt"
"""Patterns of rollouts' file names, one a line, that the user has removed on purpose."""

_ROLLOUTS = re.compile(r"step_(\d{6,})\.(?:jsonl|safetensors)")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")

logger = logging.getLogger(__name__)


class Extent(BaseModel, frozen=True, strict=True):
    """How much of a file there was, and the checksum of that."""

    lines: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str

    def of(self, data: bytes) -> bytes | None:
        """The part of a file's content that is meant, if it is as it was."""
        part = data[: self.bytes]
        return part if len(part) == self.bytes and _sha256(part) == self.sha256 else None


class _Saved(BaseModel, strict=True):
    """A checkpoint's facts. Those of older versions have no `records`."""

    step: NonNegativeInt
    metrics_lines: NonNegativeInt
    seconds: float
    records: dict[str, Extent] = {}


class LineFile:
    """A text file that grows by whole lines, with a running checksum. Links are not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash: Any = None  # of nothing yet: the file may hold something
        self._lines = self._bytes = 0

    def data(self) -> bytes:
        """The content; empty if there is no file."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes()
        return b""

    def append(self, text: str) -> None:
        """Add lines. Raises UserError (exit code 3) for a full disk."""
        if self._hash is None:
            self._count(self.data())
        data = text.encode()
        with writing(self.path), self._open() as file:
            file.write(data)
        self._add(data)

    def replace(self, data: bytes) -> None:
        """Write the whole content, unless it is that already."""
        if not self.path.is_file() or self.data() != data:
            write_atomic(self.path, data)
        self._count(data)

    def flush(self) -> Extent:
        """Put everything on disk. Returns what there is."""
        if self._hash is None:
            self._count(self.data())
        with writing(self.path), self._open() as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        if size != self._bytes:
            logger.warning(f"another program has changed {self.path}: the run goes on with it")
            self._count(self.data())
        return Extent(lines=self._lines, bytes=self._bytes, sha256=self._hash.hexdigest())

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(self.path, flags, 0o666), "wb")

    def _count(self, data: bytes) -> None:
        self._hash, self._lines, self._bytes = hashlib.sha256(), 0, 0
        self._add(data)

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self._lines += data.count(b"\n")
        self._bytes += len(data)


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
            with writing(self.path / name), open(self.path / name, "rb") as file:
                os.fsync(file.fileno())
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        self.add(sums)

    def flush(self) -> dict[str, Any]:
        """Put all records on disk. Returns a checkpoint's facts, which count on them."""
        extents = {file.path.name: file.flush() for file in (self.metrics, self.sums)}
        for folder in (self.path / "rollouts", self.path):  # the names of their files
            with writing(folder):
                _flush_folder(folder)
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
        try:
            metrics = self.metrics.data()
            return _metrics_problem(saved, metrics) or self._files_problem(saved)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"

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
        self.metrics.replace(b"".join(_lines(self.metrics.data())[: saved.metrics_lines]))
        self.sums.replace(sums)
        for file in (self.path / "rollouts").iterdir():
            step = _ROLLOUTS.fullmatch(file.name)
            is_temporary = file.name.startswith(("step_", ".step_")) and file.suffix == ".tmp"
            if is_temporary or (step and int(step[1]) > saved.step):
                file.unlink()

    def damage(self) -> str | None:
        """The first listed file that is not as it was when it was listed, or None."""
        try:
            return self._changed_file(self.sums.data())
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"

    def listed(self) -> set[str]:
        """The names of the files that are listed."""
        return {name for _, name in _listed(self.sums.data())}

    def all(self) -> Iterator[dict[str, Any]]:
        """The complete records of `metrics.jsonl`."""
        records = _objects(_lines(self.metrics.data()))
        return (record for record in records if isinstance(record.get("step"), int))

    def _files_problem(self, saved: _Saved) -> str | None:
        sums = self._sums(saved.step, saved.records.get(SUMS))
        if sums is None:
            return f"{SUMS} is damaged, and a file that it listed is too"
        if SUMS not in saved.records:
            names = [name for step in range(1, saved.step + 1) for name in rollout_names(step)]
            gone = [n for n in names if not (self._size(n) or self._is_removed(n))]
            return _first(gone, "is missing")
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
        if len(listed) != len(sums.split(b"\n")) - 1 or not sums.endswith((b"", b"\n")):
            return f"{SUMS} is damaged"
        for problem, names in (
            ("is missing", [n for _, n in listed if self._digest(n) is None]),
            ("is damaged", [n for s, n in listed if self._digest(n) not in (s, None)]),
        ):
            if names := [name for name in names if not self._is_removed(name)]:
                return _first(names, problem)
        return None

    def _digest(self, name: str) -> str | None:
        """The checksum of a file; None if it does not exist. Each file is read once."""
        if name not in self._digests:
            path = self.path / name
            self._digests[name] = None
            if path.is_file():
                with open(path, "rb") as file:
                    self._digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[name]

    def _size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.is_file() else 0

    def _is_removed(self, name: str) -> bool:
        """Whether the user says that a file is gone, and it is."""
        if not name.startswith("rollouts/") or (self.path / name).exists():
            return False
        patterns: list[str] = []
        with contextlib.suppress(OSError):
            patterns = (self.path / REMOVED).read_text(errors="replace").split()
        return any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in patterns)


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
    if extent is not None and extent.of(data) is not None:
        return None
    lines = _lines(data)
    if len(lines) < saved.metrics_lines:
        return f"{METRICS} has {len(lines)} of {saved.metrics_lines} lines"
    for number, line in enumerate(lines[: saved.metrics_lines], 1):
        record = next(_objects([line]), {})
        if not isinstance(record.get("step"), int):
            return f"line {number} of {METRICS} is damaged"
    return None if extent is None else f"{METRICS} is damaged: it has another checksum"


def _lines(data: bytes) -> list[bytes]:
    """The complete lines. A writer that was killed may have left half of one."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines."""
    for line in lines:
        with contextlib.suppress(ValueError):
            value = parse_json(line.decode())
            if isinstance(value, dict):
                yield value


def _listed(sums: bytes) -> Iterator[tuple[str, str]]:
    """(checksum, name) of each line that is one."""
    for line in _lines(sums):
        if match := _SUM.fullmatch(line.decode(errors="replace")[:-1]):
            yield match[1], match[2]


def _first(names: list[str], problem: str) -> str | None:
    """A sentence about the first of some files."""
    if not names:
        return None
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} {problem}{others}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

