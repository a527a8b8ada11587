"""The process that holds a network: one job at a time, killed where it is when its time is up, and started anew.

Messages go both ways through pipes: a line of JSON, [what is said, how many bytes follow], and the bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from sdtrain.errors import ConfigError


class Refused(Exception):
    """An answer that is one sentence, with the HTTP status it is given under."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def send(stream: IO[bytes], said: dict[str, Any], data: bytes = b"") -> None:
    stream.write(json.dumps([said, len(data)]).encode() + b"\n" + data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError when the other side has ended."""
    line = stream.readline()
    if not line:
        raise EOFError
    said, num_bytes = json.loads(line)
    return said, stream.read(num_bytes)


class NetworkProcess:
    """A network in a process of its own (`worker.py`); not for several threads at once."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """`setup`: path, weights, device, max_image_mb and max_seconds, as `sdtrain serve` was given them."""
        self._setup, self._closed = setup, False
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._about: dict[str, Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sdtrain.serve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the server, which ends this one
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        send(self._in, self._setup)

    def about(self) -> dict[str, Any]:
        """What the page should know of the network, once it is loaded. Raises ConfigError when it cannot be."""
        try:
            return self._loaded()
        except EOFError:
            raise ConfigError(self._ended().sentence) from None

    def make(self, settings: dict[str, str], data: bytes) -> tuple[dict[str, Any], bytes]:
        """(what is told of it, a PNG) of some settings and an upload. Raises Refused with the reason for none."""
        try:
            self._loaded()
            send(self._in, settings, data)
            said, made = receive(self._out)
        except (EOFError, BrokenPipeError):
            raise self._ended() from None
        except ConfigError as error:  # it was there when the server started
            self._ended()
            raise Refused(500, str(error)) from None
        if "refused" in said:
            raise Refused(422, said["refused"])
        return said, made

    def _loaded(self) -> dict[str, Any]:
        if self._about is None:
            said, _ = receive(self._out)
            if "refused" in said:
                raise ConfigError(said["refused"])
            self._about = said
        return self._about

    def _ended(self) -> Refused:
        """Start it anew; the answer to whom it has failed."""
        code = self._process.wait()
        self._shut()
        if not self._closed:
            self._start()
        if code == -signal.SIGALRM:
            limit = f"{self._setup['max_seconds']:g} s"
            return Refused(504, f"it took longer than {limit} and was stopped; ask for less, or raise --max-seconds")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = "there may be too little memory" if code == -signal.SIGKILL else "the terminal of the server says more"
        return Refused(500, f"the process of the network {how}; {hint}")

    def kill(self) -> None:
        """End it for good, whatever it is doing, also while another thread waits for it; for signal handlers."""
        self._closed = True
        self._process.kill()

    def close(self) -> None:
        """`kill`, and leave nothing open; safe to call twice."""
        self.kill()
        self._process.wait()
        self._shut()

    def _shut(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # what it was not told any more
            self._in.close()
        self._out.close()
