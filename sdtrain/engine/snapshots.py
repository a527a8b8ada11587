"""Weights at chosen shares of training, for what compares moments of a run (Table 3 of SD-GAN).

    RUN/snapshots/
      img_000123456/
        G.safetensors        networks under their official names, without optimizers
        G_ema.safetensors
        complete.json        the marker, as in checkpoint.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sdtrain.engine.checkpoint import MARKER, retain, together, write_folder
from sdtrain.engine.ranks import is_main


def snapshot_positions(shares: Iterable[float], total_img: int, batch_size: int) -> frozenset[int]:
    """Images after the steps that reach these shares of `total_img`; a share of 0 has no step."""
    wanted = [max(round(share * total_img), 1) for share in shares if share]
    return frozenset(-(-images // batch_size) * batch_size for images in wanted)


def save_snapshot(root: Path, seen_img: int, nets: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the weights of one position, {net: {name: [...]}}, with all ranks.

    Raises `RunError` on every rank when it cannot be written.
    """
    final = write_folder(root, seen_img, nets)
    # keeps all, removes what was interrupted
    together(lambda: retain(root, 0) if is_main() else None, final, root.parent)
    return final


def cut_back(root: Path, seen_img: int) -> None:
    """Remove what lies later than `seen_img`: the run that goes on from there writes it again. All ranks together."""
    at = root / f"img_{seen_img:09d}"
    together(lambda: _remove_later(root, seen_img) if is_main() else None, at, root.parent)


def _remove_later(root: Path, seen_img: int) -> None:
    for folder in root.glob("img_*"):
        if folder.name > f"img_{seen_img:09d}" and not (folder.is_symlink() or root.is_symlink()):
            (folder / MARKER).unlink(missing_ok=True)  # from here on it does not count
            shutil.rmtree(folder)
