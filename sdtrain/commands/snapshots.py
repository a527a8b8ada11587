"""What the checkpoints of a run show: perceptual variation (Table 3) and the interplay of the losses (Figure 6)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.builder import Builder
from sdtrain.commands.source import Source, config_of
from sdtrain.engine.checkpoint import MARKER
from sdtrain.engine.make import make_engine
from sdtrain.engine.net import load_strictly
from sdtrain.errors import RunError
from sdtrain.files import load_tensors
from sdtrain.losses.perceptual import LPIPS
from sdtrain.metrics.variation import perceptual_variation
from sdtrain.models.ghost import set_ghost_batch
from sdtrain.sampling import generate, to_uint8
from sdtrain.weights import check_weights, load_weights

PER_QUADRANT = 4
D_BATCH = 4  # minibatch statistics see this many images, in the order of their indices


def device_of(args: argparse.Namespace) -> torch.device:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if args.device == "auto" else args.device)


def checkpoints_of(run: Path, at_least: int, why: str) -> list[Path]:
    """Complete checkpoints in order. Raises RunError when there are too few."""
    found = [path for path in sorted((run / "checkpoints").glob("img_*")) if (path / MARKER).exists()]
    if len(found) < at_least:
        raise RunError(f"{run} has {len(found)} checkpoint(s), {why}; raise keep_checkpoints, lower save_img")
    return found


def position(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("img_"))


def lpips_of(run: Path, args: argparse.Namespace, device: torch.device) -> LPIPS:
    """The run's own LPIPS unless `--lpips` says otherwise. Raises WeightsError when its file is missing."""
    from sdtrain.errors import WeightsError

    config = config_of(run)
    source = args.lpips or (config.weights.lpips if config else None) or "download"
    problems = check_weights({"lpips_vgg": source})
    if problems:
        raise WeightsError(" ".join(problems))
    return LPIPS(load_weights("lpips_vgg", source)).to(device)


def images_of(source: Source, indices: Sequence[int], batch: int) -> Tensor:
    """Float images [N, 3, R, R] in [-1, 1] on the CPU; layer noise belongs to the index, so checkpoints share it."""
    more = {"seed": source.seed, "class_counts": source.class_counts, "device": source.device}
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    return torch.cat([generate(source.net, part, **more).float().cpu() for part in parts])


def variation(run: Path, args: argparse.Namespace) -> tuple[float, float, list[int]]:
    """Table 3: (mean, standard deviation over latents, positions) of the checkpoints from 20 % of the last one on."""
    device = device_of(args)
    paths = checkpoints_of(run, 2, "and variation compares at least two")
    paths = [path for path in paths if position(path) >= 0.2 * position(paths[-1])]
    if len(paths) < 2:
        raise RunError(f"{run} has one checkpoint after the first 20 % of training; variation compares at least two")
    lpips = lpips_of(run, args, device)
    indices = range(args.latents)
    images = [images_of(Source(path, device), indices, args.batch) for path in paths]
    distance = lambda x, y: lpips(x.to(device), y.to(device)).cpu()  # noqa: E731
    mean, deviation = perceptual_variation(images, distance, mode=args.pairs, batch_size=args.batch)
    return mean, deviation, [position(path) for path in paths]


@torch.no_grad()
def interplay(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figure 6: of many latents the largest and smallest LPIPS(G, G_ema), and of each the lowest and highest D logits.

    Images are those of G_ema; G belongs to the same checkpoint and has the same noise. No augmentation.
    """
    device = device_of(args)
    path = checkpoints_of(run, 1, "and D is needed")[-1]
    teacher, student = Source(path, device), Source(path, device, weights="raw")
    lpips, D = lpips_of(run, args, device), discriminator(path, teacher)
    distances = []
    for first in range(0, args.interplay_latents, args.batch):
        part = range(first, min(first + args.batch, args.interplay_latents))
        x, y = (images_of(source, part, args.batch).to(device) for source in (student, teacher))
        distances.append(lpips(x, y).cpu())
    scores = torch.cat(distances)
    order = scores.argsort(descending=True).tolist()
    found: dict[str, Any] = {"num_latents": args.interplay_latents, "seen_img": position(path)}
    for name, chosen in (("worst", order[: args.extremes]), ("best", order[-args.extremes :])):
        found[name] = quadrant(D, teacher, sorted(chosen), scores)
    return found


def quadrant(D: Any, teacher: Source, indices: list[int], scores: Tensor) -> dict[str, Any]:
    """The images with the lowest and with the highest logits among `indices`, left to right."""
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
    builder = Builder(config, engine, teacher.net.resolution, len(teacher.class_counts))
    module = builder.discriminator(config.model.discriminator)
    load_strictly(module, load_tensors(checkpoint / "D.safetensors"), f"{checkpoint.name}/D")
    set_ghost_batch(module, D_BATCH)
    return builder.frozen(module)
