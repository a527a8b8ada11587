"""ProjectedGAN: without these tests, official checkpoints might load into a network that computes something else, a
frozen feature network might train or drift, and augmentation might depend on how a batch was spread over ranks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.augment import diffaug
from sdtrain.constants import IMAGENET_MEAN, IMAGENET_STD
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.losses.adversarial import ADVERSARIAL, gradient_penalty
from sdtrain.models.doubling import conv_of_doubled
from sdtrain.models.fastgan.networks import Generator, GeneratorOptions, UpConv2d
from sdtrain.models.ghost import close_phase, next_chunk, open_phase, set_ghost_batch
from sdtrain.models.projected.features import STRIDES, resized
from sdtrain.models.projected.networks import Discriminator, DiscriminatorOptions, projection_sizes
from sdtrain.rng import Draws, generator

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402

SMALL_G = GeneratorOptions(z_dim=16, ngf=4, num_embeddings=3)
SMALL_D = DiscriminatorOptions(num_discs=2, interpolate_to=None, projection_width=8, head_width=8, num_embeddings=3)


def numbers(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator("test", name))


def draws(ghosts: list[int], ghost_batch: int = 2) -> Draws:
    return Draws(seed=1, step=5, ghosts=ghosts, ghost_batch=ghost_batch)


def names_of_trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_small_networks_blocks_augmentation_and_losses_equal_the_official_numbers() -> None:
    lines = check.run(GOLDEN / "sdgan", ["pg_fastgan*", "pg_units*", "pg_single*", "pg_loss*", "diffaug*", "keys_pg*"])
    assert check.bad(lines) == []
    assert sum(line.verdict == check.OK for line in lines) >= 90


def test_full_size_networks_equal_the_official_numbers() -> None:
    lines = check.run(GOLDEN / "sdgan", ["pg_big*"])
    assert [str(line) for line in lines if line.verdict != check.OK] == []
    assert len(lines) == 23


def test_the_trained_parameters_of_the_full_discriminator_are_the_official_ones() -> None:
    official = json.loads((GOLDEN / "sdgan" / "keys_pg_D.json").read_text())
    with torch.device("meta"):
        net = Discriminator(DiscriminatorOptions(), resolution=256)
    trained = {name for name, _, _, kind in official if kind == "param" and not name.startswith("feature_network.")}
    assert names_of_trained(net) == trained
    assert {n: str(v.dtype) for n, v in net.state_dict().items()} == {n: f"torch.{d}" for n, _, d, _ in official}


@pytest.mark.parametrize("resolution", [32, 64, 128])
@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_trained_parameter_of_the_generator_gets_a_gradient(
    resolution: int, lite: bool, num_classes: int
) -> None:
    options = GeneratorOptions(z_dim=16, ngf=2, lite=lite, num_embeddings=3)
    net = Generator(options, resolution=resolution, num_classes=num_classes)
    c = F.one_hot(torch.tensor([0, 2]), 3).float() if num_classes else None
    images = net(numbers(2, 16), c)
    assert images.shape == (2, 3, resolution, resolution)
    images.square().sum().backward()
    assert {name for name, parameter in net.named_parameters() if parameter.grad is not None} == names_of_trained(net)
    unused = {name.split(".")[1] for name, _ in net.named_parameters()} - {
        n.split(".")[1] for n in names_of_trained(net)
    }
    assert unused == ({"feat_256", "se_256"} if resolution == 128 else set())


def test_noise_comes_from_draws_alone_and_each_ghost_has_its_own() -> None:
    net = Generator(SMALL_G, resolution=32).eval()
    z = numbers(8, 16)
    assert torch.equal(net(z), net(z, draws=draws([0, 1, 2, 3])))  # noise weights start at zero
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.shape == (1,) and "to_big" not in name:
                parameter.fill_(0.3)
    whole = net(z, draws=draws([0, 1, 2, 3]))
    assert torch.equal(whole, net(z, draws=draws([0, 1, 2, 3])))
    assert not torch.allclose(whole, net(z), atol=1e-3)
    parts = [net(z[:4], draws=draws([0, 1])), net(z[4:], draws=draws([2, 3]))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_noise_map_is_asked_for_under_its_own_name(num_classes: int) -> None:
    asked: dict[str, tuple[int, ...]] = {}

    class Recorder:
        def normal(self, purpose: str, *shape: int) -> Tensor:
            assert purpose not in asked
            asked[purpose] = shape
            return torch.zeros(2, *shape)

    c = torch.eye(3)[:2] if num_classes else None
    Generator(SMALL_G, resolution=32, num_classes=num_classes)(numbers(2, 16), c, Recorder())
    assert asked == {f"noise/feat_{r}.{i}": (1, r, r) for r in (8, 16, 32) for i in (0, 1)}


@pytest.mark.parametrize("num_classes", [0, 3])
def test_images_and_state_of_the_generator_do_not_depend_on_chunks(num_classes: int) -> None:
    outcomes = []
    for chunks in (1, 4):
        torch.manual_seed(0)
        net = Generator(SMALL_G, resolution=32, num_classes=num_classes).train()
        set_ghost_batch(net, 2)
        z, c = numbers(8, 16), F.one_hot(torch.arange(8) % 3, 3).float()
        open_phase(net)
        images = []
        for part, labels in zip(z.chunk(chunks), c.chunk(chunks), strict=True):
            next_chunk(net)
            images.append(net(part, labels if num_classes else None))
        close_phase(net)
        outcomes.append((torch.cat(images), net.state_dict()))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    moved = [name for name in outcomes[0][1] if name.endswith(("stored_mean", "running_mean"))]
    assert moved and all(outcomes[0][1][name].abs().sum() > 0 for name in moved)


@pytest.mark.parametrize(
    ("options", "resolution", "classes", "message"),
    [
        (GeneratorOptions(), 48, 0, "cannot make 48 pixels"),
        (GeneratorOptions(ngf=1), 128, 0, "no channels left at 256 pixels; set ngf >= 2"),
        (GeneratorOptions(own_norms=2), 64, 5, "own_norms 2 is for generators without classes"),
        (GeneratorOptions(num_embeddings=4), 64, 5, "num_embeddings 4 but the data has 5 classes"),
    ],
)
def test_a_generator_that_cannot_be_built_is_refused(options, resolution, classes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Generator(options, resolution=resolution, num_classes=classes)


def test_nothing_can_train_the_feature_network() -> None:
    net = Discriminator(SMALL_D, resolution=32)
    net.train()
    net.requires_grad_(True)
    before = {name: value.clone() for name, value in net.feature_network.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(numbers(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert list(net.feature_network.parameters()) == []
    assert not any(module.training for module in net.feature_network.modules())
    assert net.discriminator.training
    torch.testing.assert_close(dict(net.feature_network.state_dict()), before, rtol=0, atol=0)


def seeded(seed: int, **options: Any) -> Discriminator:
    """A discriminator built as a run of this seed builds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(replace(SMALL_D, **options), resolution=32)


def test_a_checkpoint_leaves_out_the_pretrained_features_alone_and_they_come_back() -> None:
    first, second = seeded(1), seeded(2)
    frozen = [n for n in first.state_dict() if n.startswith(Discriminator.frozen_prefixes)]
    assert frozen and all(torch.equal(first.state_dict()[n], second.state_dict()[n]) for n in frozen)
    kept = set(first.state_dict()) - set(frozen)
    assert {name for name in kept if not name.startswith("discriminator.")} == {
        f"feature_network.scratch.layer{i}_{part}.{kind}"
        for i in range(4)
        for part in ("ccm", "csm.out_conv")
        for kind in ("weight", "bias")
    }


def test_projections_follow_the_runs_seed_unless_a_key_fixes_them() -> None:
    def projections(*where: Any, **options: Any) -> dict[str, Tensor]:
        return {n: v for n, v in seeded(*where, **options).state_dict().items() if ".scratch." in n}

    one, again, other = projections(1), projections(1), projections(2)
    assert all(torch.equal(one[n], again[n]) and not torch.equal(one[n], other[n]) for n in one)
    fixed = projections(1, projection_seed=7)
    assert all(torch.equal(fixed[n], value) for n, value in projections(2, projection_seed=7).items())
    assert not any(torch.equal(fixed[n], value) for n, value in projections(1, projection_seed=8).items())
    for name, value in {**one, **fixed}.items():  # torch's default: U(-1, 1) / sqrt(fan_in), weights and biases
        bound = next(v for n, v in one.items() if n == name.replace("bias", "weight")).shape[1] ** -0.5
        assert value.abs().max() <= bound and (value.numel() < 200 or value.std() > 0.5 * bound)


def test_patch_heads_all_start_at_16_and_have_one_down_block() -> None:
    with torch.device("meta"):
        net = Discriminator(DiscriminatorOptions(patch=True), resolution=256)
        logits = net(torch.empty(1, 3, 256, 256))
    state = net.state_dict()
    widths = []
    for i, c_in in enumerate(net.feature_network.channels):
        head = f"discriminator.mini_discs.{i}.main"
        assert state[f"{head}.0.main.0.main.0.weight_orig"].shape == (512, c_in, 4, 4)  # one block, 16 -> 8
        widths.append(state[f"{head}.1.weight_orig"].shape)
    assert widths == [(1, 512, 4, 4)] * 4
    assert logits.shape[1] == sum((side // 2 - 3) ** 2 for side in (128, 64, 32, 16))
    with torch.device("meta"):  # small siblings: only the smallest map has no room for a block
        small = Discriminator(DiscriminatorOptions(patch=True, interpolate_to=None), resolution=64)
    assert [len(head.main) for head in small.discriminator.mini_discs.values()] == [2, 2, 1, 1]


def test_random_features_are_alive_at_every_stage() -> None:
    net = Discriminator(DiscriminatorOptions(interpolate_to=None), resolution=64)
    images = F.interpolate(numbers(8, 3, 16, 16), 64, mode="bilinear").clamp(-1, 1)
    features = net.feature_network.pretrained(images)
    assert [tuple(f.shape[1:]) for f in features] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert all(0.3 < f.std() < 10 for f in features)
    assert all(f.std(dim=(0, 2, 3)).min() > 0.3 * f.std() for f in features)  # no dead channel
    assert all(f.mean(dim=(0, 2, 3)).std() < 0.5 * f.std() for f in features)  # no constant one


def network(name: str, **more: Any) -> nn.Module:
    """timm's, with weights and statistics that are not those it begins with."""
    torch.manual_seed(3)
    net = timm.create_model(name, pretrained=False, **more).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def test_features_equal_those_of_timms_whole_network_bit_for_bit() -> None:
    oracle = network("tf_efficientnet_lite0")
    net = Discriminator(SMALL_D, resolution=65, feature_weights=oracle.state_dict())
    x = numbers(2, 3, 65, 65)
    ours, h, theirs = net.feature_network.pretrained(x), oracle.bn1(oracle.conv_stem(x)), []
    for i, block in enumerate(oracle.blocks):
        h = block(h)
        if i in (1, 2, 4, 6):
            theirs.append(h)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("tf_efficientnet_b0", [24, 40, 112, 320]),
        ("convnext_atto", [40, 80, 160, 320]),
        ("deit_tiny_distilled_patch16_224", [192] * 4),
        ("resnet18", [64, 128, 256, 512]),
    ],
)
def test_other_networks_of_timm_give_four_maps_of_images_scaled_as_they_expect(
    name: str, channels: list[int], side: int = 64
) -> None:
    options, dynamic = replace(SMALL_D, feature_network=name), {"dynamic_img_size": True} if "deit" in name else {}
    oracle = network(name, **dynamic)
    net = Discriminator(options, resolution=side, feature_weights=oracle.state_dict())
    seen: list[Tensor] = []
    net.feature_network.pretrained.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = numbers(2, 3, side, side).clamp(-1, 1).requires_grad_()
    logits = net(x)
    logits.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(seen[0], ((x + 1) / 2 - mean) / std)
    maps = net.feature_network.pretrained(seen[0])
    assert [tuple(h.shape[1:]) for h in maps] == [(c, side // s, side // s) for c, s in zip(channels, STRIDES)]
    last = oracle.forward_intermediates(seen[0], indices=1, intermediates_only=True)[0]
    assert torch.equal(maps[3], resized(last, maps[3].shape[-1]))


def test_a_network_that_timm_does_not_have_or_that_has_no_four_maps_is_refused() -> None:
    with pytest.raises(ConfigError, match="no network called 'convnext_atom' .did you mean 'convnext_atto'"):
        Discriminator(replace(SMALL_D, feature_network="convnext_atom"), resolution=32)
    with pytest.raises(ConfigError, match="no four maps of images of 70 pixels .Input height .70. should be divisible"):
        Discriminator(replace(SMALL_D, feature_network="deit_tiny_patch16_224"), resolution=70)


def test_the_feature_network_takes_no_random_numbers_from_the_heads() -> None:
    heads = []
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite1"):
        heads.append({n: v for n, v in seeded(1, feature_network=name).state_dict().items() if ".pretrained." not in n})
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)


def test_weights_of_another_network_are_refused() -> None:
    weights = Discriminator(SMALL_D, resolution=32).feature_network.pretrained.state_dict()
    official = {f"feature_network.pretrained.{name}": value for name, value in weights.items()}
    Discriminator(SMALL_D, resolution=32, feature_weights=official)
    del weights["layer2.0.0.conv_pw.weight"]
    with pytest.raises(WeightsError, match="1 tensors do not fit, the first is layer2.0.0.conv_pw.weight; give timm's"):
        Discriminator(SMALL_D, resolution=32, feature_weights=weights)


def test_small_data_is_enlarged_to_224_unless_the_small_sibling_is_asked_for() -> None:
    with torch.device("meta"):
        official = Discriminator(DiscriminatorOptions(), resolution=64)
        assert official(torch.empty(1, 3, 64, 64)).shape == (1, 64)
        assert Discriminator(DiscriminatorOptions(), resolution=256)(torch.empty(1, 3, 256, 256)).shape == (1, 100)
    assert projection_sizes(64) == (32, 16, 8, 4)
    sibling = Discriminator(DiscriminatorOptions(interpolate_to=None, head_width=8), resolution=64).eval()
    x = numbers(2, 3, 64, 64)
    assert sibling(x).shape == (2, 25 + 25 + 25 + 1)
    assert [tuple(p.shape[-2:]) for p in sibling.feature_network(x)] == [(n, n) for n in projection_sizes(64)]


def test_too_many_heads_for_a_small_input_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_discs 4, but at 32 pixels it can have 1 to 3 heads"):
        Discriminator(DiscriminatorOptions(interpolate_to=None), resolution=32)


def test_a_conditional_discriminator_tells_classes_apart_and_needs_labels() -> None:
    net = Discriminator(SMALL_D, resolution=32, num_classes=3).eval()
    x = numbers(1, 3, 32, 32).expand(3, -1, -1, -1)
    logits = net(x, torch.eye(3))
    assert logits.shape == (3, 50)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs labels"):
        net(x)


def test_logits_and_state_of_the_discriminator_do_not_depend_on_chunks() -> None:
    outcomes = []
    for chunks in (1, 4):
        torch.manual_seed(0)
        net = Discriminator(SMALL_D, resolution=32).train()
        set_ghost_batch(net, 2)
        open_phase(net)
        logits = []
        for part in numbers(8, 3, 32, 32).chunk(chunks):
            next_chunk(net)
            logits.append(net(part))
        close_phase(net)
        outcomes.append((torch.cat(logits), net.state_dict()))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])


def test_augmentation_of_a_ghost_does_not_depend_on_its_company() -> None:
    x = numbers(8, 3, 16, 16)
    whole = diffaug.diff_augment(x, draws([0, 1, 2, 3]))
    parts = [diffaug.diff_augment(x[4:], draws([2, 3])), diffaug.diff_augment(x[:4], draws([0, 1]))]
    torch.testing.assert_close(torch.cat(parts[::-1]), whole)
    assert not torch.allclose(whole, diffaug.diff_augment(x, draws([4, 5, 6, 7])))
    assert torch.equal(diffaug.diff_augment(x, None), x)
    assert torch.equal(diffaug.diff_augment(x, draws([0, 1, 2, 3]), policy=""), x)


def test_an_unknown_augmentation_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="no policy 'colour'; choose among color, translation, cutout"):
        diffaug.diff_augment(numbers(2, 3, 8, 8), draws([0]), policy="colour")


def test_translation_and_cutout_equal_their_loops() -> None:
    x = numbers(4, 2, 10, 10)
    tx, ty = torch.tensor([-1, 0, 1, 3]), torch.tensor([2, -1, 0, -3])
    ox, oy = torch.tensor([0, 5, 9, 10]), torch.tensor([10, 0, 4, 9])
    moved, cut = torch.zeros_like(x), x.clone()
    for n in range(4):
        for i in range(10):
            for j in range(10):
                a, b = i + int(tx[n]), j + int(ty[n])
                if 0 <= a < 10 and 0 <= b < 10:
                    moved[n, :, i, j] = x[n, :, a, b]
        for i in range(2):  # a square of 2 pixels; what sticks out cuts the border
            for j in range(2):
                a, b = int(ox[n]) + i - 1, int(oy[n]) + j - 1
                cut[n, :, min(max(a, 0), 9), min(max(b, 0), 9)] = 0
    assert torch.equal(diffaug.translation(x, tx, ty), moved)
    assert torch.equal(diffaug.cutout(x, ox, oy), cut)


def test_draws_reach_both_ends_of_their_ranges_and_no_further() -> None:
    assert (diffaug.translation_limit(64), diffaug.cutout_size(64), diffaug.cutout_end(64)) == (8, 13, 64)
    assert (diffaug.cutout_size(10), diffaug.cutout_end(10)) == (2, 11)
    x = torch.ones(4000, 1, 8, 8)
    lit = diffaug.diff_augment(x, draws(list(range(40)), 100), policy="translation")[:, 0]
    for rows in (lit.amax(2), lit.amax(1)):  # shifts of one pixel up, none, one down (left, right) at 8 pixels
        assert {tuple(row.tolist()) for row in rows} == {(0.0, *[1.0] * 7), (1.0,) * 8, (*[1.0] * 7, 0.0)}
    cut = 1 - diffaug.diff_augment(x, draws(list(range(40)), 100), policy="cutout")[:, 0]
    assert {int(n) for n in cut.amax(2).sum(1).unique()} == {1, 2}


def test_augmentation_passes_gradients() -> None:
    x = numbers(4, 3, 8, 8).requires_grad_()
    diffaug.diff_augment(x, draws([0, 1])).square().sum().backward()
    assert (x.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_losses_at_hand_computed_logits() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-2.0, 1.0]])
    log = torch.log(1 + torch.exp(torch.tensor([-2.0, 0.0, 1.0, 2.0, -1.0])))
    expected = {
        "hinge": (0.5, 1.0, 0.5),
        "logistic": (float(log[:2].mean()), float((log[0] + log[2]) / 2), float((log[3] + log[4]) / 2)),
        "least-squares": (1.0, 2.5, 4.5),
        "wasserstein": (-1.0, -0.5, 0.5),
    }
    pair = float((torch.log(1 + torch.exp(torch.tensor(-4.0))) + torch.log(1 + torch.exp(torch.tensor(1.0)))) / 2)
    mirror = float((torch.log(1 + torch.exp(torch.tensor(4.0))) + torch.log(1 + torch.exp(torch.tensor(-1.0)))) / 2)
    expected["relativistic"] = (pair, mirror)
    assert set(ADVERSARIAL) == set(expected)
    for name, game in ADVERSARIAL.items():
        got = [*game.d(real, fake), game.g(fake, real)]
        assert [float(value) for value in got] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_step_against_each_loss_moves_logits_the_right_way(name: str) -> None:
    real, fake = torch.zeros(3, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    sum(ADVERSARIAL[name].d(real, fake)).backward()
    assert (real.grad < 0).all()
    if name != "least-squares":  # (D - 0)^2 is flat at 0
        assert (fake.grad > 0).all()
    fake.grad = None
    ADVERSARIAL[name].g(fake, real.detach()).backward()
    assert (fake.grad < 0).all()


def test_r1_is_the_mean_squared_gradient_norm_and_can_be_differentiated() -> None:
    x = numbers(3, 2, 4, 4).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    logits = (scale * x.square().sum(dim=(1, 2, 3)) / 2)[:, None].expand(-1, 5)  # gradient: scale * x
    penalty = gradient_penalty(x, logits)
    norms = [float((2 * sample).square().sum()) for sample in x.detach()]
    assert penalty.item() == pytest.approx(sum(norms) / 3, rel=1e-5)
    penalty.backward()
    assert scale.grad.item() == pytest.approx(penalty.item(), rel=1e-5)  # d/ds s^2 m = 2 s m = penalty at s = 2


@pytest.mark.parametrize("side", [(4, 4), (16, 16), (5, 60)])
def test_a_convolution_of_a_doubled_image_needs_no_doubled_image(side: tuple[int, int]):
    layer = UpConv2d(3, 4).double().eval()
    x = torch.randn(2, 3, *side).double().requires_grad_()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, padding=1)
    for ours in (conv_of_doubled(x, layer.weight), layer(x)):
        torch.testing.assert_close(ours, plain)
        slopes = [torch.autograd.grad(y.sin().sum(), (x, layer.weight_orig), retain_graph=True) for y in (ours, plain)]
        torch.testing.assert_close(*slopes)
