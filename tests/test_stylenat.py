"""StyleNAT: without these tests the networks could drift from the official ones, and tiled attention from its rule."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import GOLDEN, REPO
from torch import Tensor

from sdtrain.config.load import load_config
from sdtrain.constants import from_imagenet, to_imagenet
from sdtrain.errors import ConfigError
from sdtrain.losses.consistency import balanced_consistency
from sdtrain.models.ghost import set_ghost_batch
from sdtrain.models.stylenat import networks as stylenat
from sdtrain.models.stylenat.attention import (
    axis_plan,
    full_mask_attention,
    natten_attention,
    neighborhood_attention,
)

SMALL_G = stylenat.GeneratorOptions(
    style_dim=32, mlp_layers=2, channel_max=32, min_heads=2, kernels=((3,),) * 4, dilations=((1,), (1,), (1, 2), (1, 4))
)
SMALL_D = stylenat.DiscriminatorOptions(channel_max=16)


def small_generator(seed: int = 0, **changes: object) -> stylenat.Generator:
    torch.manual_seed(seed)
    options = stylenat.GeneratorOptions(**{**vars(SMALL_G), **changes})
    net = stylenat.Generator(options, resolution=32)
    with torch.no_grad():  # the official start is nearly linear; tests need every weight to matter
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def small_discriminator(seed: int = 0) -> stylenat.Discriminator:
    torch.manual_seed(seed)
    return stylenat.Discriminator(SMALL_D, resolution=32)


def qkv(size: tuple[int, int], heads: int, kernel: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, *size, heads * 4, generator=g) for _ in range(3)]
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, generator=g)
    return [x.requires_grad_() for x in (*maps, rpb)]


def test_networks_equal_the_official_ones():
    sys.path.insert(0, str(GOLDEN))
    import check

    lines = check.run(GOLDEN / "sdgan", ["snat_units.safetensors", "snat_big.safetensors", "keys_snat_*"])
    assert len(lines) > 30
    assert all(line.verdict == check.OK for line in lines), "\n".join(map(str, lines))


@pytest.mark.parametrize(
    "size, kernel, dilation, tile",
    [((9, 9), 3, 1, 4), ((20, 11), 3, 2, 4), ((13, 26), 5, 2, 3), ((28, 28), 7, 4, 8), ((10, 16), 3, 3, 8)],
)
def test_tiled_attention_equals_the_full_mask_with_all_gradients(size, kernel, dilation, tile):
    inputs = qkv(size, 2, kernel)
    weight = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    expected = full_mask_attention(*inputs, dilation)
    got = neighborhood_attention(*inputs, dilation, tile)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_query_sees_exactly_kernel_keys_and_is_placed_once():
    plan = axis_plan(23, 5, 3, 4)
    patterns = [plan.patterns[p] for p, (a, b) in enumerate(plan.spans) for _ in range(a, b)]
    for row, place in enumerate(plan.place.tolist()):
        tile, slot = divmod(place, plan.queries.shape[1])
        seen = plan.keys[tile][~patterns[tile].outside[slot]].tolist()
        assert plan.queries[tile, slot] == row
        assert len(set(seen)) == 5 and all((key - row) % 3 == 0 for key in seen)


def test_a_window_larger_than_its_level_is_refused_with_both_sizes():
    with pytest.raises(ConfigError, match="kernel 7 with dilation 4 spans 28 positions, but this level has only 16"):
        neighborhood_attention(*qkv((16, 16), 2, 7), 4)
    with pytest.raises(ConfigError, match="spans 14 positions, but this level has only 8"):
        small_generator(kernels=((3,), (7,), (3,), (3,)), dilations=((1,), (1, 2), (1,), (1,)))


@pytest.mark.parametrize("kernel, dilation", [(3, 1), (7, 4)])
def test_natten_equals_the_portable_path(kernel: int, dilation: int):
    pytest.importorskip("natten.functional", reason="natten is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 0.17 has kernels for both
    inputs = [x.detach().to(device).requires_grad_() for x in qkv((28, 28), 2, kernel)]
    try:
        got = natten_attention(*inputs, dilation)
    except ConfigError as error:
        pytest.skip(str(error))
    expected = neighborhood_attention(*inputs, dilation)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    slopes = [torch.autograd.grad(y.square().sum(), inputs) for y in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_natten_that_is_missing_or_too_new_is_a_sentence():
    try:
        from natten.functional import na2d_qk  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="needs natten 0.15 to 0.17"):
            natten_attention(*qkv((8, 8), 2, 3), 1)
    else:
        pytest.skip("this natten has the needed functions")


def test_attention_backends_give_one_image():
    z = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    portable, full = small_generator(), small_generator(attention="full_mask")
    torch.testing.assert_close(portable(z), full(z), rtol=1e-4, atol=1e-5)


def test_forward_speaks_minus_one_to_one_and_render_the_official_space():
    g, d = small_generator().eval(), small_discriminator().eval()
    z = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    y = g.render(g.mapping(z))
    torch.testing.assert_close(to_imagenet(g(z)), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d(g(z)), d.score(y), rtol=1e-4, atol=1e-5)
    white = from_imagenet((torch.ones(1, 3, 1, 1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.225)
    assert abs(float(white[0, 2]) - 1) < 1e-5


def test_a_narrow_pair_learns_on_cpu_at_32_px():
    g, d = small_generator(), small_discriminator()
    real = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    z = torch.randn(8, 32, generator=torch.Generator().manual_seed(6))
    steps = [torch.optim.Adam(net.parameters(), 2e-3, betas=(0.0, 0.99)) for net in (g, d)]
    losses = []
    for _ in range(6):
        loss_d = (-d(real)).exp().log1p().mean() + d(g(z).detach()).exp().log1p().mean()
        steps[1].zero_grad()
        loss_d.backward()
        steps[1].step()
        loss_g = (-d(g(z))).exp().log1p().mean()
        steps[0].zero_grad()
        loss_g.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in g.parameters())
        steps[0].step()
        losses.append(loss_d.item())
    assert losses[-1] < losses[0]


def test_gradient_penalty_of_the_discriminator_is_differentiable():
    d = small_discriminator().eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7)).requires_grad_()
    (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None for name, p in d.named_parameters() if name.endswith("weight_orig"))


def test_minibatch_deviation_belongs_to_a_ghost():
    d = small_discriminator().eval()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    set_ghost_batch(d, 4)
    whole = d(x)
    torch.testing.assert_close(whole, torch.cat([d(x[:4]), d(x[4:])]), rtol=1e-5, atol=1e-6)
    set_ghost_batch(d, 8)
    assert (whole - d(x)).abs().max() > 1e-6


def test_a_ghost_that_groups_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="6 samples for groups of 4"):
        small_discriminator()(torch.zeros(6, 3, 32, 32))


def test_the_legacy_layout_converts_both_ways_and_gives_the_same_image():
    g = small_generator()
    legacy = stylenat.to_legacy(g.state_dict())
    assert stylenat.is_legacy(legacy) and "layers.1.blocks.0.attn.rpb1" in legacy
    back = stylenat.from_legacy(legacy, g.options)
    assert back.keys() == g.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in g.state_dict().items())
    twin = small_generator(
        seed=9, dilations=((1,), (1, 1), (1, 2), (1, 4))
    )  # as the legacy class splits a single group
    twin.load_state_dict({k.replace("rpb0", "rpb.0").replace("rpb1", "rpb.1"): v for k, v in legacy.items()})
    z = torch.randn(2, 32, generator=torch.Generator().manual_seed(10))
    torch.testing.assert_close(twin(z), g(z), rtol=1e-4, atol=1e-5)


def test_a_remainder_of_heads_goes_to_the_last_groups():
    assert stylenat.split_heads(16, 3) == [5, 5, 6]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: stylenat.Generator(SMALL_G, resolution=48), "resolution 48, but its levels double"),
        (lambda: stylenat.Generator(SMALL_G, resolution=64), "4 entries in kernels, but 64 px has 5 levels"),
        (lambda: stylenat.Generator(SMALL_G, resolution=32, num_classes=10), "unconditional, but num_classes is 10"),
        (lambda: stylenat.Discriminator(SMALL_D, resolution=8), "use a power of two >= 16"),
        (lambda: small_generator(kernels=((4,),) * 4), "kernel 4, but a window has a centre"),
        (lambda: small_generator(min_heads=3), "width 32 has 3 heads"),
        (lambda: small_generator(dilations=((1,), (1,), (1, 1, 2), (1,))), "2 heads for 3 dilations"),
    ],
)
def test_options_that_cannot_work_are_sentences(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_consistency_is_the_mean_squared_change_of_logits_under_augmentation():
    a, b, c, d = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(11))
    naive = sum(10 * (b[i] - a[i]) ** 2 / 6 + 5 * (d[i] - c[i]) ** 2 / 6 for i in range(6)).item()
    assert balanced_consistency(a, b, c, d, 10, 5).item() == pytest.approx(naive, rel=1e-5)
    poison = torch.full((6, 1), float("nan"))
    assert balanced_consistency(poison, poison, c, d, 0, 5).isfinite()
    assert balanced_consistency(a, b, c, d, 0, 0) == 0


def test_bf16_autocast_stays_close():
    g = small_generator()
    z = torch.randn(2, 32, generator=torch.Generator().manual_seed(12))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = g(z).float()
    with torch.no_grad():
        full = g(z)
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.parametrize("name", ["ffhq256", "sd_ffhq256", "ffhq1024", "church256", "small32"])
def test_every_preset_can_be_built(name):
    config = load_config(REPO / "configs" / "stylenat" / f"{name}.yaml")
    with torch.device("meta"):
        g = stylenat.Generator(config.model.generator, resolution=config.data.resolution)
        d = stylenat.Discriminator(config.model.discriminator, resolution=config.data.resolution)
    parameters = sum(p.numel() for p in g.parameters())
    if name in ("ffhq256", "ffhq1024"):  # the published counts
        assert round(parameters / 1e6, 2) == {"ffhq256": 48.92, "ffhq1024": 49.45}[name]
    assert config.ghost_batch % config.model.discriminator.mbstd_group == 0
    assert d.resolution == g.resolution == config.data.resolution
