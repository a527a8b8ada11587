"""Without this file T could treat student and teacher differently, and L_SD would train the generator to be shifted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from sdtrain.augment.paired import ORDERS, PairedAugment, affine_grid, flipping, rotation, translation, warp
from sdtrain.rng import Draws


def draws(num_ghosts: int = 4, ghost_batch: int = 2, step: int = 0) -> Draws:
    return Draws(seed=1, step=step, ghosts=tuple(range(num_ghosts)), ghost_batch=ghost_batch)


def images(n: int = 8, side: int = 24) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_rotation_and_translation_equal_the_authors_primitives():
    golden = load_file(GOLDEN / "sdgan" / "sd_aug.safetensors")
    tol = json.loads((GOLDEN / "sdgan" / "manifest.json").read_text())["files"]["sd_aug.safetensors"]["tol"]
    maps = {
        "rotate": rotation(torch.deg2rad(golden["param.rotate.angle_deg"])),
        "translate": translation(golden["param.translate.px"]),
        "translate_big": translation(golden["param.translate_big.px"]),
    }
    x = golden["in.x"]
    for name, matrix in maps.items():
        wanted = golden[f"out.{name}"]
        got = warp(x, affine_grid(matrix, x), "reflection")
        assert (got - wanted).abs().max() <= tol["max_abs_diff_over_max_abs_ref"] * wanted.abs().max(), name


def test_the_composed_map_equals_kornias_two_steps_inside_the_picture():
    kornia = pytest.importorskip("kornia.geometry.transform")
    x = torch.nn.functional.interpolate(images(2, 5), (40, 40), mode="bicubic")
    turn, move = rotation(torch.tensor([0.05, -0.08])), translation(torch.tensor([[0.4, -0.2], [-0.3, 0.1]]))
    ours = warp(x, affine_grid(move @ turn, x), "zeros")
    centre = torch.eye(3).repeat(2, 1, 1)
    centre[:, :2, 2] = 19.5
    steps = x
    for matrix in (turn, move):
        pixel = centre @ matrix @ torch.linalg.inv(centre)
        steps = kornia.warp_affine(steps, pixel[:, :2], (40, 40), align_corners=False)
    # the second interpolation of the two-step form smooths, so this compares the geometry, not the last digit
    assert (ours - steps)[..., 6:-6, 6:-6].abs().max() < 0.05
    wrong = warp(x, affine_grid(torch.linalg.inv(move @ turn), x), "zeros")
    assert (wrong - steps)[..., 6:-6, 6:-6].abs().max() > 0.1


def test_a_flip_mirrors_the_picture_and_nothing_else():
    x = images(2)
    torch.testing.assert_close(warp(x, affine_grid(flipping(torch.zeros(2)), x), "zeros"), x.flip(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
def test_equal_inputs_stay_equal_and_are_changed(padding):
    x = images()
    a, b = PairedAugment(padding=padding)(x, x.clone(), draws())
    assert torch.equal(a, b)
    assert not torch.equal(a, x)


def test_the_gradient_reaches_the_student_alone():
    x, y = images().requires_grad_(), images().requires_grad_()
    a, b = PairedAugment()(x, y, draws())
    assert not b.requires_grad
    (a - b).sum().backward()
    assert x.grad is not None and y.grad is None


def test_no_draws_means_no_augmentation():
    x, y = images(), images() + 1
    a, b = PairedAugment()(x, y, None)
    assert a is x and torch.equal(b, y)


def test_a_ghost_gets_the_same_maps_alone_as_among_others():
    together = PairedAugment().matrices(draws(6), (24, 24))
    alone = torch.cat([PairedAugment().matrices(draws(6).select([g]), (24, 24)) for g in range(6)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, PairedAugment().matrices(draws(6, step=1), (24, 24)))


def test_a_ghost_shares_its_order_and_samples_have_their_own_amounts():
    numbers = draws(50, 4)
    orders = PairedAugment().orders(numbers).view(50, 4)
    assert (orders == orders[:, :1]).all()
    assert len(PairedAugment().matrices(numbers, (24, 24)).flatten(1).unique(dim=0)) > 100


def test_frequencies_are_those_of_the_listing():
    """Six orders alike; an operation acts on 2/3 * 1/2 of the samples, so 1/4 of all samples are left alone."""
    numbers = draws(3000, 1)
    counts = Counter(PairedAugment().orders(numbers).tolist())
    assert len(counts) == len(ORDERS) and all(abs(count - 500) < 100 for count in counts.values())
    maps = PairedAugment().matrices(numbers, (100, 100))
    untouched = (maps == torch.eye(3)).all((1, 2)).float().mean()
    flipped = (torch.linalg.det(maps) < 0).float().mean()
    moved = (maps[:, :2, 2] != 0).any(1).float().mean()
    assert abs(untouched - 1 / 4) < 0.03 and abs(flipped - 1 / 3) < 0.03 and abs(moved - 1 / 3) < 0.03


def test_amounts_stay_within_five_degrees_and_one_percent():
    maps = PairedAugment().matrices(draws(2000, 1), (100, 200))
    angle = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 1, 1]))
    assert 4.8 < angle.abs().max() <= 5.001
    # a shift before a rotation turns with it: sqrt(2^2 + 1^2) px is the longest
    assert 1.8 < maps[:, 0, 2].abs().max() <= 2.1


def test_zero_amounts_and_no_flip_leave_the_picture_alone():
    x = images()
    a, _ = PairedAugment(hflip=0, degrees=0, translate=0)(x, x, draws())
    torch.testing.assert_close(a, x, atol=1e-4, rtol=0)


def test_bf16_images_come_back_in_bf16():
    x = images().bfloat16()
    a, b = PairedAugment()(x, x, draws())
    assert a.dtype == b.dtype == torch.bfloat16


def test_the_grid_of_t_is_the_same_to_the_bit_whatever_autocast_says():
    x, y = images(side=256), images(side=256)
    plain = PairedAugment()(x, y, draws())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = PairedAugment()(x, y, draws())
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))
