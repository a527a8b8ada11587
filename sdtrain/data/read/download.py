"""The bytes behind an http address, from a server that may lie, drip or never end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from sdtrain.data.read.budget import DOWNLOAD_SEC, SLOWEST, STALL_SEC

CHUNK = 1 << 20
WATCH_SEC = 0.5


class Watch:
    """Ends the connections of one download when it takes longer than DOWNLOAD_SEC + bytes / SLOWEST.

    A time-out of single reads alone would let a server send a byte a minute for ever, also inside a header.
    """

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.num_bytes, self.is_over = 0, False
        self._begun, self._done = time.monotonic(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def stop(self) -> None:
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(WATCH_SEC):
            if self.seconds > DOWNLOAD_SEC + self.num_bytes / SLOWEST:
                self.is_over = True
                for one in self.sockets:
                    _end(one)


def _end(one: socket.socket) -> None:
    try:
        socket.socket.shutdown(one, socket.SHUT_RDWR)  # not the method of TLS, which is no friend of other threads
    except OSError:
        pass  # it has ended already


def http_chunks(url: str) -> Iterator[bytes]:
    """Raises OSError when it ends early, is too slow, or is anything but a plain answer."""
    with _watched() as watch, _opened(url, watch) as answer:
        announced = answer.headers.get("Content-Length")
        while chunk := answer.read1(CHUNK):
            watch.num_bytes += len(chunk)
            yield chunk
        if watch.is_over or not watch.num_bytes:  # a connection that ends in a header looks like an empty answer
            raise OSError("the server sends nothing")
        if announced is not None and int(announced) != watch.num_bytes:
            raise OSError(f"the connection ended after {watch.num_bytes} of {int(announced)} bytes")


@contextmanager
def _watched() -> Iterator[Watch]:
    watch = Watch()
    try:
        yield watch
    except Exception as error:  # http.client raises many types on hostile answers
        if watch.is_over:
            raise OSError(f"too slow: {watch.num_bytes} bytes in {watch.seconds:.0f} s") from None
        if isinstance(error, OSError):
            raise
        raise OSError(str(error) or type(error).__name__) from None
    finally:
        watch.stop()


@contextmanager
def _opened(url: str, watch: Watch) -> Iterator[HTTPResponse]:
    try:
        answer = _opener(watch).open(Request(url, headers={"Accept-Encoding": "identity"}), timeout=STALL_SEC)
    except HTTPError as error:
        error.close()
        raise
    with answer:
        if answer.status != 200:
            raise OSError(f"the server answers {answer.status} instead of 200")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("the server sends it in another encoding")
        yield answer


def _opener(watch: Watch) -> OpenerDirector:
    """Follows redirects to http and https alone: an address never becomes a file of this machine."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watch.sockets.append(self.sock)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            watch.sockets.append(self.sock)

    class Http(HTTPHandler):
        def http_open(self, request: Request) -> HTTPResponse:
            return self.do_open(Plain, request)

    class Https(HTTPSHandler):
        def https_open(self, request: Request) -> HTTPResponse:
            return self.do_open(Secure, request)

    opener = OpenerDirector()
    errors = (HTTPDefaultErrorHandler(), HTTPErrorProcessor(), HTTPRedirectHandler(), UnknownHandler())
    for handler in (ProxyHandler(), Http(), Https(), *errors):
        opener.add_handler(handler)
    return opener
