"""`sdtrain serve RUN|FILE`: a page on this machine to try a network: pictures before and after, or latents to move."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import secrets
import webbrowser
from pathlib import Path

from sdtrain.commands.source import ROLE
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.serve.app import Page
from sdtrain.serve.process import NetworkProcess

MOST_SECONDS = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "run folder (its best weights), checkpoint, or file of a generator or a super-resolution network"
    add("path", type=Path, metavar="RUN|FILE", help=what)
    add("--port", type=int, help="port on 127.0.0.1, where alone it listens (default: the first free one from 7860)")
    add("--open", action="store_true", help="open the page in a browser")
    add("--weights", choices=tuple(ROLE), default="ema", help="the average of the generator, or the generator itself")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--max-upload-mb", type=float, default=32, metavar="MB", help="size of an upload (default: 32)")
    add("--max-image-mb", type=int, default=512, metavar="MB", help="memory one picture may cost (default: 512)")
    seconds = "for an upload to arrive, and for the work on it (default: 120)"
    add("--max-seconds", type=float, default=120, metavar="SEC", help=seconds)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises ConfigError or WeightsError before anything listens."""
    check(args)
    from sdtrain.serve.server import Server, listen

    setup = {name: getattr(args, name) for name in ("weights", "device", "max_image_mb", "max_seconds")}
    listening, token = listen(args.port), secrets.token_urlsafe(24)
    with listening, contextlib.closing(NetworkProcess({**setup, "path": str(args.path)})) as network:
        about = network.about()
        limits = {"max_bytes": int(args.max_upload_mb * (1 << 20)), "max_seconds": args.max_seconds}
        server = Server(Page(network, about, token=token, **limits), network)
        address = "http://{}:{}/{}/".format(*listening.getsockname(), token)
        print(f"{about['title']} is at {address} until Ctrl-C", flush=True)
        if args.open:
            webbrowser.open(address)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the page is closed") from None
    return EXIT_OK


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for the first argument that cannot be."""
    if importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("sdtrain serve needs uvicorn; pip install 'sdtrain[serve]'")
    if not args.path.exists():
        raise ConfigError(f"there is nothing at {args.path}; give a run folder, a checkpoint folder or a weights file")
    if args.port is not None and not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port} is no port; take one from 1 to 65535, or leave it out")
    for name in ("max_upload_mb", "max_image_mb", "max_seconds"):
        if not 0 < getattr(args, name) <= MOST_SECONDS:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} {getattr(args, name):g} cannot be; give a number above 0, up to {MOST_SECONDS:g}"
            )
