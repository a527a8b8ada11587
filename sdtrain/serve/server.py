"""Listening, on this machine alone, until somebody ends it."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from sdtrain.errors import ConfigError
from sdtrain.serve.app import Page
from sdtrain.serve.process import NetworkProcess

HOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 7860, 40


def listen(port: int | None) -> socket.socket:
    """A socket at `port`, or at the first free one from 7860. Raises ConfigError when there is none."""
    tried = [port] if port else range(FIRST_PORT, FIRST_PORT + NUM_PORTS)
    for number in tried:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, number))
            listening.listen()
            return listening
        except OSError as error:
            listening.close()
            why = error.strerror
    found = f"port {port} cannot be used ({why})" if port else f"no port from {tried[0]} to {tried[-1]} is free"
    raise ConfigError(f"{found}; name a free one with --port N")


class Server(uvicorn.Server):
    """Ends at once at a signal, with the work in hand: a picture can be asked for again."""

    def __init__(self, page: Page, network: NetworkProcess) -> None:
        plain = uvicorn.Config(
            page,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(plain)
        self.network = network

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut short now is no fault
        self.network.kill()
        self.force_exit = True
        super().handle_exit(sig, frame)
