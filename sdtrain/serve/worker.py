"""The child of `process.py`: it loads a network once and makes what `sdtrain upscale` and `sdtrain sample` write.

Nothing is written to a disk, and nothing that a request says is taken for a path. The kernel ends this process when a
job takes longer than it may, whatever it is in, and also where the server is gone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdtrain.commands.sample import png_of_pixels, walk
from sdtrain.commands.source import Source, file_of
from sdtrain.commands.upscale import add_arguments
from sdtrain.commands.upscaler import FACTORS, Upscaler
from sdtrain.data.read.images import ImageRejected, hush
from sdtrain.data.read.picture import Picture, picture_of, png_of
from sdtrain.engine.ranks import pick_device
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError
from sdtrain.exits import NO_MEMORY
from sdtrain.interop.architectures import NAMES, title
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import Network
from sdtrain.serve.process import receive, send
from sdtrain.terminal import clip, show_fault

Settings = dict[str, str]
Made = tuple[dict[str, Any], bytes]
MOST = 2**31 - 1  # of seeds and of numbers of latents


class Enlarging:
    """Uploads through a super-resolution network."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Everything that is not asked for here is as `sdtrain upscale` has it. Raises ConfigError or WeightsError."""
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        words = {name: str(setup[name]) for name in ("weights", "device", "max_image_mb")}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]
        self.upscaler = Upscaler.of(parser.parse_args(["-", f"--model={setup['path']}", "--out=-", *options]))
        # what `upscale` would choose by a timing may round in another way; a graph is run as it is
        runtime = "" if str(setup["path"]).endswith(".onnx") else "--runtime eager "
        self.command = f"sdtrain upscale PICTURE {runtime}--model {words_of(setup)}"

    def about(self) -> dict[str, Any]:
        found, net = self.upscaler.found, self.upscaler.net
        faces = {"factors": FACTORS, "resolution": net.resolution} if found.kind == "gcfsr" else {}
        named = title(found) if isinstance(found, Network) else f"{NAMES[found.kind]} graph (scale {found.scale})"
        return {"does": "pictures", "title": named, "command": self.command, **faces}

    def __call__(self, asked: Settings, data: bytes) -> Made:
        """The upload enlarged, or with `before` as it was read, for browsers that cannot show it.

        Raises ConfigError with the reason.
        """
        if self.upscaler.found.kind == "gcfsr":
            self.upscaler.factor = number(asked, "factor", float, *FACTORS)
        given_back = number(asked, "before", int, 0, 1)
        nothing_else(asked)
        try:
            picture = picture_of(data, self.upscaler.limits)
            if given_back:
                return {}, png_of(picture)
            began = time.perf_counter()
            made = self.upscaler(picture)
        except (ImageRejected, DataError) as error:
            raise ConfigError(f"this picture cannot be used: {error}") from error
        return {"ms": since(began), "before": size_of(picture), "size": size_of(made)}, png_of(made)


class Drawing:
    """Latents through a generator."""

    def __init__(self, setup: dict[str, Any], num_classes: int) -> None:
        """Raises ConfigError or WeightsError."""
        self.command = f"sdtrain sample {words_of(setup)}"
        label = "0" if num_classes else None  # a run's own proportions would need its data set
        self.source = Source(Path(setup["path"]), pick_device(setup["device"]), weights=setup["weights"], label=label)
        self.seed = self.source.seed

    def about(self) -> dict[str, Any]:
        source = self.source
        told = {"seed": self.seed, "most": MOST, "truncation": source.has_truncation, "classes": self._classes()}
        named = f"{NAMES.get(source.kind, source.kind)} generator"
        return {"does": "latents", "title": named, "command": self.command, **told}

    def _classes(self) -> list[str]:
        """What to call each class: its name where the training set is here, else its number."""
        numbers = [str(k) for k in range(self.source.num_classes)]
        if not numbers or self.source.config is None:
            return numbers
        try:
            names = [clip(str(name)) for name in self.source.training_set.label_names]
        except UserError:  # a run may be looked at where its data is not
            return numbers
        return names if len(names) == len(numbers) else numbers

    def __call__(self, asked: Settings, data: bytes) -> Made:
        """Image number `latent`, or the one at `share` of the way from there to `to`. Raises ConfigError."""
        source = self.source
        seed = number(asked, "seed", int, 0, MOST)
        seed = self.seed if seed is None else seed
        here, there = (number(asked, name, int, 0, MOST) or 0 for name in ("latent", "to"))
        share = number(asked, "share", float, 0, 1)
        label = number(asked, "class", int, 0, max(source.num_classes - 1, 0))
        truncation = number(asked, "truncation", float, -1, 2)
        nothing_else(asked)
        label = "0" if label is None and source.num_classes else label
        source.choose(seed=seed, label=None if label is None else str(label), truncation=truncation)
        began = time.perf_counter()
        if share:
            (a, b), labels = source.codes([here, there])
            shares = torch.tensor([share], device=a.device)
            image = walk(source, a, b, None if labels is None else labels[0], shares, here)[0]
        else:
            image = source([here])[0]
        return {"ms": since(began), "size": list(image.shape[:0:-1])}, png_of_pixels(image.permute(1, 2, 0).numpy())


def words_of(setup: dict[str, Any]) -> str:
    """The network as it is typed for other commands."""
    return shlex.quote(setup["path"]) + ("" if setup["weights"] == "ema" else f" --weights {setup['weights']}")


def maker_of(setup: dict[str, Any]) -> Enlarging | Drawing:
    """What fits the network: one that draws from noise has a `z_dim`. Raises ConfigError or WeightsError."""
    file = file_of(Path(setup["path"]), setup["weights"])
    if file.suffix == ".onnx":
        return Enlarging(setup)
    found = load_network(file)
    return Drawing(setup, found.num_classes) if hasattr(found.fresh("meta"), "z_dim") else Enlarging(setup)


def number(asked: Settings, name: str, kind: Callable[[str], Any], low: float, high: float) -> Any:
    """A setting, taken out of those asked for; None where it is not there. Raises ConfigError for another value."""
    text = asked.pop(name, None)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:  # not a number (nan) is not between them either
        whole = "whole number" if kind is int else "number"
        raise ConfigError(f"{name} is {clip(text)!r}, where a {whole} from {low:g} to {high:.10g} is meant")
    return value


def nothing_else(asked: Settings) -> None:
    if asked:
        raise ConfigError(f"{clip(next(iter(asked)))!r} is no setting of this page")


def since(began: float) -> int:
    """Whole milliseconds."""
    return round(1000 * (time.perf_counter() - began))


def size_of(picture: Picture) -> list[int]:
    """[width, height]."""
    return [*picture.rgb.shape[1::-1]]


def answer(maker: Callable[[Settings, bytes], Made], asked: Settings, data: bytes) -> Made:
    """What the maker makes, or the sentence with which it refuses; a fault of ours ends the process."""
    try:
        return maker(asked, data)
    except UserError as error:
        return {"refused": str(error)}, b""
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        return {"refused": "there is not enough memory for it; take a smaller picture"}, b""


def main() -> int:
    answers = os.fdopen(os.dup(1), "wb")
    hush()
    os.dup2(2, 1)  # what libraries print is no answer
    for number in (signal.SIGALRM, signal.SIGPIPE):  # they end it: its time is up, or nobody listens any more
        signal.signal(number, signal.SIG_DFL)
    setup, _ = receive(sys.stdin.buffer)
    try:
        maker = maker_of(setup)
        send(answers, maker.about())
    except UserError as error:
        send(answers, {"refused": str(error)})
        return EXIT_USER_ERROR
    while True:
        try:
            asked, data = receive(sys.stdin.buffer)
        except EOFError:
            return EXIT_OK
        signal.setitimer(signal.ITIMER_REAL, setup["max_seconds"])
        said, made = answer(maker, asked, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, said, made)


if __name__ == "__main__":
    sys.excepthook = show_fault
    sys.exit(main())
