"""A checkpoint's files: what is listed and sealed, and what is wrong with them.

Nothing in a checkpoint is trusted before it has been compared with the manifest. Files are opened
only if they are regular files within the checkpoint: a pipe would wait, a device might never end.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from minidistill.system.files import flush, parse_json

MANIFEST, STATE, TENSORS = "MANIFEST.json", "state.json", "state.safetensors"
LARGEST_TEXT = 1 << 28
"""Bytes of a JSON file that is read into memory."""
_NAME = re.compile(r"step_([0-9]{6,})")


class DamageError(Exception):
    """What is wrong with a checkpoint."""


def number(path: Path) -> int | None:
    """The step of a checkpoint's folder; None for anything else, which is not ours."""
    match = _NAME.fullmatch(path.name)
    if match is None or path.name != f"step_{int(match[1]):06d}":
        return None
    return int(match[1]) if path.is_dir() else None


def seal(folder: Path, tensors: int) -> None:
    """List the files in a folder with their sizes and checksums, and flush all of it to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {str(p.relative_to(folder)): p for p in files}
    manifest = {
        "sha256": {name: sha256(open_file(folder, name)) for name in names},
        "bytes": {name: path.stat().st_size for name, path in names.items()},
        "tensors": tensors,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    flush_tree(folder)


def flush_tree(folder: Path) -> None:
    """Flush a folder to disk with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def open_file(folder: Path, name: str) -> BinaryIO:
    """Open a regular file within a folder. Raises DamageError for anything else."""
    shown = _short(name)
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise DamageError(f"{MANIFEST} lists {shown!r}, which is outside")
    try:
        for depth in range(len(parts)):
            if stat.S_ISLNK((folder / Path(*parts[:depth])).lstat().st_mode):
                raise DamageError(f"{'/'.join(parts[:depth]) or folder.name} is a link")
        # without waiting for a pipe's other end, and not through a link
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        mode = (folder / name).lstat().st_mode
        if not stat.S_ISREG(mode):  # opening a device may have an effect
            kind = "a link" if stat.S_ISLNK(mode) else "not a file"
            raise DamageError(f"{shown} is {kind}")
        descriptor = os.open(folder / name, flags)
    except FileNotFoundError:
        raise DamageError(f"{shown} is missing") from None
    except OSError as error:
        raise DamageError(f"{shown} cannot be read: {error.strerror}") from None
    except UnicodeEncodeError:  # a lone surrogate
        raise DamageError(f"{shown!r} is no name that a file can have") from None
    return open(descriptor, "rb")


def sha256(file: BinaryIO) -> str:
    """The checksum of an open file, which is closed."""
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises DamageError."""
    with open_file(folder, name) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
            raise DamageError(f"{name} is too large")
        try:
            value = parse_json(io.TextIOWrapper(file, "utf-8").read())
        except (OSError, ValueError) as error:
            raise DamageError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise DamageError(f"{name} holds no JSON object")
    return value


def read_manifest(folder: Path) -> tuple[dict[str, str], dict[str, int], int | None]:
    """The checksums and the sizes of the listed files, and the number of tensors.

    Checkpoints of older versions have checksums alone. Raises DamageError.
    """
    manifest = read_object(folder, MANIFEST)
    sums, sizes = manifest.get("sha256"), manifest.get("bytes", {})
    if not (isinstance(sums, dict) and isinstance(sizes, dict)):
        raise DamageError(f"{MANIFEST} lists no files")
    for name in (STATE, TENSORS):
        if name not in sums:
            raise DamageError(f"{MANIFEST} does not list {name}")
    return sums, sizes, manifest.get("tensors")


def is_changed(folder: Path, name: str) -> bool:
    """Whether the manifest has another checksum of a file. It may be of another format."""
    try:
        return read_manifest(folder)[0].get(name) != sha256(open_file(folder, name))
    except (DamageError, OSError):
        return False


def check_sizes(folder: Path) -> None:
    """Raise DamageError if a file is missing or has another size: a check that reads little."""
    sums, sizes, _ = read_manifest(folder)
    for name in sums:
        with open_file(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if sizes.get(name, size) != size:
                raise DamageError(f"{name} has {size} bytes, not {sizes[name]}")


def check_files(folder: Path) -> None:
    """Raise DamageError if a file is missing, has another size or another checksum."""
    check_sizes(folder)
    sums, _, _ = read_manifest(folder)
    for name, expected in sums.items():
        try:
            found = sha256(open_file(folder, name))
        except OSError as error:
            raise DamageError(f"{name} cannot be read: {error.strerror}") from None
        if found != expected:
            raise DamageError(f"{name} has another checksum")


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's dtype, under safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(_DTYPES[tensor.dtype], tuple(tensor.shape))


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def read_forms(folder: Path) -> dict[str, Form]:
    """What tensors a checkpoint says it has, by name. Raises DamageError.

    Reads no values: safetensors compares the sizes with the file's.
    """
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Form(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{TENSORS}: {error}") from None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, on the CPU. Raises DamageError if a value is not finite."""
    try:
        tensors: dict[str, Tensor] = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{TENSORS}: {error}") from None
    if (name := not_finite(tensors)) is not None:
        raise DamageError(f"{name} has values that are not finite")
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or infinity, or None."""
    return next((n for n, t in tensors.items() if not torch.isfinite(t).all()), None)


_MOMENT = re.compile(r"optimizer/(exp_avg|exp_avg_sq|step)/(.+)")
_WEIGHTS = "policy/student/"


def check_forms(found: Mapping[str, Form], expected: Mapping[str, Form], count: int | None) -> None:
    """Raise DamageError unless a checkpoint has the expected weights, and moments for them.

    `count` is the number of tensors that were saved, if it is known. A parameter that no gradient
    has reached has no moments. Others have all three.
    """
    wanted = dict(expected)
    weights = {n.removeprefix(_WEIGHTS): f for n, f in expected.items() if n.startswith(_WEIGHTS)}
    moments: dict[str, set[str]] = {}
    for name in found:
        match = _MOMENT.fullmatch(name)
        if match is not None and match[2] in weights:
            kind, parameter = match[1], match[2]
            moments.setdefault(parameter, set()).add(kind)
            stepped = expected.get(f"optimizer/master/{parameter}", weights[parameter])
            wanted[name] = Form("F32", ()) if kind == "step" else stepped
    for parameter, kinds in moments.items():
        if len(kinds) < 3:
            raise DamageError(f"{TENSORS} lacks a part of the moments of {parameter}")
    if missing := sorted(wanted.keys() - found.keys()):
        raise DamageError(f"{TENSORS} lacks {_first(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise DamageError(f"{TENSORS} has {_first(unknown)}, which this run does not have")
    if not moments:
        raise DamageError(f"{TENSORS} has no moments of the optimizer")
    if count is not None and count != len(found):
        raise DamageError(f"{TENSORS} has {len(found)} tensors, not {count}")
    for name, form in wanted.items():
        if found[name] != form:
            raise DamageError(f"{name} is {found[name]}, not {form}")


def other_number_format(found: Mapping[str, Form], expected: Mapping[str, Form]) -> bool:
    """Whether a checkpoint is of a run whose weights all have another dtype."""
    names = [name for name in expected if name.startswith(_WEIGHTS)]
    return all(name in found and found[name].dtype != expected[name].dtype for name in names)


def _first(names: list[str]) -> str:
    return _short(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:99]}…"
