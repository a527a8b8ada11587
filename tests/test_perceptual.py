"""Without this file L_SD could stop being LPIPS unseen: other numbers, NaN gradients, a gradient into the teacher."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.losses.distance import l1, l2
from sdtrain.losses.ms_ssim import default_window, min_side, ms_ssim, ms_ssim_loss
from sdtrain.losses.perceptual import LPIPS, unit_length
from sdtrain.losses.vgg import Trunk

MANIFEST = json.loads((GOLDEN / "sdgan" / "manifest.json").read_text())["files"]
METRICS = MANIFEST["metrics.safetensors"]


def numbers(key: str, *shape: int, seed: int) -> torch.Tensor:
    state = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()) & 0xFFFFFFFF)
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def golden_trunk() -> dict[str, torch.Tensor]:
    """The trunk of the golden values: the manifest's fill rule, family pg."""
    return {
        key: numbers(key, *shape, seed=METRICS["seed"]) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)
        for key, shape in METRICS["expected"]["lpips_vgg_keys"]
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "sdgan" / "metrics.safetensors")


@pytest.fixture(scope="module")
def lpips_net() -> LPIPS:
    return LPIPS(golden_trunk())


def pair(side: int = 32, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (numbers(key, n, 3, side, side, seed=5).clamp(-1, 1) for key in "xy")
    return x, y


def test_lpips_equals_the_reference_values_layer_by_layer_and_in_its_gradient(golden, lpips_net):
    x = golden["lpips.in0"].clone().requires_grad_()
    torch.testing.assert_close(
        lpips_net.per_layer(x, golden["lpips.in1"]), golden["lpips.per_layer"], atol=1e-5, rtol=1e-4
    )
    value = lpips_net(x, golden["lpips.in1"])
    torch.testing.assert_close(value, golden["lpips.out"], atol=1e-5, rtol=1e-4)
    value.mean().backward()
    wanted = golden["lpips.grad_in0_s4"]
    # one ReLU of the reference sits within fp32 rounding of zero and flips with the convolution backend
    assert (x.grad[:, :, ::4, ::4] - wanted).norm() <= 5e-3 * wanted.norm()


def test_the_heads_are_those_of_the_reference(golden, lpips_net):
    state = lpips_net.state_dict()
    for key in [key for key in golden if key.startswith("lpips.lin")]:
        assert torch.equal(state[key.removeprefix("lpips.")], golden[key])


def test_lpips_equals_the_lpips_package_for_both_trunks():
    lpips = pytest.importorskip("lpips")
    x, y = pair(64)
    for net in ("vgg", "alex"):
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        ours = LPIPS(theirs.state_dict(), net=net)
        torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), atol=1e-6, rtol=1e-5)


def test_sd_values_of_the_reference_step_come_out_for_lpips_l1_and_l2(lpips_net):
    step = load_file(GOLDEN / "sdgan" / "sd_step.safetensors")
    results = MANIFEST["sd_step.safetensors"]["results"]
    for name, loss in {"lpips": lpips_net, "l1": l1, "l2": l2}.items():
        value = loss(step["out.img_student"], step["out.img_teacher"]).mean().item()
        assert value == pytest.approx(results[f"{name}_alpha1.0"]["sd"], rel=1e-5)


def test_identical_images_have_distance_zero_and_a_zero_gradient(lpips_net):
    x = pair()[0].requires_grad_()
    value = lpips_net(x, x.detach())
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert x.grad.abs().max() == 0


def test_only_the_student_gets_a_gradient(lpips_net):
    for loss in (lpips_net, l1, l2, lambda x, y: ms_ssim_loss(x, y, window=3, weights=(0.5, 0.5))):
        x, y = (image.requires_grad_() for image in pair())
        loss(x, y).sum().backward()
        assert x.grad.abs().sum() > 0
        assert y.grad is None


def test_a_feature_map_of_zeros_gives_zeros_and_a_finite_gradient():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        unit = unit_length(features)
        (unit - 1).square().sum().backward()
    assert unit.abs().max() == 0
    assert torch.isfinite(features.grad).all()


def test_a_dead_trunk_passes_anomaly_detection():
    dead = LPIPS({key: torch.zeros_like(value) for key, value in golden_trunk().items()})
    x, y = pair()
    x.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        dead(x, y).sum().backward()
    assert x.grad.abs().max() == 0


def test_train_mode_of_a_parent_neither_wakes_the_net_nor_changes_its_value(lpips_net):
    x, y = pair()
    parent = torch.nn.ModuleList([lpips_net])
    before = lpips_net(x, y)
    parent.train()
    assert not any(module.training for module in lpips_net.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    assert torch.equal(lpips_net(x, y), before)


def test_autocast_leaves_fp32_values_untouched_and_bf16_trunks_stay_close(lpips_net):
    x, y = pair()
    plain = lpips_net(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips_net(x, y), plain)
    reduced = LPIPS(golden_trunk(), trunk_dtype=torch.bfloat16)(x, y)
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, plain, rtol=0.05, atol=1e-4)
    assert not torch.equal(reduced, plain)


def test_the_random_trunk_is_a_function_of_its_seed_and_orders_distortions():
    first, again, other = LPIPS(seed=1), LPIPS(seed=1), LPIPS(seed=2)
    x, noise = pair()
    weak, strong = first(x, x + 0.05 * noise), first(x, x + 0.5 * noise)
    assert torch.equal(again(x, x + 0.05 * noise), weak)
    assert not torch.equal(other(x, x + 0.05 * noise), weak)
    assert (weak < strong).all()


def test_torchvision_names_load_like_lpips_names(lpips_net):
    renamed = {"features." + key.split(".", 2)[2]: value for key, value in golden_trunk().items()}
    x, y = pair()
    assert torch.equal(LPIPS(renamed)(x, y), lpips_net(x, y))


def test_a_state_of_another_network_is_refused_by_name():
    with pytest.raises(WeightsError, match="no fitting tensor for net.slice1.0.weight and 25 more"):
        LPIPS({"conv1.weight": torch.zeros(1)})


def test_too_small_images_are_refused_with_a_cure(lpips_net):
    with pytest.raises(ConfigError, match="at least 16 px, got 8; use larger images or a pixel distance"):
        lpips_net(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_vgg_plans_give_torchvisions_layers():
    models = pytest.importorskip("torchvision.models")
    for net, build in (("vgg16", models.vgg16), ("vgg19", models.vgg19)):
        with torch.device("meta"):
            ours, theirs = Trunk(net), build(weights=None).features
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def ms_ssim_images() -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the golden values, as the manifest spells them (base seed 1000)."""
    a, b = (torch.nn.functional.avg_pool2d(numbers(f"ms.{k}", 1, 3, 180, 180, seed=1000), 5, 1) for k in "ab")
    return ((2 * a).clamp(-1, 1) + 1) / 2, ((2 * a + 0.5 * b).clamp(-1, 1) + 1) / 2


def test_ms_ssim_equals_the_reference_values():
    x, y = ms_ssim_images()
    expected, tol = METRICS["expected"]["msssim"], METRICS["tol"]["msssim"]
    assert ms_ssim(x, y, window=11).item() == pytest.approx(expected["ms_ssim_win11"], abs=tol)
    assert ms_ssim(x, y, window=7).item() == pytest.approx(expected["ms_ssim_win7"], abs=tol)
    small = ms_ssim(x[..., :128, :128], y[..., :128, :128])
    assert small.item() == pytest.approx(expected["ms_ssim_win7_res128"], abs=tol)


def test_ms_ssim_equals_the_oracle_for_every_window_and_odd_sizes():
    oracle = pytest.importorskip("pytorch_msssim")
    x, y = ms_ssim_images()
    for side, window in ((176, 11), (171, 11), (161, 11), (128, 7), (97, 7), (64, 3)):
        a, b = x[..., :side, :side], y[..., :side, :side]
        theirs = oracle.ms_ssim(a, b, data_range=1.0, win_size=window, size_average=False)
        torch.testing.assert_close(ms_ssim(a, b, window=window), theirs, atol=1e-5, rtol=0)


def test_ms_ssim_of_dissimilar_images_is_zero_with_a_finite_gradient():
    x = numbers("neg", 1, 3, 64, 64, seed=1).sigmoid()
    y = (1 - x).requires_grad_()
    value = ms_ssim(y, x, window=3)
    value.sum().backward()
    assert value.item() == 0
    assert torch.isfinite(y.grad).all()


def test_the_window_rule_is_seven_below_the_size_eleven_needs():
    assert [default_window(side) for side in (128, 159, 160, 161, 256)] == [7, 7, 7, 11, 11]
    assert [min_side(window, 5) for window in (11, 7, 3)] == [161, 97, 33]


def test_images_too_small_for_ms_ssim_are_refused_with_a_cure():
    small = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ConfigError, match="window 7 and 5 scales needs images of at least 97 px, got 64; use window 3"):
        ms_ssim(small, small)
    with pytest.raises(ConfigError, match="must be odd"):
        ms_ssim(small, small, window=4)


def test_pixel_distances_are_one_mean_a_sample():
    x, y = torch.zeros(2, 3, 4, 4), torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), -3.0)])
    assert l1(x, y).tolist() == [1.0, 3.0]
    assert l2(x, y).tolist() == [1.0, 9.0]
