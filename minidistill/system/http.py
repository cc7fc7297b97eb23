"""What all HTTP clients share: the key, bounded answers, and what may be shown of either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minidistill.errors import EXIT_ENVIRONMENT, UserError, printable

if TYPE_CHECKING:
    import httpx

REPEATED = {408, 409, 425, 429, 500, 502, 503, 504}  # what a server may answer better later
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between repetitions
BODY_SECONDS = 120.0  # from the first byte of an answer to its last
SHOWN = 300  # characters of what a server sent

# User and password, and values of a query, in whatever has a URL. What is repeated matches no first
# character of its pattern: a text of megabytes would take hours.
_SECRETS = (
    (re.compile(r"(\w://)[^\s/@\"']+@"), r"\1***@"),
    (re.compile(r"([?&][^\s=?&#\"']+=)[^\s&#\"']+"), r"\1***"),
)


class BrokenError(Exception):
    """There is no answer: the server cannot be reached, or the connection broke."""


class BadAnswerError(Exception):
    """An answer that does not match its request. The message quotes it."""


def check_address(url: str) -> str:
    """A URL as it is. Raises ValueError for one whose host or port no connection can be made to."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host.encode("idna")  # as looking it up does: an empty or a long part is a UnicodeError
    if not host or not url.isprintable() or parts.port == 0:  # reading a wrong port fails
        raise ValueError("it names no host")
    return url


def without_secrets(text: str) -> str:
    """`text` without what URLs in it may keep secret."""
    if "://" in text:
        for pattern, shown in _SECRETS:
            text = pattern.sub(shown, text)
    return text


def read_key(name: str, where: str) -> str:
    """The API key in an environment variable, "" without one.

    Raises UserError (exit code 3) for one that cannot be sent. It does not show the key.
    """
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the environment variable {name} holds no API key: it has white space, or letters "
            "that are not ASCII",
            where=where,
            fix="set it to the key alone",
            exit_code=EXIT_ENVIRONMENT,
        )
    return key


def headers(key: str) -> dict[str, str]:
    """A request's headers. An answer is not to be compressed: its size would have no bound."""
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Accept-Encoding": "identity", **authorization}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read in full."""

    status: int
    data: bytes = field(repr=False)
    key: str = field(repr=False)
    """Of the request; servers may repeat it."""
    wait: float = 0.0
    """Seconds after which the server wants to be asked again; 0 if it does not say."""

    @property
    def beginning(self) -> str:
        """The beginning of it, for a message."""
        return quoted(self.data.decode(errors="replace"), self.key) or "nothing"

    def json(self) -> Any:
        """Its value. Raises BadAnswerError. Numbers may be NaN or infinite."""
        try:
            return json.loads(self.data)
        except (ValueError, RecursionError):
            raise BadAnswerError(f"it is no JSON: {self.beginning}") from None

    def message(self) -> str:
        """The error message in it, or its beginning, on one line, with the status."""
        text = self.beginning
        try:
            value = json.loads(self.data)
            value = value["error"] if "error" in value else value["detail"]
            value = value["message"] if isinstance(value, dict) else value
            text = quoted(str(value), self.key) or text
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        return f"{text} (HTTP {self.status})"


def one_line(text: str) -> str:
    """A foreign text in a message: one line, without control characters, cut."""
    return _cleaned(text)[:SHOWN]


def quoted(text: str, key: str) -> str:
    """What a server sent, in a message: as of `one_line`, and `hidden`.

    The key is hidden before anything is cut, which could leave a part of it, and again when the
    control characters that may stand within it are gone.
    """
    return hidden(_cleaned(text.replace(key, "***") if key else text), key)[:SHOWN]


def _cleaned(text: str) -> str:
    return printable(" ".join(text[: 8 * SHOWN].split()))


def hidden(text: str, key: str) -> str:
    """`text` without the key, and without what URLs in it may keep secret."""
    return without_secrets(text.replace(key, "***") if key else text)


@contextlib.contextmanager
def opening(key: str, where: str) -> Iterator[None]:
    """Make a client. Raises UserError (exit code 3) if the environment or the URL forbids that."""
    import httpx

    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        raise UserError(
            f"no HTTP request can be made: {quoted(str(error), key) or type(error).__name__}",
            where=where,
            fix="correct the URL, or these environment variables if they are set: HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR, SSLKEYLOGFILE",
            exit_code=EXIT_ENVIRONMENT,
        ) from None


async def ask(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: Any,
    key: str,
    largest: int,
    arrived: Callable[[], None] = lambda: None,
) -> Answer:
    """Send a request with the client's `key`, and read its answer of at most `largest` bytes.

    `arrived` is called whenever a part of it has come. Redirects are not followed. Raises
    BrokenError and BadAnswerError.
    """
    import httpx

    data = bytearray()
    try:
        async with client.stream(method, url, json=body, follow_redirects=False) as response:
            arrived()
            if response.is_redirect:
                raise BadAnswerError(
                    f"it redirects (HTTP {response.status_code}), which is not followed: give its "
                    "own address"
                )
            coding = response.headers.get("Content-Encoding", "identity")
            if coding.strip().lower() not in ("", "identity"):
                raise BadAnswerError(f"it is compressed ({one_line(coding)[:40]}), unasked")
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in response.aiter_raw():
                    arrived()
                    data += chunk
                    if len(data) > largest:
                        size = f"{largest >> 20} MiB" if largest >= 1 << 20 else f"{largest} bytes"
                        raise BadAnswerError(f"its answer is larger than {size}")
    except TimeoutError:
        raise BrokenError(f"its answer stopped after {len(data)} bytes") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # such as of a host's name
        # the name alone says enough of one without a message, like a time-out
        raise BrokenError(quoted(str(error), key) or type(error).__name__) from None
    return Answer(response.status_code, bytes(data), key, _seconds(response.headers))


def _seconds(fields: httpx.Headers) -> float:
    try:
        seconds = float(fields.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
    return seconds if 0 <= seconds < 1e6 else 0.0
