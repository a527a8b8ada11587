"""The same numbers on a GPU as on the CPU, for every method and what is done beside training. Without these a kernel, a
cast or a constant on the wrong device would show as a worse picture, weeks later.

The configurations are those of `tests/fakecuda`, with every lazy phase due: R1, path length, ADA, bCR, degradations.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from torch import Tensor

sys.path[:0] = [str(REPO / "tests" / "fakecuda"), str(REPO / "tests" / "gpu")]
from cases import USES, batch_for, configurations, stages, trainer_of  # noqa: E402
from where import DEVICE, MARKS, only_gpu  # noqa: E402

from sdtrain.data.read.stream import Batch  # noqa: E402
from sdtrain.engine.compiled import warm_up  # noqa: E402
from sdtrain.precision import set_precision  # noqa: E402

pytestmark = MARKS
NAMES = list(configurations(Path("absent")))
# the first phase sees equal weights; Adam then turns rounding of small gradients into steps of full size
TOLERANCE = {"first": 1e-3, "later": 0.03, "bf16": 0.1}
FP32, BF16 = ["summation=fast"], ["summation=fast", "precision=bf16"]


@pytest.fixture(autouse=True, scope="module")
def full_precision_of_products() -> None:
    set_precision(tf32=False)


def noise(batch: Batch) -> Batch:
    made = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(0)).byte()
    return Batch(step=0, images=made, labels=None, indices=batch.indices)


def losses(folder: Path, keys: dict[str, Any], device: str, *sets: str) -> dict[str, dict[str, float]]:
    """Terms of one step of every stage, by stage, in the order of the phases."""
    trainer = trainer_of(folder, keys, *sets, device=device)
    batch, found = noise(batch_for(trainer)), {}
    for name in stages(trainer):
        warm_up(trainer)
        trainer.advance(trainer.chunks(batch))
        trainer.settle()
        found[name] = trainer.engine.meter.means()
        trainer.engine.meter.clear()
    return found


@functools.cache
def of_cpu(folder: Path, name: str) -> dict[str, dict[str, float]]:
    return losses(folder, configurations(folder)[name], "cpu", "summation=exact")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


def close(found: dict[str, float], wanted: dict[str, float], first: float, later: float) -> dict[str, Any]:
    """Terms that lie apart; those of the first phase of a step may be apart by `first` alone."""
    assert found.keys() == wanted.keys()
    opening = next(iter(wanted)).partition("/")[0]
    bounds = {name: first if name.partition("/")[0] == opening else later for name in wanted}
    return {
        name: (found[name], value, bounds[name])
        for name, value in wanted.items()
        if not math.isfinite(found[name]) or abs(found[name] - value) > bounds[name] * max(1.0, abs(value))
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_every_method_and_stage_has_the_losses_of_the_cpu(folder: Path, name: str) -> None:
    found, wanted = losses(folder, configurations(folder)[name], DEVICE, *FP32), of_cpu(folder, name)
    bounds = TOLERANCE["first"], TOLERANCE["later"]
    assert {stage: apart for stage in wanted if (apart := close(found[stage], wanted[stage], *bounds))} == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_bf16_is_finite_and_near_that_of_fp32(folder: Path, name: str) -> None:
    found, wanted = losses(folder, configurations(folder)[name], DEVICE, *BF16), of_cpu(folder, name)
    far = 2 * TOLERANCE["bf16"]
    assert {s: apart for s in wanted if (apart := close(found[s], wanted[s], TOLERANCE["bf16"], far))} == {}
    assert found != wanted, "autocast had no effect"


@pytest.mark.parametrize("name", ["projected SD, LPIPS, T", "stylegan2 SD", "Real-ESRGAN"])
@only_gpu
def test_a_step_with_compiled_parts_has_the_losses_of_plain_ones(folder: Path, name: str) -> None:
    keys = configurations(folder)[name]
    found, wanted = losses(folder, keys, DEVICE, *FP32, "compile=frozen"), of_cpu(folder, name)
    bounds = TOLERANCE["first"], TOLERANCE["later"]
    assert {stage: apart for stage in wanted if (apart := close(found[stage], wanted[stage], *bounds))} == {}


@pytest.mark.parametrize("name", ["Real-ESRGAN", "GCFSR"])
def test_degraded_images_are_those_of_the_cpu_but_for_single_levels(folder: Path, name: str) -> None:
    made: list[Tensor] = []
    for device in ("cpu", DEVICE):
        trainer = trainer_of(folder, configurations(folder)[name], "summation=fast", device=device)
        next(stages(trainer))
        made.append(trainer.chunks(noise(batch_for(trainer)))[0].inputs["lq"].cpu())
    assert made[0].std() > 0.05, "there is something to compare"
    assert (made[1] - made[0]).abs().mean() < 1e-3  # a rounding to 8 bits, or of a JPEG coefficient, may turn over


@pytest.mark.parametrize("use", USES)
def test_pictures_metrics_and_tiles_are_made_on_the_device(use: str) -> None:
    assert all(made.isfinite().all() for made in USES[use](DEVICE))


def on_both(make: Any) -> tuple[Any, Any]:
    return make("cpu"), make(DEVICE)


def test_samples_of_the_device_are_those_of_the_cpu() -> None:
    from sdtrain.models.stylegan2.networks import Generator, GeneratorOptions
    from sdtrain.sampling import sampler

    torch.manual_seed(0)
    G = Generator(GeneratorOptions(z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8), resolution=16)

    def make(device: str) -> Tensor:
        return sampler(G.to(device).eval(), seed=0, class_counts=(), device=device, batch_size=2)(range(4))

    wanted, found = on_both(make)
    assert (found.int() - wanted.int()).abs().max() <= 1 and wanted.float().std() > 1


def test_random_numbers_of_the_device_are_those_of_the_cpu() -> None:
    from sdtrain.rng import Draws

    def make(device: str) -> list[Tensor]:
        draws = Draws(seed=1, step=2, ghosts=(0, 3), ghost_batch=4, device=device)
        few = draws.uniform("u", 7), draws.integers("i", 0, 9, 7), draws.normal("z", 512)
        return [t.cpu() for t in (*few, draws.normal("noise", 1, 512, 512))]

    (*few, many), (*found, noise) = on_both(make)
    assert all(torch.equal(a, b) for a, b in zip(few, found, strict=True))
    assert (many != noise).float().mean() < 1e-5  # the last bit, where two libraries round another way
    assert torch.allclose(many, noise, rtol=2e-7, atol=1e-9)


def test_a_picture_enlarged_in_tiles_is_that_of_the_cpu() -> None:
    from sdtrain.interop.tiled import enlarge
    from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions

    torch.manual_seed(0)
    net = Generator(GeneratorOptions(num_feat=8, num_grow_ch=4, num_block=1)).eval()
    picture = torch.rand(3, 24, 20)
    wanted, found = on_both(lambda d: enlarge(net.to(d), picture, scale=4, tile=16, overlap=4, device=d).cpu())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_metrics_and_distances_are_those_of_the_cpu() -> None:
    from sdtrain.losses.perceptual import LPIPS
    from sdtrain.metrics.fid import fid_of_features
    from sdtrain.metrics.prc import distances
    from sdtrain.metrics.sr_metrics import psnr_y, ssim_y

    rows = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    measures = {
        "fid": lambda d: torch.tensor(fid_of_features(*rows.float().to(d))),
        "distances": lambda d: distances(*rows.float().to(d), half=False),
        "psnr": lambda d: psnr_y(*(images * 255).to(d)),
        "ssim": lambda d: ssim_y(*(images * 255).to(d)),
        "lpips": lambda d: LPIPS(None).to(d)(*(images * 2 - 1).to(d)),
    }
    for name, measure in measures.items():
        wanted, found = (torch.as_tensor(value).cpu().double() for value in on_both(measure))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}")
