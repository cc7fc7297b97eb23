"""The context of a bake: a text, or a file with one."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from minidistill.errors import UserError
from minidistill.system.files import read_text

FLAG = "--context"
_FIX = 'give a text, --context "You are …", or the path of a file with it'
_ENDINGS = (".txt", ".md")
_WORDS, _LONGEST = 4, 40
"""Of a name that is made of a text: words, and characters."""


def read_context(context: str | Path) -> str:
    """The text, without white space around it. Raises UserError as `read_exactly`."""
    return read_exactly(context).strip()


def read_exactly(context: str | Path) -> str:
    """The text as it is. A path of a file stands for the file's text.

    Raises UserError if it is empty, and for what looks like a path and is not there.
    """
    if isinstance(context, Path) or _is_file(context):
        path = Path(context).expanduser()
        text = read_text(path, where=FLAG, fix="check the path")
        empty = f"the context {path} is empty"
    else:
        text, empty = context, "the context is empty"
        if context.strip() and os.path.isdir(_expanded(context)):
            raise UserError(f"the context {context} is a folder", FLAG, "name a file in it")
        if looks_like_path(context):
            raise UserError(
                f"there is no file {context}",
                where=FLAG,
                fix="check the path; a text of one word that has a / or ends in .txt or .md is "
                "taken for a path",
            )
        if beside := _file_of_name(context):
            raise UserError(
                f"the context would be the word {context.strip()!r}, and there is a file {beside}",
                where=FLAG,
                fix=f"name the file, {FLAG} {beside}, or give a text of several words",
            )
    check_encoding(text, FLAG)
    if not text.strip():
        raise UserError(empty, FLAG, _FIX)
    return text


def check_encoding(text: str, flag: str) -> None:
    """Raise UserError for an argument whose bytes are no UTF-8: a TOML file cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{ascii(text)[:200]} is not valid UTF-8", flag) from None


def looks_like_path(text: str) -> bool:
    """Whether a text is meant as a path: one word with a separator or a text file's ending."""
    text = text.strip()
    if not text or re.search(r"\s", text):
        return False
    return os.sep in text or text.lower().endswith(_ENDINGS)


def _file_of_name(text: str) -> str:
    """The text file that one word names if its ending was forgotten, or ""."""
    word = text.strip()
    if re.search(r"\s", word):
        return ""
    return next((file for end in _ENDINGS if _is_file(file := word + end)), "")


def name_of(context: str | Path, text: str) -> str:
    """A name for the run: the file's, or the first words of the text."""
    is_file = isinstance(context, Path) or _is_file(context)
    words = Path(context).expanduser().stem if is_file else text[:400]
    plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    found = re.findall(r"[a-z0-9]+", plain)
    return "-".join(found if is_file else found[:_WORDS])[:_LONGEST].strip("-") or "bake"


def _is_file(text: str) -> bool:
    return os.path.isfile(_expanded(text)) or _is_pipe(text)


def _is_pipe(text: str) -> bool:
    """Whether it names a pipe: /dev/stdin, or a process substitution of a shell."""
    return text.startswith("/dev/") and os.path.exists(text) and not os.path.isdir(text)


def _expanded(text: str) -> str:
    try:
        return str(Path(text).expanduser())
    except (ValueError, RuntimeError):  # a user without a home
        return text
