"""Parts of a page that a program writes, each between two comments."""

from __future__ import annotations


def placed(text: str, begin: str, end: str, block: str) -> str:
    """The page with this block on the lines between the two comments.

    Raises ValueError if one of them is not there.
    """
    before, start, rest = text.partition(f"{begin}\n")
    _, stop, after = rest.partition(f"{end}\n")
    if not (start and stop):
        raise ValueError(f"the page has no place for it: add {begin} and {end}")
    return f"{before}{start}{block}\n{stop}{after}"
