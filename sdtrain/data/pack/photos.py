"""Real photographs without a download: those that the scikit-image package carries, for the quickstart."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdtrain.errors import DataError

# Colour photographs inside the package itself (0.22 to 0.26), public domain or CC0 by its own documentation.
# Left out: microscope and retina images, drawings, and a stereo pair whose licence is not stated.
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg")

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # without the mostly black sky


def export_photos(folder: str | Path, max_side: int | None = None, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Write photographs as PNG into `folder`, from which `sdtrain pack folder OUT --tile 64 --stride 32` cuts images.

    `max_side` shrinks them (box filter) until no side is longer, so that a small tile shows a thing and not a texture.
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
    return [_decoded(path, target, max_side) for path in present]


def _decoded(path: Path, target: Path, max_side: int | None) -> Path:
    """A PNG copy: what is packed later does not depend on who decodes the JPEG."""
    from PIL import Image

    from sdtrain.data.read.images import load_image

    out = target / f"{path.stem}.png"
    if path.suffix == ".png" and max_side is None:
        shutil.copyfile(path, out)
        return out
    picture = load_image(path)[0]
    if max_side is not None:
        picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
    picture.save(out)
    return out
