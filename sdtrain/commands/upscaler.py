"""A network with the settings of `sdtrain upscale`: what makes a larger picture of each picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands.running import form_of, upscaling_run
from sdtrain.commands.source import file_of
from sdtrain.data.read.budget import LIMITS, PictureLimits, available_bytes
from sdtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from sdtrain.data.read.picture import Picture

SMALLEST_TILE = 64
FACTORS = (4.0, 64.0)
RESULT_BYTES = 24  # a pixel: whole numbers, and as they are encoded and written
DEEP_BYTES = 60  # where they have 16 bits, or are float32 to be resized


@dataclass
class Upscaler:
    """A network with the settings of one command; Picture -> Picture."""

    net: Any  # a generator of sdtrain.models
    found: Any  # sdtrain.interop.network.Network
    device: Any
    tile: int = 512
    overlap: int = 32
    scale: float | None = None
    factor: float | None = None
    seed: int = 0
    path: Path = field(default_factory=Path)
    limits: PictureLimits = LIMITS
    runtime: str = "eager"
    precision: str = "fp32"
    pixels: int = 0  # of the pictures to come, as far as they are known
    run: Any = field(default=None, init=False)  # called in the place of `net`, chosen with the first picture

    @classmethod
    def of(cls, args: argparse.Namespace) -> Upscaler:
        """Load the network; WeightsError unless it is a generator known here."""
        from sdtrain.engine.ranks import pick_device
        from sdtrain.interop.architectures import require, title
        from sdtrain.interop.loading import load_network
        from sdtrain.interop.tiled import auto_overlap

        if args.model.suffix == ".onnx":
            return cls.of_graph(args)
        device = pick_device(args.device)
        file = file_of(args.model, args.weights)
        found = load_network(file, prefer="params_ema" if args.weights == "ema" else "params")
        require(file, found, player="Generator")
        if args.factor is not None and found.kind != "gcfsr":
            raise ConfigError(f"--factor is GCFSR's condition, but {file} holds a {title(found)}; leave it out")
        net: Any = found.build().requires_grad_(False)
        if hasattr(net, "z_dim"):
            raise ConfigError(f"{file} holds {found.kind}, which draws images from noise; use `sdtrain sample`")
        overlap = auto_overlap(net) if args.overlap == "auto" else int(args.overlap)
        same = dict(scale=args.scale, factor=args.factor, seed=args.seed, path=file)
        same["limits"] = PictureLimits(megabytes=args.max_image_mb)
        same |= {"runtime": args.runtime or "eager", "precision": args.precision}
        upscaler = cls(net.to(device), found, device, args.tile, min(overlap, args.tile // 2), **same)
        if upscaler.runtime != "auto":  # what cannot be is no fault of a picture
            upscaler.run = upscaling_run(upscaler)
        return upscaler

    @classmethod
    def of_graph(cls, args: argparse.Namespace) -> Upscaler:
        """An ONNX file, which stays on the CPU; raises WeightsError unless it enlarges photographs."""
        from sdtrain.interop.onnx_graph import PhotoGraph
        from sdtrain.interop.tiled import AUTO_OVERLAP_MAX

        if args.factor is not None or args.device not in ("auto", "cpu"):
            raise ConfigError("--factor and --device are not for an .onnx file, which onnxruntime runs on the CPU here")
        if args.runtime not in (None, "auto") or args.precision != "fp32":
            raise ConfigError("--runtime and --precision are not for an .onnx file, which onnxruntime runs as it is")
        net = PhotoGraph(args.model)
        overlap = AUTO_OVERLAP_MAX if args.overlap == "auto" else int(args.overlap)
        limits = PictureLimits(megabytes=args.max_image_mb)
        more: dict[str, Any] = {"scale": args.scale, "path": args.model, "limits": limits}
        upscaler = cls(net, net, "cpu", args.tile, min(overlap, args.tile // 2), **more)
        upscaler.run = net
        return upscaler

    def __call__(self, picture: Any, progress: Callable[[int], object] = lambda pixels: None) -> Any:
        """Raises DataError for a picture the network cannot take."""
        import torch

        image = torch.from_numpy(picture.rgb.copy()).permute(2, 0, 1)
        height, width = image.shape[-2:]
        refuse_result(height, width, self.times, self.result_bytes(picture))
        if self.run is None:
            self.run = upscaling_run(self, image)
        bits = picture.bits if self.scale is None else None  # what is resized is rounded after
        out = self.face(image, self.run) if self.found.kind == "gcfsr" else self._photo(image, bits, progress)
        if self.scale is not None:
            out = resized(out, (max(1, round(height * self.scale)), max(1, round(width * self.scale))))
        alpha = picture.alpha
        if alpha is not None:
            alpha = resized(torch.from_numpy(alpha.copy())[None], tuple(out.shape[-2:]))[0].numpy()
        if out.is_floating_point():
            with torch.inference_mode():  # as it was made
                out.clamp_(0, 1)
        return replace(picture, rgb=out.permute(1, 2, 0).numpy(), alpha=alpha)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, beside the network, what is made of a picture."""
        found = {name: getattr(self, name) for name in ("tile", "overlap", "scale", "factor", "seed")}
        form = form_of(self.runtime, self.precision)
        return found if form == "eager" else {**found, "runtime": form}  # another rounds in another way

    @property
    def enlargement(self) -> float | None:
        """Side of a result / of its picture; None where every result has the side of the network."""
        return self.scale or getattr(self.net, "scale", None)

    @property
    def times(self) -> float:
        """The largest enlargement on the way to a result."""
        return max(self.scale or 0, getattr(self.net, "scale", 1))

    def both_fit(self, last: Picture, this: Picture) -> bool:
        """Whether there is memory for the results of two pictures at once."""
        need = sum(self.result_bytes(one) * one.rgb.shape[0] * one.rgb.shape[1] for one in (last, this))
        return need * self.times**2 <= available_bytes()

    def result_bytes(self, picture: Picture) -> int:
        """What a pixel of the result takes at most, until it is written."""
        return RESULT_BYTES if self.scale is None and picture.bits == 8 else DEEP_BYTES

    @property
    def fold(self) -> int:
        """What the sides of a tile must be a multiple of."""
        return 4 // self.net.scale if self.found.kind == "rrdbnet" else 1

    def _photo(self, image: Tensor, bits: int | None, progress: Callable[[int], object]) -> Tensor:
        import torch

        from sdtrain.interop.tiled import enlarge

        while True:
            try:
                sizes = dict(tile=self.tile, overlap=self.overlap, fold=self.fold, scale=self.net.scale)
                return enlarge(self.run, image, bits=bits, device=self.device, progress=progress, **sizes)
            except torch.OutOfMemoryError:
                if self.tile // 2 < max(SMALLEST_TILE, 2 * self.overlap):
                    raise DataError(f"tiles of {self.tile} px do not fit into memory; use --device cpu") from None
                self.tile //= 2
                print(f"out of memory; going on with tiles of {self.tile} px", file=sys.stderr)

    def face(self, image: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """GCFSR's test procedure: bicubic to full size, 8-bit rounding, the network with the factor, fixed noise."""
        import torch

        from sdtrain.data.degrade.resize_matlab import imresize
        from sdtrain.rng import Draws

        side, full = image.shape[-1], self.net.resolution
        if image.shape[-2] != side or side > full:
            raise DataError(
                f"GCFSR takes square, aligned faces of at most {full} px, not {side} x {image.shape[-2]}; crop the face"
            )
        factor = self._factor_for(side, full)
        draws = Draws(seed=self.seed, step=0, ghosts=(0,), ghost_batch=1, device=self.device)
        with torch.inference_mode():
            large = imresize(image, full / side) if side < full else image
            x = (large.clamp(0, 1) * 255).round() / 127.5 - 1
            out = run(x[None].to(self.device), factor, draws)[0]
        return (out.float().cpu().clamp(-1, 1) + 1) / 2

    def _factor_for(self, side: int, full: int) -> float:
        if self.factor is not None:
            return self.factor
        if FACTORS[0] <= full / side <= FACTORS[1]:
            return full / side
        raise DataError(f"a {side} px face is no reduction by 4 to 64 of {full} px; say --factor, how blurred it is")


def refuse_result(height: int, width: int, scale: float, result_bytes: int) -> None:
    """Raise DataError for a result that would not fit into the memory that is free."""
    need, free = int(result_bytes * height * width * scale**2), available_bytes()
    if need > free:
        raise DataError(
            f"its result of {width * scale:.0f}x{height * scale:.0f} pixels needs {need >> 20} MB of memory, "
            f"{free >> 20} MB are free; cut it into pieces"
        )


def resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """[C, H, W] by bicubic interpolation, antialiased when shrinking, to [C, *size]."""
    from torch.nn import functional as F

    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
