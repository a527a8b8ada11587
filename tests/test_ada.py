"""ADA: without these tests augmentation could leak, differ between ranks, or stop R1 from seeing through it."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor
from torch.nn import functional as F

from sdtrain.augment.ada import (
    EXPECTED_POWER,
    PRESETS,
    AdaOptions,
    AdaPipe,
    Chance,
    band_gains,
    inverse_geometry,
    preset,
    update_p,
)
from sdtrain.augment.ada_filters import filter_bank
from sdtrain.errors import ConfigError, DataError
from sdtrain.rng import Draws


def draws(*ghosts: int, ghost_batch: int = 2) -> Draws:
    return Draws(seed=7, step=1, ghosts=ghosts, ghost_batch=ghost_batch)


def images(n: int, size: int = 24, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_every_transform_equals_the_official_pipeline():
    sys.path.insert(0, str(GOLDEN))
    import check

    lines = check.run(GOLDEN / "sdgan", ["ada.safetensors"])
    assert len(lines) > 30
    assert all(line.verdict == check.OK for line in lines), "\n".join(map(str, lines))


@pytest.mark.parametrize("name", PRESETS)
def test_a_ghost_gets_the_same_images_alone_and_among_others(name: str):
    pipe, x = AdaPipe(name), images(6)
    together = pipe(x, 0.8, draws(0, 1, 2))
    apart = torch.cat([pipe(x[2 * g : 2 * g + 2], 0.8, draws(g)) for g in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert not torch.equal(together, x)


def test_probability_zero_or_no_draws_leave_images_untouched():
    x = images(2)
    assert AdaPipe("bgcfnc")(x, 0.0, draws(0)) is x
    assert AdaPipe("bgcfnc")(x, 1.0, None) is x


def test_the_buffer_p_as_zero_changes_nothing_but_rounding():
    x = images(4)
    torch.testing.assert_close(AdaPipe("bgcfnc")(x, None, draws(0, 1)), x, rtol=1e-4, atol=1e-4)


def test_half_of_the_hit_images_are_mirrored():
    pipe, x = AdaPipe(AdaOptions(xflip=1)), images(400, size=16)
    out = pipe(x, 0.6, draws(*range(200)))
    same = (out - x).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (out - x.flip(3)).square().mean((1, 2, 3)) < 0.1  # the wavelet is not symmetric: never exactly
    assert torch.all(mirrored ^ same)
    assert 0.22 < float(mirrored.float().mean()) < 0.38  # p / 2, within four standard deviations


def test_rotations_before_and_after_scaling_together_have_the_wanted_rate():
    chance = Chance(draws(*range(1000)), torch.tensor(0.5), 2000, None)
    g = inverse_geometry(AdaOptions(rotate=1), chance, 8, 8)
    turned = (g - torch.eye(3)).abs().amax((1, 2)) > 1e-6
    assert 0.455 < float(turned.float().mean()) < 0.545


def test_gradients_of_the_second_order_pass_through_the_geometry():
    pipe = AdaPipe("bg").double()
    x = images(2, size=6).double().requires_grad_()
    g = inverse_geometry(pipe.options, Chance(draws(0), torch.tensor(1.0), 2, None), 6, 6).double()
    assert torch.autograd.gradgradcheck(lambda x: pipe.warp(x, g).square(), (x,), fast_mode=True)


def test_r1_sees_through_the_whole_pipeline():
    x, net = images(4).requires_grad_(), torch.nn.Conv2d(3, 4, 3)
    logits = F.softplus(net(AdaPipe("bgcfnc")(x, 0.9, draws(0, 1)))).mean((1, 2, 3))
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert net.weight.grad.abs().sum() > 0


def test_the_filter_bank_adds_up_to_the_identity():
    total = filter_bank().sum(0)
    torch.testing.assert_close(total, F.one_hot(torch.tensor(21), 43).float(), rtol=0, atol=1e-6)


def test_the_gain_of_a_band_keeps_the_expected_power():
    gains = band_gains(
        AdaOptions(imgfilter=1, imgfilter_bands=(0, 1, 0, 0)), Chance(draws(0, 1), torch.tensor(1.0), 4, None)
    )
    power = (torch.tensor(EXPECTED_POWER) * gains.square()).sum(1)
    torch.testing.assert_close(power, torch.ones(4))
    assert gains.std() > 0.1


def test_cutout_blanks_a_square_of_half_the_side_at_most():
    x = torch.ones(8, 3, 16, 16)
    blank = (AdaPipe("cutout")(x, 1.0, draws(*range(4))) == 0).float().mean((1, 2, 3))
    assert float(blank.max()) <= 0.25 and float(blank.min()) > 0


def test_the_pipe_moves_with_its_buffers_and_holds_the_official_ones():
    pipe = AdaPipe("bgc").to(torch.float64)
    shapes = {name: tuple(b.shape) for name, b in pipe.state_dict().items()}
    assert shapes == {"p": (), "Hz_geom": (12,), "Hz_fbank": (4, 43)}
    assert pipe.Hz_geom.dtype == torch.float64


def test_the_controller_follows_the_sign_and_stops_at_zero():
    assert update_p(0.5, 90, 100, 64) == pytest.approx(0.5 + 64 * 4 / 500_000)
    assert update_p(0.5, 10, 100, 64) == pytest.approx(0.5 - 64 * 4 / 500_000)
    assert update_p(0.5, 60, 100, 64) == 0.5
    assert update_p(1e-9, -100, 100, 64) == 0.0
    assert update_p(0.5, 0, 0, 64) == 0.5, "no logits, no change"
    assert update_p(1.0, 100, 100, 1000, ada_kimg=1) > 1.0, "there is no upper bound"


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(ConfigError, match="pipeline 'bgx' is unknown; choose one of blit, geom"):
        preset("bgx")
    with pytest.raises(DataError, match="needs sides above 21 pixels, got 16x16; leave it out"):
        AdaPipe("bgcf")(images(2, size=16), 1.0, draws(0))
    with pytest.raises(DataError, match="1 or 3 channels, not 2"):
        AdaPipe("color")(images(2, channels=2), 1.0, draws(0))
