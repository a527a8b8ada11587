"""The training loop. `train` is the whole of it; what is done once in a while is a function below, called in order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from sdtrain.engine.preempt import name_of
from sdtrain.engine.pulse import PULSE
from sdtrain.engine.ranks import is_main, max_over_ranks, world
from sdtrain.engine.timing import peak_memory_gb
from sdtrain.errors import EXIT_OK, EXIT_REQUEUE, Interrupted, RankFailed
from sdtrain.run import Run

log = logging.getLogger("sdtrain")
LAST_SAVE_SEC = 20.0  # for the save in progress when something else ends the run; ranks that are gone end none


def train(run: Run) -> int:
    """Train from the present position to the end of the last stage. Returns the exit code."""
    try:
        catch_up(run)
        for stage in run.remaining_stages():
            run.begin(stage)
            for batch in run.batches():
                run.advance(run.chunks(batch))
                if writes(run):
                    run.settle()
                if run.due(run.config.log_img):
                    tick(run)
                run.undone = due(run)
                if run.due(run.config.save_img):
                    run.give_way()  # a checkpoint behind rows that could not be written would lose them
                    run.save()
                attend(run)
        return finish(run)
    except Interrupted as request:
        return stopped(run, request.reason)
    except RankFailed as failure:
        raise RankFailed(f"{failure.sentence}; {kept(run, failure)}", failure.code) from failure
    finally:
        run.saver.wait(LAST_SAVE_SEC)


def writes(run: Run) -> bool:
    """Whether anything of this position will be seen: what the device still holds back is asked for before."""
    at_interval = any(run.due(img) for img in (run.config.log_img, run.config.save_img))
    return at_interval or run.at_stage_end or run.seen_img in run.snapshot_img or bool(due(run))


def due(run: Run) -> list[str]:
    """What this position asks for besides the step."""
    evaluate = run.due(run.task.eval_img) or run.at_stage_end and run.task.ends_with_evaluation
    asked = {"snapshot": run.seen_img in run.snapshot_img, "pictures": run.due(run.config.sample_img)}
    return [what for what, wanted in {**asked, "evaluate": evaluate}.items() if wanted]


def attend(run: Run) -> None:
    """Do what is due. A stop signal or a failure cuts it short, on all ranks; `run.undone` says what is left."""
    do: dict[str, Callable[[], None]] = {
        "snapshot": run.save_snapshot,
        "pictures": run.task.pictures,
        "evaluate": partial(run.task.evaluate, "val"),
    }
    if run.undone:
        run.wait_for_save()  # so that a kill from here on costs nothing
    while run.undone:
        run.give_way()
        with PULSE.section(run.undone[0]):
            do[run.undone[0]]()
        run.folder.writing.raise_together()  # what could not be written stays undone
        run.undone = run.undone[1:]


def catch_up(run: Run) -> None:
    """What a stop signal cut short at the position of the checkpoint, in the stage of the checkpoint."""
    if run.checkpoint is not None and run.undone:
        run.stage = next(stage for stage in run.method.stages if stage.name == run.checkpoint.state["stage"])
        attend(run)


def tick(run: Run) -> None:
    """Write the loss means and the timing since the last tick, and the progress line."""
    losses = run.engine.meter.means()
    run.engine.meter.clear()
    seconds, sections = run.timer.read()
    seconds -= sections.get("evaluate", 0.0)  # speed is that of training
    passed = evaluations(run, run.timed_from_img, run.seen_img)
    if passed and "evaluate" in sections:  # that at the end of a stage is timed by nobody
        run.eval_seconds = sections["evaluate"] / passed
    images = (run.seen_img - run.timed_from_img) or run.config.batch_size
    run.restart_timer()
    mine = [sections.get("data", 0.0) / max(seconds, 1e-9), peak_memory_gb(run.device)]
    waited, memory = max_over_ranks(mine, run.device)
    perf = {
        "sec_per_kimg": seconds / images * 1000,
        "data_wait_frac": waited,
        "peak_mem_gb": memory,
        "bad_samples": len(run.bad_samples),
        "skipped_steps": run.skipped,
    }
    perf |= {f"sec/{name}": s / images * 1000 for name, s in sections.items()}
    where = {"stage": run.stage.name}
    run.folder.row("train", run.seen_img, {**where, **losses})
    run.folder.row("perf", run.seen_img, {**where, **perf})
    progress(run, losses, perf)


def evaluations(run: Run, begin_img: int, end_img: int) -> int:
    """How many are due from `begin_img` on and before `end_img`; an evaluation follows the tick of its step."""
    interval = run.task.eval_img
    return (end_img - 1) // interval - (max(begin_img, 1) - 1) // interval if interval else 0


def progress(run: Run, losses: dict[str, float], perf: dict[str, float]) -> None:
    """One line a tick: where, how fast, how long still (to the next stage, of another speed), and the losses."""
    if not is_main():
        return
    total, end = run.method.stages[-1].end_img, run.stage.end_img
    left = (end - run.seen_img) / 1000 * perf["sec_per_kimg"]
    left += evaluations(run, run.seen_img, end + 1) * run.eval_seconds
    then = next((f" to {stage.name}" for stage in run.method.stages if stage.end_img > end), "")
    main = {n: v for n, v in losses.items() if n.count("/") == 1 and not n.endswith(("/loss", "_sign"))}
    log.info(
        "%s %s of %s (%.1f%%)  %.1f s/kimg  wait %.0f%%  ETA %s%s  %s",
        run.stage.name,
        count(run.seen_img),
        count(total),
        100 * run.seen_img / total,
        perf["sec_per_kimg"],
        100 * perf["data_wait_frac"],
        duration(left),
        then,
        "  ".join(f"{n} {v:.4g}" for n, v in main.items()),
    )


def kept(run: Run, failure: RankFailed) -> str:
    """Save the state where it is whole, with all ranks; what the next start goes on from, as a sentence."""
    if not (failure.intact and run.step):
        return run.stop.kept()
    try:
        if not run.is_saved:
            run.save()
        run.wait_for_save()
    except RankFailed:  # that it cannot be written has been told, or follows from it
        return run.stop.kept()
    return f"{run.checkpoint_path} was kept; the same command goes on from there"


def stopped(run: Run, reason: int) -> int:
    """Save where this is a new position, and say what goes on from it."""
    if not run.is_saved:
        run.save()
    run.wait_for_save()
    if is_main():
        said = (name_of(reason), run.seen_img, run.checkpoint_path)
        log.info("%s: stopped at %s images; kept %s; the same command goes on from here", *said)
        if run.undone:
            log.info("left for later: %s", ", ".join(run.undone))
    run.folder.close()
    run.folder.writing.raise_together()
    return EXIT_REQUEUE


def finish(run: Run) -> int:
    """The last save and the test list, once; a finished run that is started again has nothing left to save."""
    if run.config.save_img and not run.is_saved:
        if not run.engine.players:  # it was taken up behind its last step, and optimizers are still in their files
            run.begin(run.stage)
        run.save()
    run.wait_for_save()
    with PULSE.section("evaluate"):
        run.task.finish()
    run.folder.close()
    run.folder.writing.raise_together()
    if is_main():
        run.folder.note_finished()
        log.info("finished at %s on %d rank(s); everything is in %s", count(run.seen_img), world(), run.folder.path)
    return EXIT_OK


def count(images: float) -> str:
    """12800 -> '12.8ki', 3200000 -> '3.2Mi'."""
    for unit, size in (("Mi", 1e6), ("ki", 1e3)):
        if images >= size:
            return f"{images / size:.4g}{unit}"
    return f"{images:g}"


def duration(seconds: float) -> str:
    """90 -> '1m30s', 90000 -> '1d01h'."""
    minutes, sec = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{sec:02d}s"
