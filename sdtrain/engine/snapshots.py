"""Weights at chosen shares of training, for what compares moments of a run (Table 3 of SD-GAN).

RUN/snapshots/
  img_000123456/
    G.safetensors        networks under their official names, without optimizers
    G_ema.safetensors
    complete.json        the marker, as in checkpoint.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from sdtrain.engine.positions import MARKER, position
from sdtrain.engine.writing import together


def snapshot_positions(shares: Iterable[float], total_img: int, batch_size: int) -> frozenset[int]:
    """Images after the steps that reach these shares of `total_img`; a share of 0 has no step."""
    wanted = [max(round(share * total_img), 1) for share in shares if share]
    return frozenset(-(-images // batch_size) * batch_size for images in wanted)


def cut_back(root: Path, seen_img: int) -> None:
    """Remove what lies later than `seen_img`: the run that goes on from there writes it again. All ranks together."""
    at = root / f"img_{seen_img:09d}"
    together(lambda: _remove_later(root, seen_img), at, root.parent)


def _remove_later(root: Path, seen_img: int) -> None:
    for folder in root.glob("img_*"):
        if (position(folder) or 0) > seen_img and not (folder.is_symlink() or root.is_symlink()):
            (folder / MARKER).unlink(missing_ok=True)  # from here on it does not count
            shutil.rmtree(folder)
