"""The file of prompts of a bake, as arguments of the environment that reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minidistill.baking.context import check_encoding
from minidistill.errors import UserError
from minidistill.system.files import read_text

FLAG = "--prompts"
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def prompts_args(prompts: str | Path) -> dict[str, Any]:
    """The arguments of `jsonl` for a file of prompts. Raises UserError if it is none."""
    path = Path(prompts).expanduser()
    check_encoding(str(path), FLAG)
    ending = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{prompts} is a folder", FLAG, "name a file of prompts in it")
    if ending not in _ENDINGS:
        raise UserError(
            f"{prompts} has no ending of a file of prompts",
            where=FLAG,
            fix='give a file with one prompt a line (.txt), lines of {"prompt": "…"} (.jsonl), or '
            "rows with a column `prompt` (.csv, .tsv, .parquet, .json)",
        )
    if not path.exists():
        raise UserError(f"there is no file {prompts}", FLAG, "check the path")
    args: dict[str, Any] = {"path": os.path.abspath(path)}
    if ending == ".txt":
        first = read_text(path, where=FLAG).lstrip()[:1]
        if first == "{":
            fix = "give it the ending .jsonl, or write one prompt a line"
            raise UserError(f"{prompts} has lines of JSON, and ends in .txt", FLAG, fix)
        args["format"] = "text"
    return args
