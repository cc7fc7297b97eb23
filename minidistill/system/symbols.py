"""Text for terminals and files that cannot show every character."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

_ASCII = str.maketrans(
    dict.fromkeys("–—·−", "-")
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("“”", '"')
    | {"→": "->", "←": "<-", "≥": ">=", "≤": "<=", "±": "+/-", "×": "x", "…": "..."}
    | {"‖": "||", "⏎": "\\n", "π": "pi"}
)
"""The symbols of our own texts, and quotation marks. Other characters become a ?."""


def ascii_symbols(text: str) -> str:
    """`text` with the symbols of our own texts in ASCII; letters of any script stay."""
    return text.translate(_ASCII)


def encodable(text: str, stream: Any) -> str:
    """What a stream can write of `text`: in an old encoding an arrow is ->, which is no failure."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return ascii_symbols(text).encode(encoding, "replace").decode(encoding)
    return text


def wants_ascii(stream: Any) -> bool:
    """Whether there is no UTF-8: by the stream's encoding, a dumb terminal, or a C locale.

    Python writes UTF-8 in a C locale. Where the user asks for that locale by name, and for no
    encoding, the terminal is taken at its word. A locale that is not set says nothing.
    """
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    if not encoding.startswith("utf") or is_dumb():
        return True
    variables = _first_environment()
    if variables.get("PYTHONIOENCODING") or variables.get("PYTHONUTF8"):
        return False
    names = (variables.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    return next(filter(None, names), "") in ("C", "POSIX")


def is_dumb() -> bool:
    """Whether the terminal says that it cannot move the cursor."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def _first_environment() -> dict[str, str]:
    """The environment that the process was started with: Python has set LC_CTYPE since."""
    with contextlib.suppress(OSError):
        entries = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return dict(os.environ)
