"""`--runtime` of the commands that use a network: its words, and what is tried of a picture, a face or a batch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError
from sdtrain.release.names import BACKENDS, PRECISIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdtrain.commands.upscaler import Upscaler
    from sdtrain.interop.network import Network
    from sdtrain.release.backends import Run
    from sdtrain.release.runtime import Piece, Runtime

MODULES = BACKENDS[:3]  # give modules, which are called with draws and in parts
SMALLEST_PIECE = 64  # pixels a side
DATA_SET = "the bytes of a data set or film must not depend on a timing; see what `sdtrain speed` says, and name one"


def add_runtime(parser: argparse.ArgumentParser, default: str, backends: Sequence[str] = BACKENDS) -> None:
    """--runtime and, where a network may run in it, --precision."""
    add = parser.add_argument
    add(
        "--runtime",
        choices=("auto", *backends),
        help=f"how the network is run; auto tries which is fastest here, and keeps the answer (default: {default})",
    )
    if backends == BACKENDS:
        what = "bf16: networks for photographs in bfloat16 too, where no 8-bit value is off by more than one"
        add("--precision", choices=PRECISIONS, default="fp32", help=f"{what} (default: fp32)")


def form_of(backend: str, precision: str) -> str:
    """The name of a form, as `Runtime` has it."""
    return backend if precision == "fp32" or backend == "auto" else f"{backend} {precision}"


def about(network: Network, unit: str, work: Sequence[int]) -> dict[str, Any]:
    """What calibrations of alike networks for alike work have in common."""
    shape = {"kind": network.kind, "options": network.options, "resolution": network.resolution}
    return {**shape, "num_classes": network.num_classes, "unit": unit, "work": list(work)}


def of_modules(
    network: Network, net: Any, device: torch.device, *, asked: str, unit: str, work: Sequence[int], precision: str = ""
) -> Runtime:
    """Forms that are modules with the attributes of `net`. Raises ConfigError for another."""
    from sdtrain.release import backends
    from sdtrain.release.runtime import Runtime

    if precision == "bf16" or asked not in ("auto", *MODULES):
        what = f"--runtime {asked}" if precision != "bf16" else "--precision bf16"
        raise ConfigError(f"{what} is for networks of photographs; for {network.kind} say auto, {', '.join(MODULES)}")
    forms = {name: partial(backends.made, name, network, net, ()) for name in MODULES}
    return Runtime(forms, about(network, unit, work), device, asked)


def upscaling_run(upscaler: Upscaler, image: Tensor | None = None) -> Run:
    """What is called in the place of an upscaler's network for a picture [3, H, W] and those to come.

    Without a picture it is tried on noise. Raises ConfigError for a form that was asked for and cannot be.
    """
    import torch

    from sdtrain.release.runtime import Piece
    from sdtrain.rng import generator

    own, face = upscaler, upscaler.found.kind == "gcfsr"
    if image is None:
        side = own.net.resolution // 4 if face else SMALLEST_PIECE
        image = torch.rand(3, side, side, generator=generator("runtime"))
    here = image.shape[-2] * image.shape[-1]
    pixels, how = max(here, own.pixels), {"asked": own.runtime, "precision": own.precision}
    if face:
        runtime = of_modules(own.found, own.net, own.device, unit="pixel", work=[own.net.resolution], **how)
        return runtime.chosen([Piece(here, partial(own.face, image))], pixels)
    tiles = {"tile": own.tile, "overlap": own.overlap, "fold": own.fold}
    return photo_run(own.found, own.net, own.device, image, pixels, tiles, **how)


# Photographs


def photo_run(
    network: Network,
    net: Any,
    device: Any,
    image: Tensor,
    pixels: int,
    tiles: dict[str, int],
    *,
    asked: str,
    precision: str,
) -> Run:
    """What enlarges `image` [3, H, W] and others, `pixels` in all, in the place of `net`; `tiles` as for `enlarge`.

    Raises ConfigError for a form that was asked for and cannot be.
    """
    from sdtrain.release import backends
    from sdtrain.release.outward import Outward
    from sdtrain.release.runtime import Runtime

    parts = list(photo_parts(image, device, **tiles))

    @cache
    def outward() -> Outward:
        return Outward(network, clamped=False).eval().to(device)

    def form(backend: str, kind: str) -> Run:
        return backends.made(backend, network, outward(), parts[:1], kind)

    kinds = dict.fromkeys(("fp32", precision))
    forms: dict[str, Callable[[], Run]] = {
        form_of(name, kind): partial(form, name, kind) for kind in kinds for name in BACKENDS
    }
    forms["eager"] = lambda: net
    side = [max(n // SMALLEST_PIECE, 1) * SMALLEST_PIECE for n in parts[-1].shape[-2:]]
    runtime = Runtime(forms, about(network, "pixel", side), device, form_of(asked, precision))
    return runtime.chosen([piece_of(part) for part in parts], pixels)


def photo_parts(image: Tensor, device: Any, *, tile: int, overlap: int, fold: int) -> Iterator[Tensor]:
    """[1, 3, h, w]: the first tile of a picture [3, H, W] on the device, its quarter and so on, the smallest first."""
    from torch.nn import functional as F

    from sdtrain.interop.tiled import spans

    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % fold, 0, -height % fold), mode="replicate")
    h, w = (spans(side, tile, overlap, fold)[0].stop for side in padded.shape[-2:])
    depth = max(max(min(h, w) // SMALLEST_PIECE, 1).bit_length() - 1, 0)
    for times in range(depth, -1, -1):
        yield padded[..., : (h >> times) // fold * fold, : (w >> times) // fold * fold].to(device)


def piece_of(part: Tensor) -> Piece:
    import torch

    from sdtrain.release.runtime import Piece

    @torch.inference_mode()
    def draw(run: Run) -> Tensor:
        """[1, 3, scale h, scale w] on the CPU."""
        return run(part).float().cpu()

    return Piece(part.shape[-2] * part.shape[-1], draw)


def refuse_runtime(asked: str | None, why: str) -> None:
    """Raise ConfigError where a runtime was asked for that changes nothing, or too much."""
    if asked is not None:
        raise ConfigError(f"--runtime {asked}: {why}")
