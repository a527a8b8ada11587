"""What a network is shown when it is exported, and the picture of its card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.data.degrade.resize_matlab import imresize
from sdtrain.data.read.images import ImageRejected, is_image_name
from sdtrain.data.read.picture import read_picture
from sdtrain.engine.positions import complete
from sdtrain.errors import ConfigError, UserError
from sdtrain.interop.loading import load_network, read_tensors
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.metrics.sr_metrics import to_uint8
from sdtrain.release.outward import FACE, Outward, in_order
from sdtrain.rng import generator
from sdtrain.tasks.sr_pictures import headed, strip

SHOWN = (*PHOTOS, FACE)  # kinds that are shown pictures
SIZES = ((48, 64), (96, 72))  # height and width of the two cases, where pictures are that large
LEAST = 8  # pixels of a side
MOST = 64  # pictures that are read
SPLITS = ("test", "val")
COLUMNS = 4  # samples in a row of a preview
STRIPS = 3  # pictures in a preview


def held_back(source: Path, folder: Path | None) -> tuple[list[Tensor], str]:
    """Pictures uint8 [3, h, w] that the network was not trained on, and where they are from.

    Those of `folder`, else the run's own inputs of test or validation, else smooth noise. Raises ConfigError for a
    folder without pictures.
    """
    if folder is not None:
        return read_pictures(folder), f"pictures of {folder.name}"
    for split in SPLITS:
        path = source / "inputs" / f"{split}.safetensors"
        if path.is_file():
            found = [x for x in read_tensors(path).values() if is_shown(x)]
            if found:
                return spread(found, MOST), f"the inputs that the run measures on ({split})"
    return [smooth_noise(i) for i in range(4)], "smooth noise, for want of a run's inputs (say --images FOLDER)"


def spread(pictures: list[Tensor], most: int) -> list[Tensor]:
    """At most so many, from all over the list: neighbours may be pieces of one photograph."""
    count = min(most, len(pictures))
    return [pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)]


def is_shown(x: Tensor) -> bool:
    """Whether it is a picture uint8 [3, h, w], large enough for every network."""
    return x.dtype == torch.uint8 and x.ndim == 3 and len(x) == 3 and min(x.shape[1:]) >= LEAST


def read_pictures(folder: Path) -> list[Tensor]:
    """The first pictures of a folder, uint8 [3, h, w]. Raises ConfigError when there is none that can be read."""
    found: list[Tensor] = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file() and is_image_name(path.name) and len(found) < MOST:
            try:
                found.append(to_uint8(torch.from_numpy(read_picture(path).rgb.copy()).permute(2, 0, 1)))
            except (ImageRejected, UserError) as error:
                raise ConfigError(f"--images {folder}: {path.name} cannot be read ({error}); take it away") from error
    if not found:
        raise ConfigError(f"--images {folder} holds no pictures; name a folder of PNG, JPEG or WebP files")
    return found


def smooth_noise(number: int, side: int = 96) -> Tensor:
    """uint8 [3, side, side]: noise of a sixteenth of the side, enlarged."""
    coarse = torch.rand(1, 3, side // 16, side // 16, generator=generator("release", "picture", number))
    return (F.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)


def cases(pictures: list[Tensor], outward: Outward) -> list[Tensor]:
    """Two batches in [0, 1]: one picture and two of another size; of a network of fixed size, one and three faces.

    [] for what begins with latents.
    """
    if outward.kind in PHOTOS:
        return [batch(pictures, 1 + i, size, outward.fold) for i, size in enumerate(SIZES)]
    if outward.kind != FACE and not outward.judges:
        return []
    side = outward.side
    return [torch.stack([as_face(pictures[i % len(pictures)], side) for i in range(n)]) for n in (1, 3)]


def batch(pictures: list[Tensor], count: int, size: tuple[int, int], fold: int) -> Tensor:
    """[count, 3, h, w], h and w at most `size` and multiples of `fold`."""
    chosen = [pictures[i % len(pictures)] for i in range(count)]
    height, width = (
        max(min(most, *(x.shape[axis] for x in chosen)) // fold, 1) * fold for axis, most in enumerate(size, 1)
    )
    return torch.stack([x[:, :height, :width] for x in chosen]).float() / 255


def as_face(picture: Tensor, side: int) -> Tensor:
    """A square face in [0, 1] [3, side, side], by bicubic from whatever size."""
    least = min(picture.shape[1:])
    return imresize(picture[:, :least, :least].float() / 255, side / least).clamp(0, 1)[:, :side, :side]


def preview(source: Path, network: Network, outward: Outward, pictures: list[Tensor]) -> Tensor:
    """Before and after, uint8 [3, H, W].

    Super-resolution: input, bicubic enlargement, result. Others: samples of the earliest snapshot above those of the
    same latents now; without snapshots the latter alone.
    """
    if outward.kind in SHOWN:
        return _strips(outward, pictures)
    rows = [_samples(net) for net in (*_earliest(source, network), outward)]
    return torch.cat(rows, 1)


def _strips(outward: Outward, pictures: list[Tensor]) -> Tensor:
    rows = []
    for i, picture in enumerate(spread(pictures, STRIPS)):
        x = (
            as_face(picture, outward.side)[None]
            if outward.kind == FACE
            else batch([picture], 1, (96, 96), outward.fold)
        )
        with torch.no_grad():
            made = outward(*in_order(outward.names, outward.inputs(1, f"preview {i}", x)))[0]
        large = x if outward.kind == FACE else imresize(x, outward.scale)
        images = x[0], large[0].clamp(0, 1), (made - outward.lowest) / (1 - outward.lowest)
        rows.append(strip([to_uint8(image) for image in images]))
    return headed(torch.cat(rows, 1), ["input", "bicubic", "this network"])


def _earliest(source: Path, network: Network) -> Iterator[Outward]:
    """The same generator as the first snapshot of its run has it, where there is one."""
    found = complete(source / "snapshots") if source.is_dir() else []
    for folder in found[:1]:
        path = folder / f"{network.role}.safetensors"
        if path.is_file() and (first := load_network(path, network.role)).resolution == network.resolution:
            yield Outward(first).eval()


def _samples(outward: Outward) -> Tensor:
    with torch.no_grad():
        images = outward(*in_order(outward.names, outward.inputs(COLUMNS, "preview")))
    return torch.cat([*((images[:, :3] + 1) * 127.5).round().to(torch.uint8)], 2)


def save_preview(path: Path, image: Any) -> None:
    """Write [3, H, W] uint8 as PNG."""
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, "PNG")
