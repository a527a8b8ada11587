"""Losses and metrics of super-resolution decide what a student becomes and which one is kept. Without this file a tile
too many could change a gradient, a teacher could be trained by its student's loss, or a PSNR could mean something else.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from sdtrain.errors import ConfigError, DataError, WeightsError
from sdtrain.losses import feature, omgd_dcd
from sdtrain.losses.vgg import layer_names
from sdtrain.metrics import sr_metrics

sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def mlp(c_s: int = 3, c_t: int = 5) -> feature.FeatureMLP:
    torch.manual_seed(0)
    return feature.FeatureMLP(c_s, c_t)


def test_losses_and_metrics_equal_the_official_numbers() -> None:
    patterns = ["losses*", "perceptual*", "omgd*", "dcd*", "metrics*"]
    lines = check.run(GOLDEN / "sdakd", patterns)
    assert [str(line) for line in lines if line.verdict != check.OK] == []
    assert {line.file for line in lines} >= {"losses.safetensors", "metrics.safetensors", "dcd_fm_loss.safetensors"}


def test_the_map_loss_is_the_loop_over_samples_pixels_and_channels() -> None:
    net, f_s, f_t = mlp(), rand(2, 3, 4, 3), rand(2, 5, 4, 3, seed=1)
    total = 0.0
    for n in range(2):
        for y in range(4):
            for x in range(3):
                hidden = (net[0].weight[:, :, 0, 0] @ f_s[n, :, y, x] + net[0].bias).relu()
                total += (net[2].weight[:, :, 0, 0] @ hidden + net[2].bias - f_t[n, :, y, x]).square().sum().item()
    assert feature.mlp_loss(net, f_s, f_t, "sum").item() == pytest.approx(total / 2, rel=1e-5)
    assert feature.mlp_loss(net, f_s, f_t).item() == pytest.approx(total / f_t.numel(), rel=1e-5)


@pytest.mark.parametrize("tiles", [2, 3, 7, 100])
def test_tiles_change_neither_the_loss_nor_a_gradient(tiles: int) -> None:
    results = []
    for number in (1, tiles):
        net, f_s = mlp(), rand(2, 3, 7, 4).requires_grad_()
        loss = feature.mlp_loss(net, f_s, rand(2, 5, 7, 4, seed=1), tiles=number)
        loss.backward()
        results.append([loss.detach(), f_s.grad, *(p.grad for p in net.parameters())])
    for whole, tiled in zip(*results):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-8)


def test_the_teacher_gets_no_gradient_from_a_distillation_loss() -> None:
    f_t, logit_t = rand(1, 5, 4, 4).requires_grad_(), rand(2, 1).requires_grad_()
    feature.mlp_loss(mlp(), rand(1, 3, 4, 4).requires_grad_(), f_t, tiles=2).backward()
    feature.probability_loss(rand(2, 1).requires_grad_(), logit_t).backward()
    assert f_t.grad is None and logit_t.grad is None


def test_maps_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"maps of student \(1, 3, 4, 4\) and teacher \(1, 5, 8, 8\) differ in size"):
        feature.mlp_loss(mlp(), rand(1, 3, 4, 4), rand(1, 5, 8, 8))


def test_the_tiled_loss_keeps_one_hidden_strip_instead_of_the_hidden_map() -> None:
    f_s, f_t, kept = rand(1, 4, 64, 64).requires_grad_(), rand(1, 32, 64, 64), {}
    for tiles in (1, 8):
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=seen: (s.append(t.numel()), t)[1], lambda t: t):
            feature.mlp_loss(mlp(4, 32), f_s, f_t, tiles=tiles)
        kept[tiles] = sum(seen)
    assert kept[8] < kept[1] / 2


def test_the_probability_loss_is_the_mean_square_of_sigmoid_differences() -> None:
    s, t = rand(2, 1, 3, 3) * 4 - 2, rand(2, 1, 3, 3, seed=1) * 4 - 2
    wanted = sum((1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b))) ** 2 for a, b in zip(s.flatten(), t.flatten())) / 18
    assert feature.probability_loss(s, t).item() == pytest.approx(wanted, rel=1e-5)
    assert feature.probability_loss(s, t, "logit").item() == pytest.approx((s - t).square().mean().item(), rel=1e-5)
    assert feature.probability_loss(s, s).item() == 0


def test_layer_names_are_torchvisions_positions() -> None:
    assert [layer_names("vgg19").index(name) for name in feature.REAL_ESRGAN] == [2, 7, 16, 25, 34]
    assert [layer_names("vgg16").index(name) for name in ("conv4_3", "relu2_2", "pool5")] == [21, 8, 30]


def test_random_features_are_the_same_every_time_and_still_order_distortions() -> None:
    loss, again = (feature.PerceptualLoss.for_gcfsr() for _ in range(2))
    image = rand(1, 3, 32, 32) * 2 - 1
    noise = rand(1, 3, 32, 32, seed=1) - 0.5
    little, much = loss(image + 0.05 * noise, image), loss(image + 0.5 * noise, image)
    assert 0 < little < much and loss(image, image) == 0
    assert torch.equal(again(image + noise, image), loss(image + noise, image))
    assert not torch.equal(feature.PerceptualLoss.for_gcfsr(seed=1)(image + noise, image), loss(image + noise, image))


def test_a_perceptual_loss_is_frozen_and_only_the_student_gets_a_gradient() -> None:
    loss = feature.PerceptualLoss({"conv1_2": 1.0, "conv2_1": 0.5})
    loss.train()
    assert not loss.vgg.training and not any(p.requires_grad for p in loss.parameters())
    x, target = rand(1, 3, 16, 16).requires_grad_(), rand(1, 3, 16, 16, seed=1).requires_grad_()
    (loss(x, target) + loss.style(x, target)).backward()
    assert x.grad.abs().sum() > 0 and target.grad is None


def test_weights_of_another_network_and_unknown_layers_are_refused() -> None:
    with pytest.raises(WeightsError, match="The weights given for vgg19 have no fitting tensor for features.0.weight"):
        feature.PerceptualLoss.for_real_esrgan({"features.0.weight": torch.zeros(64, 3, 11, 11)})
    with pytest.raises(ConfigError, match="vgg16 has no layer 'conv3_4'; it has conv1_1, relu1_1"):
        feature.PerceptualLoss({"conv3_4": 1.0}, net="vgg16")


def test_the_omgd_terms_vanish_where_student_and_teacher_agree_except_variation() -> None:
    image = rand(1, 3, 32, 32) * 2 - 1
    (terms,) = omgd_dcd.omgd_terms(omgd_dcd.response_network(), image, image)
    assert terms["style"] == terms["feature"] == 0 and abs(terms["ssim"]) < 1e-6 and terms["tv"] > 0


def test_the_connector_distillation_trains_student_and_connectors_but_not_the_teacher() -> None:
    f_s, f_t = rand(2, 4, 6, 6).requires_grad_(), rand(2, 8, 6, 6, seed=1).requires_grad_()
    connector = omgd_dcd.Connector(4, 8)
    omgd_dcd.channel_distillation(connector(f_s), f_t).backward()
    assert f_s.grad is not None and connector[0].weight.grad is not None and f_t.grad is None


def images(seed: int, height: int = 24, width: int = 20) -> Tensor:
    return sr_metrics.to_uint8(rand(2, 3, height, width, seed=seed))


def test_equal_images_have_infinite_psnr_and_ssim_one() -> None:
    x = images(0)
    assert torch.isinf(sr_metrics.psnr_y(x, x)).all() and torch.equal(sr_metrics.ssim_y(x, x), torch.ones(2).double())


def test_psnr_of_a_constant_offset_is_the_formula() -> None:
    x = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
    assert sr_metrics.psnr(x, x + 5).item() == pytest.approx(20 * math.log10(255 / 5))
    # a grey offset of 5 moves the luminance by 5 * 219 / 255
    assert sr_metrics.psnr_y(x, x + 5).item() == pytest.approx(20 * math.log10(255 / (5 * 219 / 255)), abs=1e-4)


def test_scores_of_a_batch_are_those_of_its_images() -> None:
    x, y = images(0), images(1)
    for measure in (sr_metrics.psnr_y, sr_metrics.ssim_y):
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1], crop_border=4) for i in range(2)])
        torch.testing.assert_close(measure(x, y, crop_border=4), alone)


def test_ssim_agrees_with_scikit_image() -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x, y = images(0), images(1)
    for i in range(2):
        wanted = structural_similarity(
            x[i].permute(1, 2, 0).numpy(),
            y[i].permute(1, 2, 0).numpy(),
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            truncate=3.5,
        )
        assert sr_metrics.ssim(x, y)[i].item() == pytest.approx(wanted, abs=1e-6)


def test_rounding_to_eight_bits_clamps_first() -> None:
    values = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.4]).view(1, 1, 1, 5)
    assert sr_metrics.to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255]
    assert sr_metrics.to_uint8(values, -1, 1).flatten().tolist() == [102, 128, 191, 255, 255]


def test_pairs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be compared pixel by pixel"):
        sr_metrics.psnr(images(0), images(0, 12, 20))
    with pytest.raises(DataError, match=r"a border of 10 px leaves nothing of images of \(24, 20\)"):
        sr_metrics.psnr(images(0), images(1), crop_border=10)
    with pytest.raises(DataError, match="SSIM needs images of at least 11 px after the border is cropped"):
        sr_metrics.ssim(images(0), images(1), crop_border=5)
