"""What the saved weights of a run show: perceptual variation (Table 3) and the interplay of the losses (Figure 6)."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.builder import Builder
from sdtrain.commands.results import Written
from sdtrain.commands.source import Source, config_of
from sdtrain.engine.checkpoint import newest, verify
from sdtrain.engine.make import make_engine
from sdtrain.engine.net import load_strictly
from sdtrain.engine.positions import position, positions
from sdtrain.engine.ranks import pick_device
from sdtrain.errors import RunError
from sdtrain.files import load_tensors
from sdtrain.losses.perceptual import LPIPS
from sdtrain.metrics.variation import variation_per_latent
from sdtrain.models.ghost import set_ghost_batch
from sdtrain.sampling import generate, to_uint8
from sdtrain.weights import check_weights, load_weights

PER_QUADRANT = 4
D_BATCH = 4  # minibatch statistics see this many images, in the order of their indices


def saved_weights(run: Path) -> dict[int, Path]:
    """Where the weights of each position are: a snapshot, or a checkpoint. Whether it is whole shows `verify`."""
    found = {}
    for place in ("checkpoints", "snapshots"):
        for folder in positions(run / place):
            at = position(folder)
            if at and (folder / "G_ema.safetensors").is_file():
                found[at] = folder
    return found


def at_shares(positions: Iterable[int], shares: Sequence[float], total: int, interval: int) -> dict[float, int]:
    """For each share (percent) of `total` the nearest position, at most `interval` away; no position has two shares."""
    near: dict[float, list[tuple[float, int]]] = {}
    for at in positions:
        distance, share = min((abs(at - share * total / 100), share) for share in shares)
        if distance <= interval:
            near.setdefault(share, []).append((distance, at))
    return {share: min(near[share])[1] for share in shares if share in near}


def weights_at(run: Written, shares: Sequence[float], notes: list[str]) -> dict[float, Path]:
    """Complete weights near these shares of training; which are missing is noted. RunError when two are not found."""
    saved = saved_weights(run.path)
    total = run.total_img or max(saved, default=0)
    config = config_of(run.path)
    interval = max(config.save_img, config.batch_size) if config else round(total / 10)
    while True:
        chosen = at_shares(saved, shares, total, interval)
        damaged = {at: reason for at in chosen.values() if (reason := verify(saved[at]))}
        for at, reason in damaged.items():
            notes.append(f"{run.name}: {saved.pop(at).name} is not used: {reason}")
        if not damaged:
            break
    missing = [f"{share:g}" for share in shares if share not in chosen]
    if len(chosen) < 2:
        raise RunError(
            f"{run.path} has weights at {len(chosen)} of the shares {listed(shares)} % of {total:,} images, and "
            "variation compares at least two; save snapshots, raise keep_checkpoints, or name other --shares"
        )
    if missing:
        notes.append(f"{run.name}: no weights within {interval:,} images of {', '.join(missing)} % of {total:,} images")
    return {share: saved[at] for share, at in chosen.items()}


def listed(shares: Iterable[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares)


def lpips_of(run: Path, args: argparse.Namespace, device: torch.device) -> tuple[LPIPS, str]:
    """The run's own LPIPS unless `--lpips` says otherwise, and what tables call it.

    Raises WeightsError when its file is missing.
    """
    from sdtrain.errors import WeightsError

    config = config_of(run)
    source = args.lpips or (config.weights.lpips if config else None) or "download"
    problems = check_weights({"lpips_vgg": source})
    if problems:
        raise WeightsError(" ".join(problems))
    called = "LPIPS of random weights" if source == "random" else "LPIPS"  # which must not be taken for that of papers
    return LPIPS(load_weights("lpips_vgg", source)).to(device), called


def images_of(source: Source, indices: Sequence[int], batch: int) -> Tensor:
    """Float images [N, 3, R, R] in [-1, 1] on the CPU; layer noise belongs to the index, so checkpoints share it."""
    more = {"seed": source.seed, "class_counts": source.class_counts, "device": source.device}
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    return torch.cat([generate(source.net, part, **more).float().cpu() for part in parts])


@dataclass(frozen=True)
class Variation:
    """Table 3 for one run."""

    mean: float
    deviation: float  # over latents, with n
    at_shares: str
    at_images: str
    protocol: dict[str, Any]
    per_latent: Tensor  # [latents], float64
    folders: dict[float, Path]  # share -> weights
    distance: str  # LPIPS, or LPIPS of random weights


def variation(run: Written, shares: Sequence[float], args: argparse.Namespace, notes: list[str]) -> Variation:
    """How much the images of fixed latents change between the weights at these shares of training.

    Raises RunError when fewer than two are saved, WeightsError when those of LPIPS are missing.
    """
    device = pick_device(args.device)
    folders = weights_at(run, shares, notes)
    lpips, called = lpips_of(run.path, args, device)
    sources = [Source(folder, device, data=getattr(args, "data", None)) for folder in folders.values()]
    distance = lambda x, y: lpips(x.to(device), y.to(device)).cpu()  # noqa: E731
    parts = []
    for first in range(0, args.latents, args.batch):
        part = range(first, min(first + args.batch, args.latents))
        made = [images_of(source, part, args.batch) for source in sources]
        parts.append(variation_per_latent(made, distance, mode=args.pairs, batch_size=args.batch))
    values = torch.cat(parts)
    images = ", ".join(f"{position(folder):,}" for folder in folders.values())
    protocol = {"shares": listed(folders), "lpips weights": digest(lpips)}
    mean, deviation = values.mean().item(), values.std(correction=0).item()
    return Variation(mean, deviation, listed(folders), images, protocol, values, folders, called)


def digest(net: torch.nn.Module) -> str:
    """A hash of the weights: distances of unlike networks do not compare."""
    found = hashlib.sha256()
    for tensor in net.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def distances(found: Iterable[Variation]) -> str:
    """What their numbers are distances of, each name once."""
    return " or ".join(dict.fromkeys(variation.distance for variation in found))


@torch.no_grad()
def interplay(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figure 6: of many latents the largest and smallest LPIPS(G, G_ema), and of each the lowest and highest D logits.

    Images are those of G_ema; G belongs to the same checkpoint and has the same noise. No augmentation.
    Raises RunError for a run without a complete checkpoint.
    """
    device = pick_device(args.device)
    checkpoint, refused = newest(run / "checkpoints")
    if checkpoint is None:
        raise RunError("; ".join([f"{run} has no complete checkpoint, and D is needed", *refused]))
    path = checkpoint.path
    teacher = Source(path, device, data=getattr(args, "data", None))
    student = Source(path, device, data=getattr(args, "data", None), weights="raw")
    (lpips, called), D = lpips_of(run, args, device), discriminator(path, teacher)
    distances = []
    for first in range(0, args.interplay_latents, args.batch):
        part = range(first, min(first + args.batch, args.interplay_latents))
        x, y = (images_of(source, part, args.batch).to(device) for source in (student, teacher))
        distances.append(lpips(x, y).cpu())
    scores = torch.cat(distances)
    order = scores.argsort(descending=True).tolist()
    found: dict[str, Any] = {"num_latents": args.interplay_latents, "seen_img": position(path), "distance": called}
    for name, chosen in (("worst", order[: args.extremes]), ("best", order[-args.extremes :])):
        found[name] = quadrant(D, teacher, sorted(chosen), scores)
    return found


def quadrant(D: Any, teacher: Source, indices: list[int], scores: Tensor) -> dict[str, Any]:
    """The images with the lowest and with the highest logits among `indices`, left to right.

    `scores` [num_latents]: LPIPS distances of all latents. The images are uint8 [2 PER_QUADRANT, R, R, 3].
    """
    logits: list[Tensor] = []
    for first in range(0, len(indices), D_BATCH):
        part = indices[first : first + D_BATCH]
        full = (part * D_BATCH)[:D_BATCH]  # the last batch is filled up, so that D always compares as many images
        labels = teacher.latents(full)[1]
        made = D(images_of(teacher, full, D_BATCH).to(teacher.device), labels)
        logits.append(made.flatten(1).mean(1)[: len(part)].cpu())
    values = torch.cat(logits)
    order = values.argsort().tolist()
    shown = order[:PER_QUADRANT] + order[-PER_QUADRANT:]
    chosen = [indices[i] for i in shown]
    return {
        "indices": chosen,
        "logits": [float(values[i]) for i in shown],
        "distances": [float(scores[i]) for i in chosen],
        "images": to_uint8(images_of(teacher, chosen, D_BATCH)).permute(0, 2, 3, 1).numpy(),
    }


def discriminator(checkpoint: Path, teacher: Source) -> Any:
    """D of a checkpoint in eval mode, with its frozen features. Its own augmentation is left out."""
    config = config_of(checkpoint)
    engine = make_engine(config, teacher.device)
    builder = Builder(config, engine, teacher.net.resolution, teacher.class_counts)
    module = builder.discriminator(config.model.discriminator)
    load_strictly(module, load_tensors(checkpoint / "D.safetensors"), f"{checkpoint.name}/D")
    set_ghost_batch(module, D_BATCH)
    return builder.frozen(module)
