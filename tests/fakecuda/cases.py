"""Every method and stage in small, for one step on a GPU: few channels, two ghosts, every lazy phase due."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_config  # noqa: E402

from sdtrain.config.load import load_config  # noqa: E402
from sdtrain.data.read.stream import Batch  # noqa: E402
from sdtrain.trainer import Trainer  # noqa: E402

SIDE = 32
SMALL = {"batch_size": 4, "ghost_batch": 2, "total_img": 64, "save_img": 32}
SG2 = {"kind": "stylegan2", "channel_base": 128, "channel_max": 8}
STYLE: dict[str, Any] = {
    **SMALL, "adversarial": "logistic", "style_mixing": 0.9, "sd__augment": False, "augment": {"kind": "none"},
    "model": {
        "generator": {**SG2, "z_dim": 8, "w_dim": 8, "mapping_layers": 2},
        "discriminator": {**SG2, "mbstd_group": 2},
    },
}  # fmt: skip
ADA = {"kind": "ada", "p": 0.5, "interval": 1, "speed_img": 2000}  # p moves after every step, not after four
STAGES = {"widths": [16, 16, 8], "groups": [2, 2, 2], "blocks": [1, 1, 1]}
R3GAN: dict[str, Any] = {
    **SMALL, "adversarial": "relativistic", "order": "D first", "fake_labels": "real", "sd__loss": "l1",
    "model": {"generator": {"kind": "r3gan", "z_dim": 8, **STAGES}, "discriminator": {"kind": "r3gan", **STAGES}},
    "r1": {"gamma": 1.0, "every": 1, "on": "both", "joint": True},
    "augment": {"kind": "ada", "policy": "r3gan", "p": 0.5, "target": None},
}  # fmt: skip
STYLENAT: dict[str, Any] = {
    **SMALL, "adversarial": "logistic", "bcr": 10.0, "r1__gamma": 1.0, "r1__every": 1, "augment": {"kind": "none"},
    "optimizer__D__clip_norm": 5.0, "sd__alpha": 0.25,
    "model": {
        "generator": {
            "kind": "stylenat", "style_dim": 8, "mlp_layers": 2, "channel_max": 16, "min_heads": 2,
            "kernels": [[3]] * 3, "dilations": [[1], [1], [1, 2]],
        },
        "discriminator": {"kind": "stylenat", "channel_max": 8, "mbstd_group": 2},
    },
}  # fmt: skip
PENALTIES = {"r1__gamma": 1.0, "r1__every": 1, "path_length__weight": 2.0, "path_length__every": 1}
LPIPS = {"sd__loss": "lpips-vgg", "sd__augment": True}
SDGAN: dict[str, dict[str, Any]] = {
    "projected baseline": {**SMALL, "sd__alpha": 0},
    "projected SD, LPIPS, T": {**SMALL, **LPIPS},
    "stylegan2 SD": STYLE,
    "stylegan2 R1, path length": {**STYLE, **PENALTIES},
    "stylegan2 ADA, T": {**STYLE, **LPIPS, "sd__loss": "l1", "augment": ADA},
    "r3gan": R3GAN,
    "stylenat bCR, R1": STYLENAT,
}  # fmt: skip
SDAKD: dict[str, Any] = {
    "method": "sdakd", "batch_size": 4, "ghost_batch": 2, "n1": "4 steps", "n2": "4 steps", "n3": "4 steps",
    "log_img": 4, "sample_img": 0, "save_img": 8, "eval_img": 0, "eval_epochs": 0, "tracker": "none",
    "data": {"train": "absent", "workers": 0, "resolution": SIDE},
    "model": {
        "generator": {"kind": "rrdbnet", "num_feat": 8, "num_grow_ch": 4, "num_block": 1},
        "discriminator": {"kind": "unet_sn", "num_feat": 4},
    },
    "student": {"C": "1/2"}, "lambda_2": 0.1, "recipe": {"pixel_share": 0.5},
    "degradation": {
        "source_size": SIDE, "crop_size": SIDE, "pool_size": 4, "kernel_size": [3, 5], "resize_range1": [0.5, 1.5],
    },
    "weights": {"perceptual": "random", "alex": "random"},
}  # fmt: skip
FACES: dict[str, Any] = {
    "model": {
        "generator": {"kind": "gcfsr", "narrow": 0.03125, "num_style_feat": 8},
        "discriminator": {"kind": "gcfsr", "narrow": 0.03125},
    },
    "order": "D first", "lq": "down_up", "factors": [4, 8], "r1": {"gamma": 10, "every": 1, "joint": True},
    "perceptual": "vgg16",
    "validation": {"lq": "down_up", "factors": [4, 8]},
}  # fmt: skip
PAIRS = {"Real-ESRGAN": SDAKD, "GCFSR": {**SDAKD, **FACES}}


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> keys."""
    found = {name: tiny_config(folder, **json.loads(json.dumps(keys))) for name, keys in SDGAN.items()}
    return found | PAIRS


def trainer_of(folder: Path, keys: dict[str, Any], *sets: str, device: str = "cuda") -> Trainer:
    """The trainer of a configuration."""
    file = folder / "case.yaml"
    file.write_text(json.dumps(keys))
    config = load_config(file, list(sets))
    return Trainer(config, torch.device(device), side_of(config), num_samples=100)


def side_of(config: Any) -> int:
    """In pixels: the smallest at which every layer is there."""
    return 16 if config.model.generator.kind in ("stylegan2", "stylenat", "r3gan") else SIDE


def batch_for(trainer: Trainer) -> Batch:
    config, feed = trainer.config, trainer.method.feed
    side = feed.crop or side_of(config)
    images = torch.zeros(config.batch_size, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as on a GPU
    return Batch(step=0, images=images, labels=None, indices=torch.zeros(0, dtype=torch.int64))


def stages(trainer: Trainer) -> Iterator[str]:
    """Enter one stage after the other."""
    for stage in trainer.method.stages:
        trainer.enter(stage)
        yield stage.name


def pictures(number: int, side: int) -> torch.Tensor:
    """uint8 [number, 3, side, side] on the host."""
    return torch.zeros(number, 3, side, side, dtype=torch.uint8)


# What is done with networks beside training. Each checks shapes, places and types, and returns what it has made.


def sampling(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.models.fastgan.networks import Generator, GeneratorOptions
    from sdtrain.sampling import sampler

    G = Generator(GeneratorOptions(z_dim=16, ngf=2, num_embeddings=2), resolution=32, num_classes=2).to(device)
    images = sampler(G, seed=0, class_counts=(3, 5), device=device, batch_size=2)(range(3))
    assert images.shape == (3, 3, 32, 32) and images.device.type == "cpu"
    return [images]


def features(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.metrics.features import random_inception
    from sdtrain.metrics.sums import FeatureSums

    net = random_inception(0, 64, lambda: [pictures(2, 32)], device)
    with torch.autocast(device, torch.bfloat16):
        found = net(pictures(2, 32).to(device))
    assert found.dtype == torch.float32 and found.shape == (2, 64)
    sums = FeatureSums(64, device).add(found).merge(FeatureSums(64, device).add(found))
    moments = sums.moments(ddof=1)
    assert {t.device.type for t in moments} == {device} and sums.count == 4
    return [found, *moments]


def restoration_metrics(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.metrics.sr_metrics import psnr_y, ssim_y

    x, y = (torch.zeros(2, 3, 32, 32, device=device) for _ in range(2))
    found = [psnr_y(x, y), ssim_y(x, y)]
    assert [len(values) for values in found] == [2, 2]
    return found


def precision_and_recall(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.metrics.prc import distances

    x, y = (torch.zeros(8, 16, device=device) for _ in range(2))
    found = distances(x, y, half=False)
    assert found.shape == (8, 8)
    return [found]


def perceptual_distance(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.losses.perceptual import LPIPS

    x, y = (torch.zeros(2, 3, 32, 32, device=device) for _ in range(2))
    found = [LPIPS(None, trunk_dtype=dtype).to(device)(x, y) for dtype in (torch.float32, torch.bfloat16)]
    assert {values.dtype for values in found} == {torch.float32}
    return found


def upscale(device: str = "cuda") -> list[torch.Tensor]:
    from sdtrain.interop.tiled import enlarge
    from sdtrain.models.srvgg.networks import Generator, GeneratorOptions

    net = Generator(GeneratorOptions(num_feat=4, num_conv=1), resolution=0, num_classes=0).to(device).eval()
    large = enlarge(net, torch.zeros(3, 24, 20), scale=4, tile=16, overlap=4, device=device)
    assert large.shape == (3, 96, 80)
    return [large]


USES: dict[str, Callable[..., list[torch.Tensor]]] = {
    use.__name__: use
    for use in (sampling, features, restoration_metrics, precision_and_recall, perceptual_distance, upscale)
}
