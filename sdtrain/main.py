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

from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from sdtrain.exits import part, run_command, tell
from sdtrain.terminal import show_fault

if TYPE_CHECKING:
    import torch

    from sdtrain.config.compare import Difference
    from sdtrain.config.keys import Config
    from sdtrain.data.read.dataset import Dataset
    from sdtrain.engine.preempt import StopRequest
    from sdtrain.engine.scale import Asked
    from sdtrain.finetune import Initial
    from sdtrain.run import Run

    Checked = tuple[Dataset, dict[str, Any], Initial | None]

log = logging.getLogger("sdtrain")
PR_SET_PDEATHSIG = 1
MOST = 1e9  # ranks, GB/s or seconds that --plan counts with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE|NAME", help="configuration: a path, or a name in configs/")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeat as you like")
    add("--out", metavar="DIR", help="run folder (default: runs/NAME); holds a run already? it goes on from there")
    add("--allow-pipe", action="store_true", help="run the commands of pipe: sources (--set data.allow_pipe=true)")
    add("--plan", action="store_true", help="print what the run would need and do, touch nothing")
    add("--world-size", type=int, metavar="N", help="with --plan: what N ranks, which need not be there, would take")
    add("--bandwidth", type=float, metavar="GB/s", help="with --world-size: what a rank can send while all of them do")
    add("--disk", type=float, metavar="GB/s", help="with --world-size: what a checkpoint is written with")
    add("--speed", type=float, metavar="SEC", help="with --world-size: measured seconds per 1000 images on one rank")
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
    asked = asked_scale(args)
    world = asked.ranks if asked else int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config(args.cfg, given, world=world)
    config = follow_launcher(config)
    require_blocks(config)
    out = Path(args.out or f"runs/{config.name}")
    if getattr(config, "simulation", None):  # a method that is a system of equations, not a training run
        return simulate(config, out, args.plan)
    if args.plan:
        return show_plan(config, out, asked)
    stop.checkpoints = out / "checkpoints"
    stop.limit(config.max_time)
    return train(config, out, args.allow, stop, barely_begun(config, out) if started_again() else args.restart)


def asked_scale(args: argparse.Namespace) -> Asked | None:
    """What to plan for with --world-size. Raises `ConfigError` for options that mean nothing without it."""
    from sdtrain.errors import ConfigError

    stated = {name: getattr(args, name, None) for name in ("bandwidth", "disk", "speed")}
    ranks = getattr(args, "world_size", None)
    alone = next((name for name, value in stated.items() if value is not None), None)
    if ranks is None and alone:
        raise ConfigError(f"--{alone} belongs to --plan --world-size N: add them, or leave it out")
    if ranks is not None and not args.plan:
        raise ConfigError("--world-size belongs to --plan; how many ranks train is for the launcher: --num_processes N")
    for name, value in {"world-size": ranks, **stated}.items():
        if value is not None and not 0 < value < MOST:
            raise ConfigError(f"--{name} {value} cannot be: give a number above 0")
    if ranks is None:
        return None
    from sdtrain.engine.scale import Asked

    return Asked(ranks=ranks, **stated)


def show_plan(config: Config, out: Path, asked: Asked | None = None) -> int:
    """Print the plan; what would stop the run is said first, before networks are built, and gives the exit code."""
    from sdtrain.engine.trackers import check_trackers
    from sdtrain.plan import check_weights_needed, make_plan, render

    code = EXIT_OK
    try:
        check_trackers(config)
        check_weights_needed(config)
    except UserError as missing:
        tell(missing)
        code = EXIT_USER_ERROR
    print(render(make_plan(config, out=out, asked=asked)))
    return code


def started_again() -> bool:
    """Whether Slurm or torchrun repeats a command by itself, which then goes on even if it says --restart."""
    return any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("SLURM", "TORCHELASTIC"))


def barely_begun(config: Config, out: Path) -> bool:
    """Whether the run in `out` has ended before its first checkpoint was due: a repeated command begins it again."""
    from sdtrain.engine.restart import last_row

    made, last = ("checkpoints/img_*", "snapshots/img_*", "best/*.safetensors"), last_row(out)
    early = 0 <= last < (config.save_img or last + 1) + config.batch_size
    return early and not any(any(out.glob(kind)) for kind in made)


def train(config: Config, out: Path, allow: list[str], stop: StopRequest, restart: bool) -> int:
    """Check everything that can be checked cheaply, with the other ranks if there are any, take the folder, train."""

    def check() -> Checked:
        return checked(config, out, allow, restart)

    if os.environ.get("WORLD_SIZE", "1") == "1":  # a mistake in it is told before torch is there
        dataset, used, initial = check()
        device = start(config)
    else:
        device = start(config)
        from sdtrain.data.read.elsewhere import seen_from_here
        from sdtrain.engine.ranks import by_all, by_main

        dataset, used, initial = by_main(check)
        dataset = by_all(lambda: seen_from_here(dataset))
    from sdtrain.engine.lock import FolderLock
    from sdtrain.engine.restart import set_aside
    from sdtrain.engine.watch import Watch
    from sdtrain.run import Run, slow_sections

    with Watch(config.timeout, stop, slow_sections(dataset)), FolderLock(out):
        if restart and (aside := set_aside(out)):
            log.info("beginning again: the run that was here was moved into %s", aside)
        return go_on(Run(config, out, device, dataset), allow, initial, used, stop)


def checked(config: Config, out: Path, allow: list[str], restart: bool) -> Checked:
    """The data, the frozen networks' files, and whether there are weights to begin from; the folder is looked at too.

    Raises `UserError`: what is read here, one rank reads for all.
    """
    from sdtrain.engine.trackers import check_trackers
    from sdtrain.plan import check_data, check_initial, check_weights_needed

    check_trackers(config)
    dataset = check_data(config)
    _ = dataset.stamps  # as they are now, for all ranks
    used = check_weights_needed(config)
    if not restart:
        check_folder(config, out, allow)
    return dataset, used, check_initial(config, dataset) if restart or not has_checkpoints(out) else None


def go_on(run: Run, allow: list[str], initial: Initial | None, used: dict[str, Any], stop: StopRequest) -> int:
    """Resume, or begin from `initial`, write down what is used, and train."""
    from sdtrain.engine.ranks import by_main, is_main
    from sdtrain.loop import train as train_loop
    from sdtrain.plan import check_initial, make_plan

    config, dataset = run.config, run.dataset
    run.folder.create()
    refused = run.resume(allow)
    if run.checkpoint is None and (initial := initial or by_main(lambda: check_initial(config, dataset))):
        run.start_from(initial)
        used |= {f"init.{role}": start for role, start in initial.described.items()}
    used |= run.builder.teachers
    write_down(run, make_plan(config, run, initial) if is_main() and not run.step else None, used)
    announce(run, refused)
    run.folder.open_log(run.seen_img, redo_evaluation="evaluate" in run.undone)
    run.folder.writing.raise_together()
    run.stop = stop
    stop.begin_training()
    return train_loop(run)


def end_with_launcher() -> None:
    """A rank ends with a launcher that is killed: no signal would reach it, and the next start needs the folder."""
    from sdtrain.engine.launcher import started_by_launcher

    parent = os.getppid()
    if sys.platform != "linux" or not started_by_launcher():
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed just before
        os.kill(os.getpid(), signal.SIGKILL)


def simulate(config: Any, out: Path, only_plan: bool) -> int:
    """Needs no data, no ranks and no run folder to resume."""
    from sdtrain.tasks import simulation

    if only_plan:
        print(simulation.describe(config))
        return EXIT_OK
    return simulation.simulate(config, out)


def start(config: Config) -> torch.device:
    """The process group and logging. Returns this rank's device."""
    from sdtrain.engine.pulse import LONGER, PULSE
    from sdtrain.engine.ranks import is_main, start_ranks
    from sdtrain.engine.threads import set_threads

    PULSE.restart()
    wait = 2 * LONGER * config.timeout  # the watch, which names who is late, comes first
    device = start_ranks(tf32=config.tf32, deterministic=config.deterministic, timeout_sec=wait)
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
    from sdtrain.engine.origin import describe
    from sdtrain.engine.ranks import gather_objects, is_main
    from sdtrain.files import write_bytes

    threads, devices = zip(*gather_objects((torch.get_num_threads(), describe(run.device))), strict=True)
    run.folder.note_environment(used, {"devices": sorted({*devices}), "threads": [*threads]}, run.engine.described())
    if is_main():
        with run.folder.writing(path := run.folder.path / "config.yaml"):
            write_bytes(path, dump(run.config).encode())
    if plan is not None:
        run.folder.write_json("plan.json", plan)


def announce(run: Run, refused: list[str]) -> None:
    """Say where the run starts, with what, and why newer checkpoints were not used."""
    from sdtrain.engine.compiled import described
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
    if run.parts:
        log.info("compiled before the first step: %s", described(run.parts))
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
