"""What balanced consistency compares an image with. Without these tests the augmentation could act on images in another
range than the published one: too strong a colour, borders and holes of another colour, and D asked to ignore too much.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sdtrain.augment.consistent import consistent_augment
from sdtrain.rng import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STILL = {"flip": 0.9, "brightness": 0.5, "saturation": 0.5, "contrast": 0.5, "tx": 0, "ty": 0}
STILL |= {"ox": 0, "oy": 0}  # the hole clears the upper left corner, 2 x 2


@dataclass
class Chosen:
    """Draws of one image that the test decides."""

    values: dict[str, float]
    path: list[str] = field(default_factory=list)

    def sub(self, purpose: str) -> Chosen:
        return self

    def uniform(self, purpose: str) -> Tensor:
        return torch.tensor([self.values[purpose]])

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        return torch.tensor([self.values[purpose]], dtype=torch.int64)


def augmented(x: Tensor, **changes: float) -> Tensor:
    return consistent_augment(x, Chosen({**STILL, **changes}))


def naive(x: Tensor, v: dict[str, float]) -> Tensor:
    """One image [3, H, W], pixel by pixel: normalise, mirror, shift, three colours, a hole of half the size; back."""
    _, height, width = x.shape
    a = [[[((x[c, i, j].item() + 1) / 2 - MEAN[c]) / STD[c] for j in range(width)] for i in range(height)]
         for c in range(3)]  # fmt: skip
    if v["flip"] < 0.5:
        a = [[row[::-1] for row in channel] for channel in a]

    def shifted(c: int, i: int, j: int) -> float:
        i, j = i + int(v["tx"]), j + int(v["ty"])
        return a[c][i][j] if 0 <= i < height and 0 <= j < width else 0.0

    y = torch.tensor([[[shifted(c, i, j) for j in range(width)] for i in range(height)] for c in range(3)]).double()
    y = y + (v["brightness"] - 0.5)
    y = (y - y.mean(0)) * (2 * v["saturation"]) + y.mean(0)
    y = (y - y.mean()) * (v["contrast"] + 0.5) + y.mean()
    for k in range(height // 2):
        for m in range(width // 2):
            i, j = int(v["ox"]) + k - height // 4, int(v["oy"]) + m - width // 4
            y[:, min(max(i, 0), height - 1), min(max(j, 0), width - 1)] = 0
    return torch.stack([(y[c] * STD[c] + MEAN[c]) * 2 - 1 for c in range(3)]).float()


def picture(size: int = 8) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_brightness_moves_an_image_by_the_imagenet_deviation_and_not_by_the_range() -> None:
    x = picture()
    moved = (augmented(x, brightness=0.9) - x)[..., 2:]
    for c in range(3):  # u - 1/2 = 0.4 in units of the deviation, which are 2 std of [-1, 1]
        torch.testing.assert_close(moved[:, c], torch.full_like(moved[:, c], 0.4 * 2 * STD[c]))


def test_shifted_borders_and_holes_have_the_colour_of_the_imagenet_mean() -> None:
    grey = torch.tensor([2 * m - 1 for m in MEAN]).view(3, 1)
    torch.testing.assert_close(augmented(picture(), tx=-1)[0, :, 0], grey.expand(3, 8))  # the new row
    hole = augmented(picture(), ox=4, oy=4)[0, :, 3:5, 3:5].flatten(1)
    torch.testing.assert_close(hole, grey.expand(3, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": 0.1},
        {"saturation": 0.8},
        {"contrast": 0.1},
        {"flip": 0.2, "tx": 1, "ty": -1, "brightness": 0.1, "saturation": 0.9, "contrast": 0.8, "ox": 3, "oy": 5},
    ],
)
def test_the_augmentation_equals_its_loop(changes: dict[str, float]) -> None:
    x = picture()
    torch.testing.assert_close(augmented(x, **changes)[0], naive(x[0], {**STILL, **changes}), atol=1e-5, rtol=0)


def test_an_image_without_change_comes_back_and_gradients_pass() -> None:
    x = picture().requires_grad_()
    torch.testing.assert_close(augmented(x)[..., 2:], x[..., 2:], atol=1e-6, rtol=0)
    augmented(x, saturation=0.7, contrast=0.2).square().sum().backward()
    assert x.grad is not None and (x.grad[..., 2:].abs() > 0).all()


def test_a_ghost_is_augmented_alike_in_any_company() -> None:
    augment = consistent_augment
    x = torch.cat([picture()] * 8)
    of = {g: Draws(seed=1, step=5, ghosts=g, ghost_batch=2) for g in ((0, 1, 2, 3), (0, 1), (2, 3))}
    parts = torch.cat([augment(x[:4], of[0, 1]), augment(x[4:], of[2, 3])])
    assert torch.equal(augment(x, of[0, 1, 2, 3]), parts)
    assert not torch.equal(parts[:4], parts[4:])
