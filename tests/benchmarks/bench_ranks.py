"""What a tick, a save and a start cost on more and more ranks of this machine, and by which formula they grow.

    python tests/benchmarks/bench_ranks.py [--ranks 1,2,4,8,16] [--repeats 20]

Processes are forked after the imports, whose processor time is printed once. With more ranks than cores the clock shows
the queue for cores, so processor time a process is printed too, and that is what the formula is fitted to: a + b log2 N
or a + b N, whichever leaves less. `tick` is the present one; `tick before` gathers objects, as it once did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tiny import free_port, make_shards, rank_environment, tiny_config, warm_up, write_config

WANTED = (64, 1024, 4096)
SENDING = {"all_reduce": 1, "all_gather_object": 2, "broadcast_object_list": 2}  # objects: their sizes first
WHAT = ("tick", "tick before", "save", "start")
Measured = dict[str, tuple[float, float]]  # what -> seconds by the clock, seconds of processor time a process


def tick_before(run: Any) -> None:
    """Means in one collective, three gatherings of objects in two each."""
    from sdtrain.engine.ranks import gather_objects
    from sdtrain.engine.timing import peak_memory_gb

    run.engine.meter.means()
    seconds, sections = run.timer.read()
    max(s.get("data", 0.0) / max(seconds, 1e-9) for s in gather_objects(sections))
    max(gather_objects(peak_memory_gb(run.device)))
    sum(len(b) for b in gather_objects([]))


def tick(run: Any) -> None:
    """As in `loop.tick`, without the rows."""
    from sdtrain.engine.ranks import max_over_ranks
    from sdtrain.engine.timing import peak_memory_gb

    run.engine.meter.means()
    seconds, sections = run.timer.read()
    max_over_ranks([sections.get("data", 0.0) / max(seconds, 1e-9), peak_memory_gb(run.device)], run.device)


def save(run: Any) -> None:
    run.step += 1
    run.save()


def timed(action: Callable[[Any], None], run: Any, repeats: int) -> tuple[float, float]:
    """Medians of seconds by the clock, and of processor time of this process."""
    from sdtrain.engine.ranks import barrier

    taken = []
    for _ in range(repeats + 2):
        barrier()
        clock, processor = time.perf_counter(), time.process_time()
        action(run)
        taken.append((time.perf_counter() - clock, time.process_time() - processor))
    clocks, processors = zip(*taken[2:], strict=True)
    return statistics.median(clocks), statistics.fmean(processors)


@contextmanager
def counting() -> Iterator[list[str]]:
    """Collectives that go out."""
    import torch.distributed as dist

    sent: list[str] = []
    with mock.patch.multiple(dist, **{name: _noted(name, getattr(dist, name), sent) for name in SENDING}):
        yield sent


def _noted(name: str, original: Callable[..., Any], sent: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        sent.extend([name] * SENDING[name])
        return original(*args, **more)

    return call


def as_rank(config: Path, out: Path, repeats: int, began: tuple[float, float]) -> None:
    """The whole start of a run, a step, and then what is measured instead of training."""
    from sdtrain.main import main

    def measured(run: Any) -> int:
        from sdtrain.engine.ranks import gather_objects, is_main

        found: dict[str, Any] = {"start": (time.perf_counter() - began[0], time.process_time() - began[1])}
        run.begin(run.method.stages[0])
        for batch in run.batches():
            run.advance(run.chunks(batch))
            break
        for name, action in (("tick", tick), ("tick before", tick_before)):
            found[name] = timed(action, run, repeats)
            with counting() as sent:
                action(run)
            found[f"{name} sends"] = len(sent)
        found["save"] = timed(save, run, max(repeats // 4, 1))
        everybody = gather_objects(found)
        if is_main():
            means = {n: [statistics.fmean(f[n][i] for f in everybody) for i in (0, 1)] for n in WHAT}
            sends = {n: found[n] for n in found if n.endswith("sends")}
            out.with_suffix(".json").write_text(json.dumps(means | sends))
        return 0

    with mock.patch("sdtrain.loop.train", measured):
        code = main(["--cfg", str(config), "--out", str(out)])
    sys.stderr.flush()
    os._exit(code)


def measure(folder: Path, config: Path, ranks: int, repeats: int) -> dict[str, Any]:
    port, out = free_port(), folder / f"run{ranks}"
    pids = []
    for rank in range(ranks):
        if not (pid := os.fork()):
            began = time.perf_counter(), time.process_time()
            os.environ.update(rank_environment(rank, ranks, port) if ranks > 1 else {})
            os.dup2(os.open(folder / f"log{ranks}_{rank}", os.O_CREAT | os.O_WRONLY), 2)
            as_rank(config, out, repeats, began)
        pids.append(pid)
    failed = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(failed):
        sys.exit((folder / f"log{ranks}_{next(i for i, code in enumerate(failed) if code)}").read_text()[-2000:])
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return found


def fitted(ranks: list[int], seconds: list[float]) -> tuple[str, Callable[[int], float]]:
    """The better of a + b log2 N and a + b N, by least squares, b not below 0."""
    best: tuple[float, str, Callable[[int], float]] | None = None
    for name, by in (("log2 N", math.log2), ("N", float)):
        columns = np.stack([np.ones(len(ranks)), [by(n) for n in ranks]], 1)
        (a, b), *_ = np.linalg.lstsq(columns, np.array(seconds), rcond=None)
        a, b = (a, b) if b > 0 else (statistics.fmean(seconds), 0.0)
        left = sum((a + b * by(n) - s) ** 2 for n, s in zip(ranks, seconds, strict=True))
        if best is None or left < best[0]:
            best = left, f"{a * 1e3:.3g} + {b * 1e3:.3g} {name} ms", lambda n, a=a, b=b, by=by: a + b * by(n)
    assert best is not None
    return best[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8,16", help="numbers of processes")
    parser.add_argument("--repeats", type=int, default=20, help="ticks measured; a quarter as many saves")
    args = parser.parse_args()
    ranks = [int(n) for n in args.ranks.split(",")]
    os.environ |= {"SDTRAIN_CPU": "1", "OMP_NUM_THREADS": "1"}
    warm_up()
    print(f"imports: {time.process_time():.1f} s of processor time a process; {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = tiny_config(make_shards(folder / "shards"), ghost_batch=1, total_img=160_000, save_img=0)
        config = write_config(folder / "tiny.yaml", tree | {"keep_checkpoints": 1, "log_img": 16})
        found = {}
        for n in ranks:
            found[n] = measure(folder, config, n, args.repeats)
            cells = "  ".join(f"{w} {found[n][w][0] * 1e3:.4g} ({found[n][w][1] * 1e3:.4g})" for w in WHAT)
            sends = " and ".join(str(found[n][f"{w} sends"]) for w in WHAT[:2])
            print(f"{n:>3} ranks, ms by the clock (of processor a process): {cells}  sends {sends}", flush=True)
    for what in WHAT:
        formula, at = fitted(ranks, [found[n][what][1] for n in ranks])
        further = ", ".join(f"{n}: {at(n) * 1e3:.4g} ms" for n in WANTED)
        print(f"{what:<12} processor time a process {formula:<26} -> {further}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
