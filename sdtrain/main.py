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

from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, WeightsError
from sdtrain.exits import part, run_command, tell

if TYPE_CHECKING:
    import torch

    from sdtrain.config.keys import Config
    from sdtrain.engine.preempt import StopRequest
    from sdtrain.run import Run

log = logging.getLogger("sdtrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE|NAME", help="configuration: a path, or a name in configs/")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeat as you like")
    add("--out", metavar="DIR", help="run folder (default: runs/NAME); holds a run already? it goes on from there")
    add("--allow-pipe", action="store_true", help="run the commands of pipe: sources (--set data.allow_pipe=true)")
    add("--plan", action="store_true", help="print what the run would need and do, touch nothing")
    add("--allow", action="append", default=[], metavar="KEY", help="resume although this key has changed")


def run(args: argparse.Namespace) -> int:
    """Plan or train. Returns the exit code; raises `UserError` for what the user can mend."""
    from sdtrain.config.load import load_config
    from sdtrain.engine.launcher import follow_launcher

    given = [*args.set, *(["data.allow_pipe=true"] if args.allow_pipe else [])]
    config = load_config(args.cfg, given, world=int(os.environ.get("WORLD_SIZE", "1")))
    config = follow_launcher(config)
    out = Path(args.out or f"runs/{config.name}")
    if getattr(config, "simulation", None):  # a method that is a system of equations, not a training run
        return simulate(config, out, args.plan)
    if args.plan:
        return show_plan(config, out)
    from sdtrain.engine.preempt import StopRequest

    with StopRequest(out / "checkpoints") as stop:
        return train(config, out, args.allow, stop)


def show_plan(config: Config, out: Path) -> int:
    """Print the plan; what would stop the run is said first, before networks are built, and gives the exit code."""
    from sdtrain.plan import check_weights_needed, make_plan, render

    code = EXIT_OK
    try:
        check_weights_needed(config)
    except WeightsError as missing:
        tell(missing)
        code = EXIT_USER_ERROR
    print(render(make_plan(config, out=out)))
    return code


def train(config: Config, out: Path, allow: list[str], stop: StopRequest) -> int:
    """Check everything that can be checked cheaply, join the other ranks, resume, train."""
    from sdtrain.plan import check_data, check_initial, check_weights_needed, make_plan

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
    stop.training = True
    return train_loop(run)


def simulate(config: Any, out: Path, only_plan: bool) -> int:
    """Needs no data, no ranks and no run folder to resume."""
    from sdtrain.tasks import simulation

    if only_plan:
        print(simulation.describe(config))
        return EXIT_OK
    return simulation.simulate(config, out)


def start(config: Config) -> torch.device:
    """The process group and logging. Returns this rank's device."""
    from sdtrain.engine.ranks import is_main, start_ranks

    device = start_ranks(tf32=config.tf32)
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
        run.folder.note_environment(used, run.engine.described())
    if plan is not None:
        run.folder.write_json("plan.json", plan)


def announce(run: Run, refused: list[str]) -> None:
    """Say where the run starts, with what, and why newer checkpoints were not used."""
    from sdtrain.engine.launcher import not_followed
    from sdtrain.engine.ranks import world
    from sdtrain.loop import count

    for reason in refused:
        log.warning("checkpoint %s", reason)
    log.info("%s on %d rank(s), %s", run.dataset.describe(), world(), run.device)
    ghosts = (run.config.num_ghosts, run.config.ghost_batch, run.ghosts_at_once)
    log.info("%d ghosts of %d images a step, %d here at once", *ghosts)
    log.info("engine %s", run.engine.described()["name"])
    for sentence in not_followed():
        log.warning("%s", sentence)
    if run.checkpoint is None:
        log.info("starting in %s", run.folder.path)
    else:
        log.info("going on at %s from %s", count(run.seen_img), run.checkpoint.path)


def main(argv: list[str] | None = None) -> int:
    """Entry point with the exit codes of the contract: 0, 2: a user's mistake, 75: stopped on request, 130: ended."""
    parser = argparse.ArgumentParser(prog="sdtrain/main.py", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(part(main()))
