"""Seeds derived from names and numbers, the same in every process and on every machine."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A 64-bit seed: the BLAKE2b hash of the parts' text, joined by slashes."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
