"""What our layer, its exact sums and its modules cost, in processor time of one thread, taking turns in one process.

    python tests/benchmarks/bench_engine.py step [--rounds 5] [--resolution 128] [--batch 2] [--set KEY=VALUE ...]
    python tests/benchmarks/bench_engine.py scaling [--steps 4] [--resolution 64] [--batch 8] [--set KEY=VALUE ...]

step      a whole step of ProjectedGAN, both phases with Adam and the average, one ghost, as
          exact, fast   our trainer with either summation
          bare          the same networks and optimizers in a loop written by hand
          plain         that loop with torch's own layers and settings: spectral norm and Adam as the official code has
                        them (without its copy of all gradients into one tensor, so this flatters it)
scaling   processor time a step of 1 rank and of 2 ranks with as many images each, for either summation

Printed are medians over rounds of the ratio within a round, with the quartiles in brackets as the noise.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sdtrain.augment.diffaug import diff_augment  # noqa: E402
from sdtrain.commands.variants import synthetic  # noqa: E402
from sdtrain.config.load import load_config  # noqa: E402
from sdtrain.engine.heap import keep_freed_memory  # noqa: E402
from sdtrain.engine.player import make_optimizer  # noqa: E402
from sdtrain.engine.ranks import destroy, rank, start_ranks, world  # noqa: E402
from sdtrain.models.fastgan.networks import UpConv2d  # noqa: E402
from sdtrain.models.ghost import GhostBatchNorm2d, SpectralConv2d, SpectralConvTranspose2d  # noqa: E402
from sdtrain.rng import Draws  # noqa: E402
from sdtrain.trainer import Trainer  # noqa: E402

SAMPLE = ["weights.features=random", "weights.lpips=random", "sd.alpha=0"]


def trainer(args: argparse.Namespace, summation: str, ranks: int = 1) -> Trainer:
    sizes = [f"batch_size={args.batch * ranks}", f"ghost_batch={args.batch}", f"data.resolution={args.resolution}"]
    config = load_config("sdgan_projected", [*SAMPLE, *sizes, f"summation={summation}", *args.set])
    made = Trainer(config, torch.device("cpu"), args.resolution, random_weights=True)
    made.enter(made.method.stages[0])
    return made


def ours(made: Trainer) -> Callable[[], None]:
    batch = synthetic(made.config, made.method.feed, made.builder.resolution)
    count = made.config.batch_size // world()
    mine = type(batch)(**{**vars(batch), "images": batch.images[rank() * count :][:count]})
    return lambda: made.advance(made.chunks(mine))


class Loop:
    """ProjectedGAN by hand: hinge game, DiffAugment, two Adams, one average."""

    def __init__(self, made: Trainer, optimizer: Callable[[str, list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        self.G, self.D, self.ema = (made.nets[name].module for name in ("G", "D", "G_ema"))  # type: ignore[attr-defined]
        trained = {n: [p for p in net.parameters() if p.requires_grad] for n, net in (("G", self.G), ("D", self.D))}
        self.Adam = {name: optimizer(name, params) for name, params in trained.items()}
        self.config, self.step = made.config, 0
        images = synthetic(made.config, made.method.feed, made.builder.resolution).images
        self.real = images.float().div_(127.5).sub_(1.0)

    def __call__(self) -> None:
        draws = Draws(seed=0, step=self.step, ghosts=(0,), ghost_batch=len(self.real))
        self.move("G", self.D, lambda: -self.seen(self.fake(draws.sub("G")), draws.sub("G")).mean())
        self.move("D", self.G, lambda: self.loss_D(draws.sub("D")))
        self.follow(0.999)
        self.step += 1

    def move(self, name: str, other: nn.Module, loss: Callable[[], Tensor]) -> None:
        asked = [p for p in other.parameters() if p.requires_grad]
        for p in asked:
            p.requires_grad_(False)
        loss().backward()
        self.Adam[name].step()
        self.Adam[name].zero_grad(set_to_none=True)
        for p in asked:
            p.requires_grad_(True)

    def fake(self, draws: Draws) -> Tensor:
        return self.G(draws.normal("z", self.G.z_dim), None, draws.sub("noise"))  # type: ignore[no-any-return]

    def seen(self, images: Tensor, draws: Draws) -> Tensor:
        return self.D(diff_augment(images, draws), None)  # type: ignore[no-any-return]

    def loss_D(self, draws: Draws) -> Tensor:
        with torch.no_grad():
            fake = self.fake(draws)
        fooled, told = self.seen(fake, draws.sub("fake")), self.seen(self.real, draws.sub("real"))
        return (1 + fooled).relu().mean() + (1 - told).relu().mean()

    @torch.no_grad()
    def follow(self, beta: float) -> None:
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.G.parameters()), 1 - beta)
        torch._foreach_copy_(list(self.ema.buffers()), list(self.G.buffers()))


class PlainLoop(Loop):
    @torch.no_grad()
    def follow(self, beta: float) -> None:
        for kept, now in zip(self.ema.parameters(), self.G.parameters()):
            kept.copy_(now.lerp(kept, beta))
        for kept, now in zip(self.ema.buffers(), self.G.buffers()):
            kept.copy_(now)


def plain(net: nn.Module) -> None:
    """Put torch's own layers in the place of ours, tensors taken over."""
    for name, child in net.named_children():
        sizes: dict[str, Any] = {"bias": getattr(child, "bias", None) is not None}
        if isinstance(child, SpectralConv2d):
            o, i, k, _ = child.weight_orig.shape
            sizes |= {"stride": child.stride, "padding": child.padding, "groups": child.groups}
            made: nn.Module = nn.utils.spectral_norm(nn.Conv2d(i * child.groups, o, k, **sizes))
            if isinstance(child, UpConv2d):
                made.register_forward_pre_hook(lambda conv, x: F.interpolate(x[0], scale_factor=2, mode="nearest"))
        elif isinstance(child, SpectralConvTranspose2d):
            i, o, k, _ = child.weight_orig.shape
            made = nn.utils.spectral_norm(nn.ConvTranspose2d(i, o, k, child.stride, child.padding, **sizes))
        elif isinstance(child, GhostBatchNorm2d):
            made = nn.BatchNorm2d(child.num_features)
        else:
            plain(child)
            continue
        made.load_state_dict(child.state_dict())
        made.train(child.training).requires_grad_(next(child.parameters()).requires_grad)
        setattr(net, name, made)


def loops(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    def adam(made: Trainer) -> Callable[[str, list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda name, params: make_optimizer(params, 2e-4, (0.0, 0.99), vars(made.config.optimizer)[name])

    found: dict[str, Callable[[], None]] = {n: ours(trainer(args, n)) for n in ("exact", "fast") if n in args.variants}
    if "bare" in args.variants:
        made = trainer(args, "fast")
        found["bare"] = Loop(made, adam(made))
    if "plain" in args.variants:
        made = trainer(args, "fast")
        for net in made.nets.values():
            plain(net.module)  # type: ignore[attr-defined]
        found["plain"] = PlainLoop(made, lambda name, params: torch.optim.Adam(params, 2e-4, (0.0, 0.99)))
    return found


def compare(args: argparse.Namespace) -> None:
    variants = loops(args)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(args.rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if turn:  # the first round warms up
                times[name].append(time.process_time() - start)
    for name, seconds in times.items():
        print(f"{name:6} {statistics.median(seconds):7.3f} s a step")
    for a, b in (("exact", "fast"), ("fast", "bare"), ("exact", "bare"), ("plain", "exact"), ("plain", "fast")):
        if a in times and b in times:
            print(f"{a} / {b}: {spread([x / y for x, y in zip(times[a], times[b])])}")


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f}  [{low:.3f}, {high:.3f}]"


def one_rank(args: argparse.Namespace) -> None:
    """In a process of its own: print seconds of processor time a step."""
    start_ranks("cpu")
    run, seconds = ours(trainer(args, args.variants, int(os.environ["WORLD_SIZE"]))), []
    for _ in range(args.steps + 1):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    print("SECONDS", *seconds[1:])
    destroy()


def ranks(args: argparse.Namespace, summation: str, count: int) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, __file__, "rank", "--steps", str(args.steps), "--variants", summation]
    words += ["--resolution", str(args.resolution), "--batch", str(args.batch), *(f"--set={s}" for s in args.set)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    own = [{**env, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    started = [subprocess.Popen(words, env=e, stdout=subprocess.PIPE, text=True) for e in own]
    said = [process.communicate()[0] for process in started]
    return [float(word) for line in said for word in line.split("SECONDS")[1].split()]


def scaling(args: argparse.Namespace) -> None:
    for summation in ("exact", "fast"):
        alone, together = (ranks(args, summation, count) for count in (1, 2))
        ratio = statistics.median(alone) / statistics.median(together)
        noise = ", ".join(f"{min(s):.2f} to {max(s):.2f} s" for s in (alone, together))
        print(f"{summation}: weak scaling 1 -> 2 ranks {ratio:.1%}  (1 rank, 2 ranks: {noise})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "scaling", "rank"])
    for name, default in (("rounds", 5), ("steps", 4), ("resolution", 128), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variants", default="exact,fast,bare,plain")
    parser.add_argument(
        "--no-heap", action="store_true", help="glibc's allocator as it is; training keeps freed memory"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.no_heap:
        keep_freed_memory()
    {"step": compare, "scaling": scaling, "rank": one_rank}[args.what](args)


if __name__ == "__main__":
    main()
