"""The page as an ASGI application: who may ask, for what, how much and how long. Nothing of a request is a path.

GET  /TOKEN/             page.html; page.css and page.js beside it
GET  /TOKEN/about        JSON: what the network is, and the limits
POST /TOKEN/make?...     settings in the query, an upload in the body -> a PNG; the header `made` is JSON
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from sdtrain.serve.process import Refused
from sdtrain.terminal import clip

Headers = dict[bytes, bytes]
Answer = tuple[str, Headers, bytes]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

QUEUE = 4  # requests that wait while one is worked on; each holds its upload
MOST_SETTINGS = 16
HERE = ("127.0.0.1", "localhost", "[::1]")
TEXT = "text/{}; charset=utf-8"
FILES = {"": ("page.html", "html"), "page.css": ("page.css", "css"), "page.js": ("page.js", "javascript")}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
ALWAYS: Headers = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Maker(Protocol):
    def make(self, settings: dict[str, str], data: bytes) -> tuple[dict[str, Any], bytes]: ...


class Page:
    """One page over one network, for who knows the token."""

    def __init__(
        self, network: Maker, about: dict[str, Any], *, token: str, max_bytes: int, max_seconds: float
    ) -> None:
        """`max_bytes` of an upload, `max_seconds` for it to arrive; the network has a limit of its own."""
        self.network, self.token, self.max_bytes, self.max_seconds = network, token, max_bytes, max_seconds
        folder = Path(__file__).parent
        self.fixed = {name: (TEXT.format(kind), (folder / file).read_bytes()) for name, (file, kind) in FILES.items()}
        self.fixed["about"] = "application/json", json.dumps({**about, "max_bytes": max_bytes}).encode()
        self.num_asked = 0
        self.turn = asyncio.Lock()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            status, (kind, more, body) = 200, await self._answer(scope, receive)
        except Refused as refused:
            status, kind, body = refused.status, TEXT.format("plain"), refused.sentence.encode()
            more = {b"connection": b"close"}  # what is still on its way is not read
        sizes = {b"content-type": kind.encode(), b"content-length": str(len(body)).encode()}
        headers = list({**ALWAYS, **sizes, **more}.items())
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: dict[str, Any], receive: Receive) -> Answer:
        headers: Headers = dict(scope["headers"])
        refuse_foreign(headers)
        name = self._name(scope["path"])
        method = "POST" if name == "make" else "GET"
        if scope["method"] != method:
            raise Refused(405, f"ask for this with {method}")
        if name == "make":
            return await self._make(settings_of(scope["query_string"]), headers, receive)
        kind, body = self.fixed[name]
        return kind, {}, body

    def _name(self, path: str) -> str:
        token, _, name = path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            raise Refused(403, "this address lacks its token; open the whole one that `sdtrain serve` printed")
        if name not in (*self.fixed, "make"):
            raise Refused(404, f"there is no {clip(name)!r} here")
        return name

    async def _make(self, settings: dict[str, str], headers: Headers, receive: Receive) -> Answer:
        if self.num_asked > QUEUE:
            raise Refused(503, f"busy: one request is worked on and {QUEUE} wait; try again in a moment")
        self.num_asked += 1
        try:
            data = await self._in_time(self._upload(headers, receive))
            async with self.turn:
                said, made = await asyncio.to_thread(self.network.make, settings, data)
        finally:
            self.num_asked -= 1
        return "image/png", {b"made": json.dumps(said).encode()}, made

    async def _in_time(self, upload: Awaitable[bytes]) -> bytes:
        try:
            return await asyncio.wait_for(upload, self.max_seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the upload took longer than {self.max_seconds:g} s and was given up") from None

    async def _upload(self, headers: Headers, receive: Receive) -> bytes:
        """The body; a part of one that is too large is not kept."""
        data, more = bytearray(), True
        self._refuse_large(int(headers.get(b"content-length", b"0")))
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the upload was cut short")
            data += message.get("body", b"")
            self._refuse_large(len(data))
            more = message.get("more_body", False)
        return bytes(data)

    def _refuse_large(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise Refused(
                413, f"an upload may have {self.max_bytes / (1 << 20):g} MB (--max-upload-mb); make it smaller"
            )


def refuse_foreign(headers: Headers) -> None:
    """Raise Refused for a name that leads here (DNS rebinding) and for what other pages in the browser ask."""
    host = headers.get(b"host", b"").decode("latin-1")
    name, _, port = host.rpartition(":")
    if (name if name and port.isdigit() else host) not in HERE:
        raise Refused(403, f"this page is under {HERE[0]} or {HERE[1]}, not under {clip(host)!r}")
    origin = headers.get(b"origin", b"http://" + host.encode("latin-1")).decode("latin-1")
    if origin != f"http://{host}":
        raise Refused(403, f"another page ({clip(origin)}) asked for this; only the one of `sdtrain serve` may")


def settings_of(query: bytes) -> dict[str, str]:
    """Raises Refused for what is no query of this page."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=MOST_SETTINGS)
    except ValueError:
        raise Refused(400, f"the settings cannot be read; a page asks for at most {MOST_SETTINGS}") from None
    return dict(pairs)
