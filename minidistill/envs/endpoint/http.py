"""As much of HTTP/1.1 as chat clients use, on asyncio's streams. What is read is not trusted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

HEAD_BYTES = 1 << 14
"""Of a request's first line and headers."""
BODY_BYTES = 1 << 24
IDLE_SECONDS = 600.0
"""That a connection may wait for its next request, after one that had the key."""
HEAD_SECONDS, BODY_SECONDS = 10.0, 60.0
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")


class HttpError(Exception):
    """An answer that is an error, in the shape of OpenAI's API."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Their names in lower case."""

    @property
    def keeps_open(self) -> bool:
        return "close" not in self.headers.get("connection", "").lower()


async def read_head(reader: asyncio.StreamReader, patience: float) -> Head | None:
    """The next request; None if there is no other. Raises HttpError, and OSError.

    It is to begin within `patience` seconds.
    """
    try:
        async with asyncio.timeout(patience):
            first = await reader.read(1)
        if not first:
            return None
        async with asyncio.timeout(HEAD_SECONDS):
            head = first + await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise HttpError(431, f"the headers have more than {HEAD_BYTES} bytes") from None
    except TimeoutError:
        raise HttpError(408, "no request was received in time") from None
    line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] not in METHODS or not parts[2].startswith("HTTP/1."):
        raise HttpError(400, "not a request of HTTP/1.1")
    headers: dict[str, str] = {}
    for text in lines:
        name, colon, value = text.partition(":")
        name = name.lower()
        if not colon or name != name.strip() or not name:
            raise HttpError(400, "a header is malformed")
        if name in headers and name in ("content-length", "authorization", "transfer-encoding"):
            raise HttpError(400, f"the header {name} is there twice")
        headers[name] = value.strip()
    return Head(parts[0], parts[1].partition("?")[0], headers)


async def read_body(
    head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bytes:
    """The body of a request. Raises HttpError, and OSError or EOFError if the client has gone."""
    if "transfer-encoding" in head.headers:
        raise HttpError(411, "send the body with its Content-Length, not in chunks")
    length = head.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) < 16):
        raise HttpError(400, "Content-Length is no number")
    if int(length) > BODY_BYTES:
        raise HttpError(413, f"the body has {length} bytes: at most {BODY_BYTES} are read")
    if head.headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await reader.readexactly(int(length))
    except TimeoutError:
        raise HttpError(408, "the body was not received in time") from None


def response(status: int, body: bytes, kind: str, *, keeps_open: bool) -> bytes:
    """The bytes of an answer."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        f"Connection: {'keep-alive' if keeps_open else 'close'}",
        "Cache-Control: no-store",
    ]
    if status == HTTPStatus.UNAUTHORIZED:
        lines.append("WWW-Authenticate: Bearer")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()  # in ASCII: a text may have lone surrogates
