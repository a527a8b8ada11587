"""Train: `accelerate launch sdtrain/main.py --cfg NAME_OR_FILE`, or torchrun, or python. The same command resumes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: the repository root takes the place of this folder on the import path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, WeightsError
from sdtrain.exits import part, run_command, tell
from sdtrain.terminal import show_fault

if TYPE_CHECKING:
    import torch

    from sdtrain.config.compare import Difference
    from sdtrain.config.keys import Config
    from sdtrain.engine.preempt import StopRequest
    from sdtrain.finetune import Initial
    from sdtrain.run import Run

log = logging.getLogger("sdtrain")
PR_SET_PDEATHSIG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE|NAME", help="configuration: a path, or a name in configs/")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeat as you like")
    add("--out", metavar="DIR", help="run folder (default: runs/NAME); holds a run already? it goes on from there")
    add("--allow-pipe", action="store_true", help="run the commands of pipe: sources (--set data.allow_pipe=true)")
    add("--plan", action="store_true", help="print what the run would need and do, touch nothing")
    add("--allow", action="append", default=[], metavar="KEY", help="resume although this key has changed")
    begin_again = "begin again: move the run that is there into OUT/before-DATE-TIME, delete nothing; "
    add("--restart", action="store_true", help=begin_again + "a requeued job goes on all the same")


def run(args: argparse.Namespace) -> int:
    """Plan or train. Returns the exit code; raises `UserError` for what the user can mend."""
    from sdtrain.engine.preempt import StopRequest

    if args.plan:
        return obey(args, StopRequest())
    end_with_launcher()
    with StopRequest() as stop:  # before anything that takes time
        return obey(args, stop)


def obey(args: argparse.Namespace, stop: StopRequest) -> int:
    """Load the configuration and do what is asked."""
    from sdtrain.config.blocks import require_blocks
    from sdtrain.config.load import load_config
    from sdtrain.engine.launcher import follow_launcher

    given = [*args.set, *(["data.allow_pipe=true"] if args.allow_pipe else [])]
    config = load_config(args.cfg, given, world=int(os.environ.get("WORLD_SIZE", "1")))
    config = follow_launcher(config)
    require_blocks(config)
    out = Path(args.out or f"runs/{config.name}")
    if getattr(config, "simulation", None):  # a method that is a system of equations, not a training run
        return simulate(config, out, args.plan)
    if args.plan:
        return show_plan(config, out)
    stop.checkpoints = out / "checkpoints"
    stop.limit(config.max_time)
    return train(config, out, args.allow, stop, restart=args.restart and not started_again())


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


def started_again() -> bool:
    """Whether Slurm or torchrun repeats a command by itself, which then goes on even if it says --restart."""
    return any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("SLURM", "TORCHELASTIC"))


def train(config: Config, out: Path, allow: list[str], stop: StopRequest, restart: bool) -> int:
    """Check everything that can be checked cheaply, join the other ranks, take the folder, train."""
    from sdtrain.plan import check_data, check_initial, check_weights_needed

    dataset = check_data(config)
    used = check_weights_needed(config)
    if not restart:
        check_folder(config, out, allow)
    initial = check_initial(config, dataset) if restart or not has_checkpoints(out) else None
    device = start(config)
    from sdtrain.engine.lock import FolderLock
    from sdtrain.engine.restart import set_aside
    from sdtrain.run import Run

    with FolderLock(out):
        if restart and (aside := set_aside(out)):
            log.info("--restart: the run that was here was moved into %s", aside)
        return go_on(Run(config, out, device, dataset), allow, initial, used, stop)


def go_on(run: Run, allow: list[str], initial: Initial | None, used: dict[str, Any], stop: StopRequest) -> int:
    """Resume, or begin from `initial`, write down what is used, and train."""
    from sdtrain.engine.watch import Watch
    from sdtrain.loop import train as train_loop
    from sdtrain.plan import check_initial, make_plan

    config, dataset = run.config, run.dataset
    run.folder.create()
    refused = run.resume(allow)
    if run.checkpoint is None and (initial := initial or check_initial(config, dataset)):
        run.start_from(initial)
        used |= {f"init.{role}": start for role, start in initial.described.items()}
    used |= run.builder.teachers
    write_down(run, make_plan(config, run, initial) if not run.step else None, used)
    announce(run, refused)
    run.folder.open_log(run.seen_img, redo_evaluation="evaluate" in run.undone)
    run.folder.writing.raise_together()
    run.stop = stop
    with Watch(config.timeout, stop, run.slow):
        stop.begin_training()
        return train_loop(run)


def end_with_launcher() -> None:
    """A rank ends with a launcher that is killed: no signal would reach it, and the next start needs the folder."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(os.environ) or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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
    from sdtrain.engine.threads import set_threads

    device = start_ranks(tf32=config.tf32)
    set_threads()
    level = logging.INFO if is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    return device


def has_checkpoints(out: Path) -> bool:
    return any((out / "checkpoints").glob("img_*"))


def check_folder(config: Config, out: Path, allow: list[str]) -> None:
    """Raises `ConfigError` when the folder holds a run whose configuration differs in what decides weights."""
    from sdtrain.config.compare import differences, listed, read_tree, to_tree
    from sdtrain.config.schema import method
    from sdtrain.errors import ConfigError

    written = out / "config.yaml"
    if not written.exists() or not has_checkpoints(out):
        return
    decisive = method(config.method).decisive
    found = [d for d in differences(read_tree(written), to_tree(config)) if not d.harmless or d.key in decisive]
    changed = [d for d in [*found, *other_teachers(config, out)] if d.key not in allow]
    if changed:
        raise ConfigError(
            f"{out} holds a run of another configuration:{listed(changed)}\n"
            "go back to these values, choose another folder with --out, or name each changed key with --allow KEY"
        )


def other_teachers(config: Config, out: Path) -> Iterator[Difference]:
    """Teachers whose files are there but no longer what the run in this folder had learnt from."""
    from sdtrain.config.compare import Difference
    from sdtrain.config.schema import method
    from sdtrain.engine.starts import noted_weights
    from sdtrain.weights import sha256_of

    for key in method(config.method).teacher_keys:
        file, sha256 = noted_weights(out, key)
        if file.is_file() and (now := sha256_of(file)) != sha256:
            yield Difference(key, f"{file.name} of sha256 {sha256[:12]}", f"sha256 {now[:12]}")


def write_down(run: Run, plan: dict[str, Any] | None, used: dict[str, Any]) -> None:
    import torch

    from sdtrain.config.compare import dump
    from sdtrain.engine.ranks import gather_objects, is_main
    from sdtrain.files import write_bytes

    run.folder.note_environment(used, gather_objects(torch.get_num_threads()), run.engine.described())
    if is_main():
        with run.folder.writing(path := run.folder.path / "config.yaml"):
            write_bytes(path, dump(run.config).encode())
    if plan is not None:
        run.folder.write_json("plan.json", plan)


def announce(run: Run, refused: list[str]) -> None:
    """Say where the run starts, with what, and why newer checkpoints were not used."""
    from sdtrain.engine.launcher import not_followed
    from sdtrain.engine.ranks import is_main, world
    from sdtrain.engine.threads import warning
    from sdtrain.loop import count

    for reason in refused:
        log.warning("checkpoint %s", reason)
    if is_main() and (sentence := warning()):
        log.warning("%s", sentence)
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
    sys.excepthook = show_fault
    sys.exit(part(main()))
