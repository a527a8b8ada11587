"""The `sdtrain` command: find the module of a subcommand, import only that one, turn mistakes into sentences."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from sdtrain import __version__
from sdtrain.exits import part, run_command
from sdtrain.terminal import show_fault

PACKAGE = Path(__file__).resolve().parent

# name: (module, help line); the module has add_arguments(parser) and run(args) -> int, and is importable without torch
COMMANDS = {
    "train": ("sdtrain.main", "train, or go on with a run; --plan only says what it would take"),
    "suite": ("sdtrain.commands.suite", "train the runs of a table in turn, with one teacher for all of them"),
    "pack": ("sdtrain.data.pack.pack", "make tar shards from a folder or zip of images"),
    "verify": ("sdtrain.data.pack.verify", "find damaged shards and samples before a run does"),
    "evaluate": ("sdtrain.commands.evaluate", "measure a run, a checkpoint or a folder of images"),
    "sample": ("sdtrain.commands.sample", "draw images from a run"),
    "upscale": ("sdtrain.commands.upscale", "enlarge images with a super-resolution student"),
    "serve": ("sdtrain.commands.serve", "try a network in a web page on this machine: pictures, or latents to move"),
    "import": ("sdtrain.commands.importing", "take over an official checkpoint"),
    "export": ("sdtrain.commands.exporting", "write a network for other tools"),
    "speed": ("sdtrain.commands.speed", "time networks as they are used: latency, FLOPs, parameters, memory"),
    "bench": ("sdtrain.commands.bench", "time a configuration: seconds and memory per 1000 images"),
    "report": ("sdtrain.commands.report", "put the figures of runs into one page"),
    "config": ("sdtrain.commands.config_keys", "explain the keys of configurations: meaning, unit, type and default"),
    "doctor": ("sdtrain.commands.doctor", "check this machine, its ranks, weights and a configuration"),
    "requeue": ("sdtrain.commands.requeue", "for job scripts: is a run that has ended worth another attempt?"),
    "fetch-weights": ("sdtrain.commands.fetch_weights", "download weights of frozen networks where there is a network"),
}


def present(module: str) -> bool:
    """Whether the file of a command module is there (without importing it)."""
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").is_file()


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with all command names; only the chosen command's module is imported and adds its arguments."""
    parser = argparse.ArgumentParser(
        prog="sdtrain",
        description="Training of distilled GANs: SD-GAN and SDAKD.",
        epilog="`sdtrain COMMAND --help` explains one. Several ranks: accelerate launch sdtrain/main.py --cfg NAME",
    )
    parser.add_argument("--version", action="version", version=f"sdtrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        if present(module):
            command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
            if name == chosen:
                _fill(command, module)
    return parser


def _fill(command: argparse.ArgumentParser, module: str) -> None:
    owner = importlib.import_module(module)
    owner.add_arguments(command)
    command.set_defaults(run=owner.run)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in given if not word.startswith("-")), None)
    args = build_parser(chosen).parse_args(given)
    return run_command(lambda: args.run(args))


def script() -> int:
    """The command as installed: `main`, then an orderly end of all ranks."""
    sys.excepthook = show_fault
    return part(main())


if __name__ == "__main__":
    sys.exit(script())
