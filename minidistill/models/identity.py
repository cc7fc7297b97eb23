"""What tells a model from another one, without reading all of its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from minidistill.config import Config
from minidistill.models.registry import resolve

BLOCKS, BLOCK = 64, 1 << 14
"""Pieces that are read of a file of weights, and the bytes of each: training changes all of it."""
_TEXTS = (".json", ".jinja", ".model", ".txt")


def model_identity(config: Config) -> str:
    """Equal for equal models: the name and revision on the hub, or a hash of a folder's files."""
    folder = Path(resolve(config.model.name)).expanduser()
    if not folder.is_dir():
        return f"{config.model.name}@{config.model.revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (*_TEXTS, ".safetensors", ".bin"):
            size = os.path.getsize(path)
            digest.update(f"{path.name}/{size}/".encode())
            _add(path, size, digest)
    return digest.hexdigest()


def _add(path: Path, size: int, digest: hashlib._Hash) -> None:
    whole = path.suffix in _TEXTS or size <= BLOCKS * BLOCK
    with open(path, "rb") as file:
        for index in range(1 if whole else BLOCKS):
            file.seek(index * (size - BLOCK) // (BLOCKS - 1) if not whole else 0)
            digest.update(file.read(-1 if whole else BLOCK))
