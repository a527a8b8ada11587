"""StyleGAN2-ADA: without these tests official weights could load and give other images, the fast operations could leave
their definition, and the result of a step could depend on how its batch was cut."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from conftest import GOLDEN, REPO
from torch import Tensor
from torch.nn import functional as F

from sdtrain.augment.ada import AdaPipe
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError, DataError
from sdtrain.losses.regularizers import lazy_adam, path_length_penalty, path_lengths
from sdtrain.models.ghost import close_phase, next_chunk, open_phase, set_ghost_batch
from sdtrain.models.stylegan2 import networks as stylegan2
from sdtrain.models.stylegan2 import ops
from sdtrain.models.stylegan2.fir import Correlation
from sdtrain.rng import Draws

SMALL = {"channel_base": 128, "channel_max": 16}
FIR = ops.fir_filter((1, 3, 3, 1))


def small_generator(resolution: int = 16, num_classes: int = 0, **changes: object) -> stylegan2.Generator:
    torch.manual_seed(0)
    options = stylegan2.GeneratorOptions(z_dim=16, w_dim=12, mapping_layers=2, **{**SMALL, **changes})
    net = stylegan2.Generator(options, resolution=resolution, num_classes=num_classes)
    with torch.no_grad():  # at the start noise has no strength and biases are zero; here every tensor must matter
        for name, parameter in net.named_parameters():
            if name.endswith(("noise_strength", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def small_discriminator(resolution: int = 16, num_classes: int = 0, **changes: object) -> stylegan2.Discriminator:
    torch.manual_seed(1)
    options = stylegan2.DiscriminatorOptions(**{**SMALL, "mbstd_group": 2, **changes})
    return stylegan2.Discriminator(options, resolution=resolution, num_classes=num_classes)


def draws(*ghosts: int, ghost_batch: int = 2) -> Draws:
    return Draws(seed=5, step=3, ghosts=ghosts, ghost_batch=ghost_batch)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_networks_losses_and_operations_equal_the_official_ones():
    sys.path.insert(0, str(GOLDEN))
    import check

    files = ["sg2_ops*", "sg2_Gc*", "sg2_Dc*", "sg2_Darch*", "sg2_loss*", "keys_sg2_paper256.json", "schedules.json"]
    lines = check.run(GOLDEN / "sdgan", files)
    wrong = [line for line in lines if line.verdict != check.OK and not line.output.endswith("noise_strength")]
    assert len(lines) > 600
    assert not wrong, "\n".join(map(str, wrong))


def modulated_per_sample(x: Tensor, w: Tensor, s: Tensor, demodulate: bool, convolve: Callable) -> Tensor:
    """The definition: one modulated and demodulated copy of the weights for every sample."""
    done = []
    for sample, style in zip(x, s, strict=True):
        own = w * style[None, :, None, None]
        if demodulate:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        done.append(convolve(sample[None], own))
    return torch.cat(done)


def upsampled_first(x: Tensor, w: Tensor) -> Tensor:
    """Zero insertion, padding of both filters, FIR at full size, then a true convolution."""
    return F.conv2d(ops.upfirdn2d(x, FIR, up=2, padding=(3, 2, 3, 2), gain=4), w.flip(2, 3))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_modulation_by_scaling_equals_modulated_weights_of_every_sample_with_gradients(demodulate: bool, up: bool):
    x, w, s = random(3, 4, 6, 5), random(8, 4, 3, 3, seed=1), random(3, 4, seed=2)
    inputs = [t.requires_grad_() for t in (x, w, s)]
    fast = ops.modulated_conv2d(x, w, s, f=FIR if up else None, demodulate=demodulate)
    naive = modulated_per_sample(x, w, s, demodulate, upsampled_first if up else ops.conv_same)
    torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-4)
    slope = random(*naive.shape, seed=3)
    for a, b in zip(*(torch.autograd.grad(y, inputs, slope) for y in (fast, naive)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_downsampling_convolution_equals_filter_then_every_second_pixel():
    x, w = random(2, 3, 8, 10), random(5, 3, 3, 3, seed=1)
    channels = [F.conv2d(F.pad(x[:, i : i + 1], (2, 2, 2, 2)), FIR[None, None]) for i in range(3)]
    naive = F.conv2d(torch.cat(channels, 1), w)[:, :, ::2, ::2]
    torch.testing.assert_close(ops.conv_down(x, w, FIR), naive, rtol=1e-4, atol=1e-4)
    narrow = F.conv2d(torch.cat(channels, 1)[:, :, 1:-1:2, 1:-1:2], w[:, :, :1, :1])
    torch.testing.assert_close(ops.conv_down(x, w[:, :, :1, :1], FIR), narrow, rtol=1e-4, atol=1e-4)


def test_resampling_convolutions_have_correct_second_derivatives():
    x, w = random(1, 2, 4, 4).double().requires_grad_(), random(2, 2, 3, 3, seed=1).double().requires_grad_()
    fir = FIR.double()
    assert torch.autograd.gradgradcheck(lambda x, w: ops.lrelu_(ops.conv_up(x, w, fir)), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: ops.lrelu_(ops.conv_down(x, w, fir)), (x, w))


def test_minibatch_stddev_equals_its_loops():
    x = random(6, 4, 2, 2)
    out = ops.minibatch_stddev(x, 3, 2)
    for n in range(6):
        group = x[[m for m in range(6) if m % 2 == n % 2]]
        for k in range(2):
            part = group[:, 2 * k : 2 * k + 2]
            std = (part.var(0, correction=0) + 1e-8).sqrt().mean()
            torch.testing.assert_close(out[n, 4 + k], std.expand(2, 2))


def test_images_and_logits_do_not_depend_on_how_ghosts_are_grouped():
    G, D = small_generator(num_classes=3).eval(), small_discriminator(num_classes=3)
    set_ghost_batch(D, 2)
    z, c = random(6, 16), F.one_hot(torch.arange(6) % 3, 3).float()
    together = G(z, c, draws(0, 1, 2), mixing=0.9)
    logits = D(together, c)
    for ghost in range(3):
        own = slice(2 * ghost, 2 * ghost + 2)
        image = G(z[own], c[own], draws(ghost), mixing=0.9)
        torch.testing.assert_close(image, together[own], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(D(image, c[own]), logits[own], rtol=1e-4, atol=1e-4)


def test_with_little_rounding_losses_and_gradients_do_not_depend_on_the_cut():
    G, D, pipe = small_generator().double(), small_discriminator().double(), AdaPipe("bgc").double()
    set_ghost_batch(D, 2)

    def gradients(*ghosts: int) -> list[Tensor]:
        own = draws(*ghosts)
        z, y = own.normal("z", 16).double(), own.normal("y", 3, 16, 16).double()
        images, ws = G(z, None, own, mixing=0.9, noise="const", return_ws=True)
        logits = D(pipe(images, 0.7, own).double())
        loss = F.softplus(-logits).mean() + path_lengths(ws, images, y).mean()
        return [loss, *torch.autograd.grad(loss, [*G.parameters()], allow_unused=True)]

    for whole, one, two in zip(gradients(0, 1), gradients(0), gradients(1), strict=True):
        torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-6, atol=1e-6)


def test_style_mixing_shares_a_crossover_within_a_ghost_and_repeats_for_a_teacher():
    G = small_generator().eval()
    ghosts = tuple(range(40))
    z = random(80, 16)
    plain, mixed = G.mapping(z), G.styles(z, None, draws(*ghosts), 0.9)
    changed = (plain != mixed).any(2)
    assert torch.equal(changed[0::2], changed[1::2])
    assert not changed[:, 0].any(), "the first layer keeps the first latent"
    assert changed.int().diff(dim=1).min() >= 0, "from the crossover on all layers are mixed"
    assert 25 <= int(changed[0::2, -1].sum()) <= 40
    assert len(set(changed.sum(1).tolist())) == G.num_ws, "every crossover and 'not mixed' occur"
    assert torch.equal(mixed, small_generator().eval().styles(z, None, draws(*ghosts), 0.9))


def test_w_avg_moves_once_a_pass_whatever_the_cut_and_not_for_mixing_or_evaluation():
    z, G, cut = random(8, 16), small_generator(), small_generator()
    open_phase(G)
    G(z, None, draws(0, 1, 2, 3), mixing=0.9)
    assert torch.equal(G.mapping.w_avg, torch.zeros(12)), "inside a phase nothing moves"
    close_phase(G)
    open_phase(cut)
    for ghost in range(4):
        next_chunk(cut)
        cut(z[2 * ghost : 2 * ghost + 2], None, draws(ghost), mixing=0.9)
    close_phase(cut)
    mean = G.mapping(z, update_w_avg=False)[:, 0].mean(0)
    torch.testing.assert_close(G.mapping.w_avg, 0.005 * mean, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(cut.mapping.w_avg, G.mapping.w_avg)
    before = G.mapping.w_avg.clone()
    G.eval()(z)
    assert torch.equal(G.mapping.w_avg, before)


def test_noise_is_a_function_of_the_draws_and_absent_without_them():
    G, z = small_generator().eval(), random(2, 16)
    assert torch.equal(G(z, None, draws(4)), G(z, None, draws(4)))
    assert not torch.equal(G(z, None, draws(4)), G(z, None, draws(5)))
    assert torch.equal(G(z), G(z, None, draws(4), noise="none"))
    assert not torch.equal(G(z, noise="const"), G(z))


def test_full_truncation_gives_the_mean_image_for_every_latent():
    G = small_generator()
    G(random(8, 16))
    images = G.eval()(random(3, 16), truncation_psi=0.0)
    torch.testing.assert_close(images, images[:1].expand_as(images))
    ws = G.mapping(random(3, 16), truncation_psi=0.0, truncation_cutoff=2)
    assert torch.equal(ws[0, :2], ws[1, :2]) and not torch.equal(ws[0, 2:], ws[1, 2:])


def test_path_lengths_equal_the_explicit_jacobian_product():
    G, z, noise = small_generator(resolution=8).eval(), random(2, 16), random(2, 3, 8, 8, seed=1)
    ws = G.mapping(z).detach().requires_grad_()
    lengths = path_lengths(ws, G.synthesis(ws), noise)
    for n in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda w: G.synthesis(w)[0], ws[n : n + 1])
        product = torch.einsum("chw,chwld->ld", noise[n] / 8, jacobian[:, :, :, 0])
        torch.testing.assert_close(lengths[n], product.square().sum(1).mean().sqrt(), rtol=1e-3, atol=1e-5)


def test_path_length_penalty_of_two_halves_equals_one_process_in_value_mean_and_gradient():
    lengths = random(6).abs().requires_grad_()
    whole, mean = path_length_penalty(lengths, 0.3, 0.2, 2.0)
    (expected,) = torch.autograd.grad(whole, lengths)
    parts = [path_length_penalty(half, 0.3, 0.2, 2.0, lengths.mean()) for half in lengths.split(3)]
    total = (parts[0][0] + parts[1][0]) / 2
    (got,) = torch.autograd.grad(total, lengths)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(got, expected)
    assert all(torch.equal(part[1], mean) for part in parts)
    frozen = 2 * 2.0 * (lengths - mean).detach() / 6
    assert not torch.allclose(expected, frozen), (
        "the gradient through the mean must be visible, or this test shows nothing"
    )


def test_generator_regulariser_reaches_the_mapping_network_and_r1_the_discriminator():
    G, D = small_generator(), small_discriminator()
    images, ws = G(random(4, 16), None, draws(0, 1), return_ws=True)
    path_length_penalty(path_lengths(ws, images, random(4, 3, 16, 16)), 0.0)[0].backward()
    assert G.mapping.fc0.weight.grad.abs().sum() > 0 and G.synthesis.b16.conv1.weight.grad.abs().sum() > 0
    real = random(4, 3, 16, 16).requires_grad_()
    (slope,) = torch.autograd.grad(D(real).sum(), real, create_graph=True)
    slope.square().sum().backward()
    assert D.b16.conv0.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_low_precision_blocks_stay_near_float32_and_images_stay_float32(low: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stylegan2, "format_on", lambda low, device_type: low)  # float16 as on a GPU
    z, x = random(2, 16), random(2, 3, 16, 16)
    same = {"num_low_precision_res": 2, "low_precision": low, "conv_clamp": 256.0}
    G, G_low = small_generator().eval(), small_generator(**same).eval()
    D, D_low = small_discriminator(), small_discriminator(**same)
    assert G_low.synthesis.b16.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[low]
    assert G_low.synthesis.b4.dtype is None and G.synthesis.b16.dtype is None
    image, logits = G_low(z), D_low(x)
    assert image.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(image, G(z), rtol=0.05, atol=0.05 * float(G(z).detach().abs().max()))
    torch.testing.assert_close(logits, D(x), rtol=0.1, atol=0.05)
    (image.sum() + logits.sum()).backward()


def test_float16_blocks_compute_in_float32_on_a_cpu_and_say_so_once(caplog: pytest.LogCaptureFixture):
    ops.format_on.cache_clear()
    same = {"num_low_precision_res": 2, "low_precision": "fp16"}
    z, x = random(2, 16), random(2, 3, 16, 16)
    with caplog.at_level("INFO", logger="sdtrain"):
        for _ in range(2):
            assert torch.equal(small_generator(**same).eval()(z), small_generator().eval()(z))
            assert torch.equal(small_discriminator(**same)(x), small_discriminator()(x))
    assert [r.message for r in caplog.records] == [
        "blocks in float16 compute in float32 on the CPU, where float16 is tens of times slower"
    ]
    kept = [(torch.float16, "cuda"), (torch.float16, "meta"), (torch.bfloat16, "cpu"), (None, "cpu")]
    assert [ops.format_on(low, device) for low, device in kept] == [low for low, _ in kept]


def test_under_autocast_mapping_and_outputs_stay_float32():
    G, D, z = small_generator().eval(), small_discriminator(), random(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ws, image, logits = G.mapping(z), G(z), D(random(2, 3, 16, 16))
    assert torch.equal(ws, G.mapping(z))
    assert image.dtype == logits.dtype == torch.float32


def test_clamp_bounds_what_every_convolution_hands_on():
    G = small_generator(conv_clamp=0.5).eval()
    seen: list[float] = []
    for module in G.modules():
        if isinstance(module, (stylegan2.SynthesisConv, stylegan2.ToRGB)):
            module.register_forward_hook(lambda m, args, out: seen.append(float(out.detach().abs().max())))
    G(random(2, 16) * 10)
    assert max(seen) == 0.5 and len(seen) == 8


@pytest.mark.parametrize("architecture, first", [("resnet", 4), ("orig", 3), ("skip", 3)])
def test_frozen_layers_keep_their_names_and_are_not_trained(architecture: str, first: int):
    free = small_discriminator(architecture=architecture)
    frozen = small_discriminator(architecture=architecture, freeze_layers=first)
    frozen.load_state_dict(free.state_dict())
    trained = {name.partition(".")[0] for name, _ in frozen.named_parameters()}
    assert "b16" not in trained and "b8" in trained and "b4" in trained
    x = random(2, 3, 16, 16)
    assert torch.equal(frozen(x), free(x))


def test_official_arguments_rebuild_a_network_and_unknown_ones_are_refused():
    kwargs = {"z_dim": 8, "c_dim": 0, "w_dim": 8, "img_resolution": 8, "img_channels": 3}
    G = stylegan2.generator_from_official({**kwargs, "synthesis_kwargs": {"num_fp16_res": 4, "conv_clamp": 256}})
    assert G.options.low_precision == "fp16" and G.options.conv_clamp == 256
    assert stylegan2.generator_from_official(kwargs, channel_max=4).options.channel_max == 4
    with pytest.raises(ConfigError, match="official generator argument architecture='orig' has no counterpart"):
        stylegan2.generator_from_official({**kwargs, "synthesis_kwargs": {"architecture": "orig"}})


def test_a_resolution_that_is_no_power_of_two_is_refused():
    with pytest.raises(ConfigError, match="resolution 48: StyleGAN2 needs a power of two from 4 upwards"):
        small_generator(resolution=48)
    with pytest.raises(ConfigError, match="resolution 4: StyleGAN2 needs a power of two from 8 upwards"):
        small_discriminator(resolution=4)


def test_a_width_that_leaves_no_channels_is_refused():
    with pytest.raises(ConfigError, match="channel_base 128 leaves no channels at resolution 256; use at least 256"):
        small_discriminator(resolution=256)


def test_missing_labels_are_refused():
    with pytest.raises(DataError, match="wants one-hot labels of 3 classes and got none; pass c"):
        small_generator(num_classes=3)(random(2, 16))
    with pytest.raises(DataError, match="labels of width 4"):
        small_discriminator(num_classes=3)(random(2, 3, 16, 16), torch.eye(4)[:2])


def test_a_stddev_group_that_does_not_divide_the_ghost_is_refused():
    with pytest.raises(ConfigError, match="a ghost of 3 samples is no multiple of mbstd_group 2"):
        small_discriminator()(random(3, 3, 16, 16))


def test_lazy_regularisation_without_interval_leaves_adam_alone():
    assert lazy_adam(0.1, (0.5, 0.9), None) == (0.1, (0.5, 0.9))


def test_smallest_and_largest_networks_have_the_official_number_of_layers():
    with torch.device("meta"):
        sizes = [stylegan2.Generator(stylegan2.GeneratorOptions(), resolution=r) for r in (4, 256, 1024)]
    counts = {G.resolution: G.num_ws for G in sizes}
    assert counts == {4: 2, 256: 14, 1024: 18}


# kimg, batch, devices, mbstd, fmaps, lr, gamma, ema kimg, ramp-up, mapping layers of the official presets
PRESETS = {
    "auto256": (25000, 64, 8, 4, 0.5, 0.0025, 0.2048, 20, 0.05, 2),
    "stylegan2_1024": (25000, 32, 8, 4, 1, 0.002, 10, 10, None, 8),
    "paper256": (25000, 64, 8, 8, 0.5, 0.0025, 1, 20, None, 8),
    "paper512": (25000, 64, 8, 8, 1, 0.0025, 0.5, 20, None, 8),
    "paper1024": (25000, 32, 8, 4, 1, 0.002, 2, 10, None, 8),
    "cifar": (100000, 64, 2, 32, 1, 0.0025, 0.01, 500, 0.05, 2),
}


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_hold_the_official_presets(name: str):
    config = load_config(REPO / "configs" / "stylegan2" / f"{name}.yaml")
    kimg, batch, devices, mbstd, fmaps, lr, gamma, ema, rampup, layers = PRESETS[name]
    G, D = config.model.generator, config.model.discriminator
    assert (config.total_img, config.batch_size, config.num_ghosts) == (kimg * 1000, batch, devices)
    assert (D.mbstd_group, D.channel_base, G.channel_base) == (mbstd, fmaps * 32768, fmaps * 32768)
    assert (config.path_length.every, config.r1.every) == (4, 16)  # what Adam is rescaled by
    for adam in (config.optimizer.G, config.optimizer.D):
        assert (adam.lr, adam.betas, adam.rescale) == (lr, (0.0, 0.99), "all")
    assert (config.r1.gamma, config.ema.half_life_img, config.ema.rampup) == (gamma, ema * 1000, rampup)
    assert G.mapping_layers == layers
    is_cifar = name == "cifar"
    assert (config.path_length.weight, config.style_mixing) == ((0, 0) if is_cifar else (2, 0.9))
    assert D.architecture == ("orig" if is_cifar else "resnet")
    assert config.sd.alpha == 0 and config.augment.policy == "bgc"


def test_the_auto_preset_is_what_its_rule_gives():
    rule = stylegan2.auto_preset(256, 8)
    _, batch, _, mbstd, fmaps, lr, gamma, ema, rampup, layers = PRESETS["auto256"]
    expected = {"batch": batch, "mbstd": mbstd, "fmaps": fmaps, "lr": lr, "gamma": gamma}
    assert rule == pytest.approx({**expected, "ema_kimg": ema, "rampup": rampup, "map_layers": layers})


@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1), (0, 0)), ((2, 2), (1, 1)), ((1, 2), (0, 1)), ((2, 1), (2, 0))]
)
def test_the_filter_as_a_linear_function_has_the_derivatives_of_the_grouped_convolution(stride, padding):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 1, 4, 3, dtype=torch.float64)
    plain = F.conv2d(x, kernel, stride=stride, padding=padding, groups=3)
    assert torch.equal(Correlation.apply(x, kernel, stride, padding), plain)
    assert torch.autograd.gradcheck(lambda x: Correlation.apply(x, kernel, stride, padding), x)
    assert torch.autograd.gradgradcheck(lambda x: Correlation.apply(x, kernel, stride, padding).square(), x)
