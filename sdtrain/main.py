"""Train: `accelerate launch sdtrain/main.py --cfg NAME_OR_FILE`, or torchrun, or python. The same command resumes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: the repository root takes the place of this folder on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sdtrain.errors import EXIT_OK
from sdtrain.exits import part, run_command

if TYPE_CHECKING:
    import torch

    from sdtrain.config.keys import Config
    from sdtrain.run import Run

log = logging.getLogger("sdtrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE|NAME", help="configuration: a path, or a name in configs/")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeat as you like")
    add("--out", metavar="DIR", help="run folder (default: runs/NAME); holds a run already? it goes on from there")
    add("--plan", action="store_true", help="print what the run would need and do, touch nothing")
    add("--allow", action="append", default=[], metavar="KEY", help="resume although this key has changed")


def run(args: argparse.Namespace) -> int:
    """Plan or train. Returns the exit code; raises `UserError` for what the user can mend."""
    from sdtrain.config.load import load_config

    config = load_config(args.cfg, args.set, world=int(os.environ.get("WORLD_SIZE", "1")))
    out = Path(args.out or f"runs/{config.name}")
    if getattr(config, "simulation", None):  # a method that is a system of equations, not a training run
        return simulate(config, out, args.plan)
    if args.plan:
        from sdtrain.plan import make_plan, render

        print(render(make_plan(config)))
        return EXIT_OK
    return train(config, out, args.allow)


def train(config: Config, out: Path, allow: list[str]) -> int:
    """Check everything that can be checked cheaply, join the other ranks, resume, train."""
    from sdtrain.engine.preempt import StopRequest
    from sdtrain.plan import check_data, check_initial, check_weights_needed, make_plan

    stop = StopRequest().listen()  # a signal that comes while things load is obeyed after the first step
    dataset = check_data(config)
    used = check_weights_needed(config)
    check_folder(config, out, allow)
    initial = None if has_checkpoints(out) else check_initial(config, dataset)
    device = start(config)
    from sdtrain.loop import train as train_loop
    from sdtrain.run import Run

    run = Run(config, out, device, dataset)
    run.folder.create()
    refused = run.resume()
    if run.checkpoint is None and (initial := initial or check_initial(config, dataset)):
        run.start_from(initial)
        used |= {f"init.{role}": start for role, start in initial.described.items()}
    write_down(run, make_plan(config, run, initial) if not run.step else None, used)
    announce(run, refused)
    run.folder.open_log(run.seen_img)
    run.stop = stop
    return train_loop(run)


def simulate(config: Any, out: Path, only_plan: bool) -> int:
    """Needs no data, no ranks and no run folder to resume."""
    from sdtrain.tasks import simulation

    if only_plan:
        print(simulation.describe(config))
        return EXIT_OK
    return simulation.simulate(config, out)


def start(config: Config) -> torch.device:
    """Float32 arithmetic, the process group, logging. Returns this rank's device."""
    from sdtrain.engine.precision import set_precision
    from sdtrain.engine.ranks import is_main, start_ranks

    set_precision(config.tf32)
    device = start_ranks()
    level = logging.INFO if is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    return device


def has_checkpoints(out: Path) -> bool:
    return any((out / "checkpoints").glob("img_*"))


def check_folder(config: Config, out: Path, allow: list[str]) -> None:
    """Raises `ConfigError` when the folder holds a run whose configuration differs in what decides weights."""
    from sdtrain.config.compare import differences, read_tree, to_tree
    from sdtrain.config.schema import method
    from sdtrain.errors import ConfigError

    written = out / "config.yaml"
    if not written.exists() or not has_checkpoints(out):
        return
    decisive = method(config.method).decisive
    found = [d for d in differences(read_tree(written), to_tree(config)) if not d.harmless or d.key in decisive]
    changed = [d for d in found if d.key not in allow]
    if changed:
        listed = "".join(f"\n  {d}" for d in changed)
        raise ConfigError(
            f"{out} holds a run of another configuration:{listed}\n"
            "go back to these values, choose another folder with --out, or name each changed key with --allow KEY"
        )


def write_down(run: Run, plan: dict[str, Any] | None, used: dict[str, Any]) -> None:
    from sdtrain.config.compare import dump
    from sdtrain.engine.ranks import is_main
    from sdtrain.files import write_bytes

    if is_main():
        write_bytes(run.folder.path / "config.yaml", dump(run.config).encode())
        run.folder.note_environment(used)
    if plan is not None:
        run.folder.write_json("plan.json", plan)


def announce(run: Run, refused: list[str]) -> None:
    """Say where the run starts, with what, and why newer checkpoints were not used."""
    from sdtrain.engine.ranks import world
    from sdtrain.loop import count

    for reason in refused:
        log.warning("checkpoint %s", reason)
    log.info("%s on %d rank(s), %s", run.dataset.describe(), world(), run.device)
    ghosts = (run.config.num_ghosts, run.config.ghost_batch, run.ghosts_at_once)
    log.info("%d ghosts of %d images a step, %d here at once", *ghosts)
    if run.checkpoint is None:
        log.info("starting in %s", run.folder.path)
    else:
        log.info("going on at %s from %s", count(run.seen_img), run.checkpoint.path)


def main(argv: list[str] | None = None) -> int:
    """Entry point with the exit codes of the contract: 0, 2 for a user error, 75 for a stop on request, 130: Ctrl-C."""
    parser = argparse.ArgumentParser(prog="sdtrain/main.py", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(part(main()))
