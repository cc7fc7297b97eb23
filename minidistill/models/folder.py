"""The files of a model in a local folder, checked before a library opens them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from minidistill.errors import UserError
from minidistill.models.registry import resolve
from minidistill.system.files import read_text

AGAIN = "copy or download the model again"
LARGEST = 1 << 28
"""Bytes of a JSON file that is read into memory."""
_OBJECTS = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""Files that hold a JSON object each. transformers ignores a generation config that it cannot
parse, and with it the tokens that end a completion."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them, or for an index of each."""


def check_folder(name: str, key: str) -> None:
    """Check the files of the model `name`, set by the configuration's `key`, if it is a folder.

    Raises UserError for pipes, sockets and devices, which may be waited for or have no end, and for
    JSON files that do not hold what they must. Files that are missing are for the libraries to say.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        return
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        _refuse_special(path, key)
    for file in _OBJECTS:
        if (folder / file).is_file():
            _read_object(folder / file, key)
    if (index := used_index(folder)) is not None:
        for file in _indexed(index, key):
            _refuse_special(folder / file, key)


def used_index(folder: Path) -> Path | None:
    """The index of the weights, if they are in several files."""
    for weights in _WEIGHTS:
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            return None
        if index.is_file():
            return index
    return None


def _indexed(index: Path, key: str) -> set[str]:
    """The files that an index names. Raises UserError."""
    value = _read_object(index, key)
    names, what = value.get("weight_map"), f"{index} is not an index of weights"
    if not (isinstance(names, dict) and names):
        raise UserError(f"{what}: it has no weight_map", key, AGAIN)
    if wrong := [weight for weight, file in names.items() if not isinstance(file, str)]:
        raise UserError(f"{what}: it names no file for {wrong[0]}", key, AGAIN)
    if not isinstance(value.get("metadata"), dict):  # transformers fails without it
        raise UserError(f"{what}: it has no metadata", key, 'add "metadata": {} to it')
    return set(names.values())


def _read_object(path: Path, key: str) -> dict[str, Any]:
    try:
        # a key that is there twice is no error here: there are such models
        value = json.loads(read_text(path, where=key, fix=AGAIN, limit=LARGEST))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", key, AGAIN) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", key, AGAIN)
    return value


def _refuse_special(path: Path, key: str) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a link to nothing: as if it were not there
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(
            f"{path} is not a file, but a pipe, a socket or a device",
            where=key,
            fix="put the model's file in its place, or remove it",
        )
