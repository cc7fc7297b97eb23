"""Seeds derived from names and numbers, the same in every process and on every machine."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A 64-bit seed: the BLAKE2b hash of the parts' text, joined by slashes."""
    # the ids of an environment's tasks may have lone surrogates
    text = "/".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
