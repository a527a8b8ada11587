"""What a checkpoint costs training: the stall of a save that is written meanwhile, and of one that is waited for.

    python tests/benchmarks/bench_save.py [--millions 100] [--rounds 5] [--folder DIR]

One player of so many parameters with Adam and a running average: 16 bytes a parameter, as much again in host memory.
Both kinds of save take turns in one process; steps (Adam and the average, in place) run while the writer does. Bar: the
asynchronous stall is below 10 % of the synchronous one. The floor is a plain copy between buffers that are in use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from sdtrain.engine.ema import update_ema  # noqa: E402
from sdtrain.engine.net import LocalNet  # noqa: E402
from sdtrain.engine.preempt import StopRequest  # noqa: E402
from sdtrain.engine.saving import Order, Saver  # noqa: E402
from sdtrain.engine.writing import Writing  # noqa: E402

LAYERS = 50


class Training:
    """A network of `size` parameters in layers of several sizes, Adam, the average; gradients are always the same."""

    def __init__(self, size: int, device: torch.device) -> None:
        widths = [size // LAYERS] * (LAYERS - 1) + [size - size // LAYERS * (LAYERS - 1)]
        self.G, self.G_ema = (
            nn.ParameterList([nn.Parameter(torch.rand(w, device=device)) for w in widths]) for _ in range(2)
        )
        for p in self.G:
            p.grad = torch.full_like(p, 1e-3)
        self.optimizer = torch.optim.Adam(self.G.parameters(), foreach=True)
        self.step()

    def step(self) -> None:
        self.optimizer.step()
        update_ema(self.G_ema, self.G, 0.99)

    def files(self) -> dict[str, dict[str, Tensor]]:
        slots = {f"{i}/{s}": v for i, p in enumerate(self.G) for s, v in self.optimizer.state[p].items()}
        nets = {"G": self.G, "G_ema": self.G_ema}
        return {**{name: LocalNet(net).state() for name, net in nets.items()}, "G.optim": slots}


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def floor_sec(files: dict[str, dict[str, Tensor]], device: torch.device) -> float:
    """Seconds to copy all of it into host memory that is in use already."""
    every = [t for tensors in files.values() for t in tensors.values()]
    rooms = [torch.empty_like(t, device="cpu", pin_memory=device.type == "cuda") for t in every]

    def copy() -> None:
        for room, t in zip(rooms, every, strict=True):
            room.copy_(t, non_blocking=True)

    return min(seconds(copy, device) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, stop = Training(int(args.millions * 1e6), device), StopRequest()
    files = training.files()
    total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    fastest = floor_sec(files, device)
    found: dict[str, list[float]] = {"asynchronous": [], "synchronous": [], "alone": [], "beside": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Writing(Path(folder)), device)

        def save(seen_img: int, wait: bool) -> float:
            root = Path(folder) / "checkpoints"
            return seconds(lambda: write(root, seen_img, wait), device)

        def write(root: Path, seen_img: int, wait: bool) -> None:
            saver.save(Order(root=root, seen_img=seen_img, files=training.files(), state={}, keep=1), stop)
            assert not wait or saver.wait(), saver.problem

        first = save(0, wait=False)
        assert saver.wait(), saver.problem
        for number in range(args.rounds):
            found["alone"] += [seconds(training.step, device) for _ in range(3)]
            found["asynchronous"].append(save(2 * number + 1, wait=False))
            while saver.busy:
                found["beside"].append(seconds(training.step, device))
            assert saver.wait(), saver.problem
            found["synchronous"].append(save(2 * number + 2, wait=True))
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(f"{total / 1e6:,.0f} MB on {device}, {args.rounds} rounds, medians (all)")
    for name in ("asynchronous", "synchronous"):
        every = " ".join(f"{value:.3f}" for value in found[name])
        print(f"{name:<13} stall {middle[name]:.3f} s ({every})  {total / 1e6 / middle[name]:,.0f} MB/s")
    print(f"floor: a copy {fastest:.3f} s, {total / 1e6 / fastest:,.0f} MB/s; a first save {first:.3f} s")
    print(f"a step alone {middle['alone']:.3f} s, beside the writer {middle['beside']:.3f} s")
    print(f"ratio asynchronous / synchronous: {100 * middle['asynchronous'] / middle['synchronous']:.1f} % (bar: 10 %)")


if __name__ == "__main__":
    main()
