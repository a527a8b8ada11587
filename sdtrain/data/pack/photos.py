"""Real photographs without a download: those that the scikit-image package carries, for the quickstart."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from sdtrain.errors import DataError

# Colour photographs inside the package itself (0.22 to 0.26), public domain or CC0 by its own documentation.
# Left out: microscope and retina images, drawings, and a stereo pair whose licence is not stated.
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg")

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # without the mostly black sky

# name -> left, top and side of the square around the thing itself: a face, a cat, a cup, a rocket
SQUARES = {"astronaut": (70, 0, 310), "chelsea": (80, 0, 300), "coffee": (110, 20, 370), "rocket": (130, 0, 427)}


def export_photos(folder: str | Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Write photographs as PNG into `folder`, from which `sdtrain pack folder OUT --tile 64 --stride 32` cuts images.

    Returns the paths. Raises DataError when scikit-image is absent or carries none of them.
    """
    try:
        import skimage
    except ImportError:
        raise DataError(
            "the quickstart photographs come with scikit-image; run: pip install 'sdtrain[quickstart]'"
        ) from None
    source, target = Path(skimage.__file__).parent / "data", Path(folder)
    present = [source / name for name in names if (source / name).is_file()]
    if not present:
        raise DataError(f"{source} holds none of the expected photographs; install scikit-image 0.22 or later")
    target.mkdir(parents=True, exist_ok=True)
    return [_decoded(path, target) for path in present]


def _decoded(path: Path, target: Path) -> Path:
    """A PNG copy: what is packed later does not depend on who decodes the JPEG."""
    from sdtrain.data.read.images import load_image

    out = target / f"{path.stem}.png"
    if path.suffix == ".png":
        shutil.copyfile(path, out)
    else:
        load_image(path)[0].save(out)
    return out


def export_crops(folder: str | Path, side: int = 32, count: int = 1000, smallest: float = 0.8) -> list[Path]:
    """Write `count` square crops of each of SQUARES, `side` pixels wide (box filter), as PNG: one folder a photograph.

    A crop is a square of `smallest` to 1 times the side of the given one, anywhere within it, so that each shows the
    whole thing. Returns the paths; the same call writes the same pixels. Raises DataError as export_photos does.
    """
    from PIL import Image

    chance, paths = random.Random(0), []
    with tempfile.TemporaryDirectory() as photos:
        for path in export_photos(photos, PICTURES):
            target = Path(folder) / path.stem
            target.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as picture:
                for number in range(count):
                    box = _square_within(*SQUARES[path.stem], smallest, chance)
                    paths.append(target / f"{number:04d}.png")
                    picture.resize((side, side), Image.Resampling.BOX, box).save(paths[-1])
    return paths


def _square_within(
    left: int, top: int, whole: int, smallest: float, chance: random.Random
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a smaller square at a random place in the given one."""
    size = whole * chance.uniform(smallest, 1)
    x, y = (start + chance.uniform(0, whole - size) for start in (left, top))
    return x, y, x + size, y + size
