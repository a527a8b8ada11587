"""R3GAN: without these tests its networks could drift from the official ones, R1 and R2 could cost hundreds of small
convolutions a layer or differentiate wrongly, and its released files could be misread.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.augment.ada import AdaPipe, preset
from sdtrain.cli import main
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import as_tuples
from sdtrain.interop.official import read_official
from sdtrain.interop.safe_pickle import class_token
from sdtrain.losses.adversarial import gradient_penalty, relativistic_d, relativistic_g
from sdtrain.models.r3gan.grouped import grouped_conv2d, grouped_spread2d
from sdtrain.models.r3gan.networks import Discriminator, DiscriminatorOptions, Generator, GeneratorOptions
from sdtrain.rng import Draws

R3GAN = GOLDEN / "r3gan"
STAGES = {"widths": (12, 8, 8), "groups": (3, 4, 2), "blocks": (2, 1, 1)}  # 16 px


def generator(num_classes: int = 0, **changes: object) -> Generator:
    options = GeneratorOptions(**{**STAGES, "z_dim": 6, "embed_dim": 5, **changes})
    return awake(Generator(options, resolution=16, num_classes=num_classes))


def discriminator(num_classes: int = 0, **changes: object) -> Discriminator:
    options = DiscriminatorOptions(**{**STAGES, **changes})
    return awake(Discriminator(options, resolution=16, num_classes=num_classes))


def awake(net: nn.Module) -> nn.Module:
    """Weights that all matter: fresh blocks are the identity."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3, generator=g)
    return net


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_hot(n: int, classes: int) -> Tensor:
    return F.one_hot(torch.arange(n) % classes, classes).float()


def checked(*patterns: str) -> None:
    sys.path.insert(0, str(GOLDEN))
    import check

    lines = check.run(R3GAN, patterns)
    assert len(lines) >= len(patterns)
    assert all(line.verdict == check.OK for line in lines), "\n".join(map(str, lines))


def test_layers_and_networks_equal_the_official_ones():
    checked("r3_units*", "r3_D.*", "r3_big*", "keys_*", "init_std_*", "presets.json")


def test_both_losses_and_their_gradients_equal_the_official_ones_with_and_without_augmentation():
    checked("r3_step.*", "r3_step_aug.*")


def test_three_iterations_with_moving_rate_beta2_gamma_and_half_life_equal_the_official_loop():
    checked("r3_train.*", "schedules.json")


def test_snapshots_of_both_generations_of_names_are_read_exactly():
    checked("r3_snapshot*")


@pytest.mark.parametrize("classes", [0, 3])
def test_networks_are_called_like_all_others(classes: int):
    G, D = generator(classes), discriminator(classes)
    z, c = randn(4, G.z_dim), one_hot(4, classes) if classes else None
    draws = Draws(seed=0, step=0, ghosts=(0, 1), ghost_batch=2)
    images = G(z, c, draws)
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert D(images, c).shape == (4,)
    if classes:
        assert not torch.allclose(D(images, c), D(images, c.roll(1, 0)))
    else:
        assert torch.equal(G(z, torch.zeros(4, 0)), images), "an empty label says nothing"


@pytest.mark.parametrize("classes", [0, 3])
def test_a_sample_is_the_same_alone_and_among_others(classes: int):
    G, D = generator(classes), discriminator(classes)
    z, c = randn(4, 6), one_hot(4, classes) if classes else [None] * 4
    images = G(z, c if classes else None)
    logits = D(images, c if classes else None)
    for i in range(4):
        label = c[i : i + 1] if classes else None
        torch.testing.assert_close(G(z[i : i + 1], label), images[i : i + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(D(images[i : i + 1], label), logits[i : i + 1], rtol=1e-4, atol=1e-4)


def test_a_fresh_block_is_the_identity():
    net = Discriminator(DiscriminatorOptions(**STAGES), resolution=16)
    x = randn(2, 12, 4, 4)
    for block in net.Model["MainLayers"][-1].Layers[:2]:
        assert torch.equal(block(x), x)


def test_the_highest_resolutions_run_in_bfloat16_and_results_are_float32():
    G, D = generator(num_low_precision_res=2), discriminator(num_low_precision_res=2)
    formats: dict[str, list[torch.dtype]] = {"G": [], "D": []}
    for name, net in (("G", G), ("D", D)):
        for stage in net.Model["MainLayers"]:
            stage.register_forward_hook(lambda m, a, out, to=formats[name]: to.append(out.dtype))
    images = G(randn(2, 6))
    logits = D(images)
    low, full = torch.bfloat16, torch.float32
    assert formats == {"G": [full, low, low], "D": [low, low, full]}
    assert images.dtype == logits.dtype == full
    logits.sum().backward()
    assert {p.grad.dtype for p in (*G.parameters(), *D.parameters())} == {full}
    torch.testing.assert_close(images, generator()(randn(2, 6)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("stride, padding, groups", [(1, 1, 1), (1, 1, 3), (2, 1, 6), (1, 0, 2)])
def test_grouped_convolutions_equal_torch_to_the_third_derivative(stride: int, padding: int, groups: int):
    how = {"stride": stride, "padding": padding, "groups": groups}
    x, w = randn(2, 6, 8, 8).double(), randn(6, 6 // groups, 4, 4, seed=1).double()
    y = F.conv2d(x, w, **how)
    for own, torchs, inputs in ((grouped_conv2d, F.conv2d, x), (grouped_spread2d, F.conv_transpose2d, y)):
        for a, b in zip(*(derivatives(f, inputs, w, how) for f in (own, torchs))):
            torch.testing.assert_close(a, b)


def derivatives(function, x: Tensor, w: Tensor, how: dict) -> list[Tensor]:
    """The value, and the gradients to x and w of squared norms of gradients, three orders deep."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    found = [function(x, w, **how)]
    scalar = found[0].sin().sum()
    for _ in range(3):
        slopes = torch.autograd.grad(scalar, (x, w), create_graph=True)
        scalar = sum(slope.sin().sum() for slope in slopes)
        found += slopes
    return found


class Calls(TorchDispatchMode):
    """Counts the operations that run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_penalty_costs_the_same_calls_whatever_the_number_of_groups():
    def calls(groups: int) -> int:
        net = discriminator(widths=(16,) * 3, groups=(groups,) * 3)
        x = randn(2, 3, 16, 16).requires_grad_()
        with Calls() as calls:
            gradient_penalty(x, net(x)).backward()
        return calls.count

    assert calls(16) == calls(2)


def test_a_penalty_can_be_sent_back_outside_the_autocast_it_was_formed_in():
    slopes = []
    for enabled in (False, True):
        D, x = discriminator(), randn(2, 3, 16, 16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            penalty = gradient_penalty(x, D(x))
        penalty.backward()
        slopes.append(D.Model["ExtractionLayer"].Layer.weight.grad)
    torch.testing.assert_close(*slopes, rtol=0.2, atol=0.1 * float(slopes[0].abs().max()))


def test_the_discriminator_loss_is_the_loop_over_pairs():
    real, fake = randn(5), randn(5, seed=1)
    loop = sum(torch.log1p(torch.exp(fake[i] - real[i])) for i in range(5)) / 5
    torch.testing.assert_close(relativistic_d(real, fake)[0], loop)
    assert not torch.isclose(relativistic_d(real.flip(0), fake)[0], loop), "the order of the pairs matters"
    assert torch.isfinite(relativistic_d(torch.tensor([-1e4]), torch.tensor([1e4]))[0])


def test_the_generator_loss_is_the_loop_over_the_same_pairs_turned_round():
    real, fake = randn(5), randn(5, seed=1)
    loop = sum(torch.log1p(torch.exp(real[i] - fake[i])) for i in range(5)) / 5
    torch.testing.assert_close(relativistic_g(fake, real), loop)


def test_r1_serves_both_penalties_at_the_images_before_augmentation():
    """Of the raw logits, summed over the pixels: of a linear critic |w|^2, also through a linear augmentation."""
    w, x = randn(3, 4, 4), randn(2, 3, 4, 4).requires_grad_()
    torch.testing.assert_close(gradient_penalty(x, (x * w).sum((1, 2, 3))), w.square().sum())
    torch.testing.assert_close(gradient_penalty(x, (2 * x * w).sum((1, 2, 3))), 4 * w.square().sum())


def test_the_augmentation_changes_colours_half_as_often_and_never_filters():
    options = preset("r3gan")
    assert {options.xflip, options.rotate90, options.xint, options.scale, options.rotate} == {1.0}
    assert {options.aniso, options.xfrac, options.cutout} == {1.0}
    assert {options.brightness, options.contrast, options.lumaflip, options.hue, options.saturation} == {0.5}
    assert options.imgfilter == options.noise == 0.0


def test_a_second_derivative_passes_through_the_augmentation():
    pipe, D = AdaPipe("r3gan"), discriminator()
    draws = Draws(seed=3, step=0, ghosts=(0,), ghost_batch=4)
    x = randn(4, 3, 16, 16).requires_grad_()
    gradient_penalty(x, D(pipe(x, 0.8, draws))).backward()
    assert float(D.Model["ExtractionLayer"].Layer.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "resolution, changes, message",
    [
        (48, {}, "resolution 48: R3GAN needs a power of two from 4 upwards"),
        (
            32,
            {},
            r"widths \[12, 8, 8\]: resolution 32 has 4 stages \(4, 8, 16, 32\); give 4 positive numbers, 4x4 first",
        ),
        (16, {"blocks": (1, 0, 1)}, r"blocks \[1, 0, 1\]: .* give 3 positive numbers"),
        (16, {"groups": (3, 4, 5)}, "groups 5 at 16 px: 8 x expansion 2 channels do not divide by it"),
        (16, {"num_low_precision_res": 4}, "num_low_precision_res 4: resolution 16 has 0 to 3 such stages"),
    ],
)
def test_stages_that_do_not_fit_the_resolution_are_refused(resolution: int, changes: dict, message: str):
    for net, options in ((Generator, GeneratorOptions), (Discriminator, DiscriminatorOptions)):
        with pytest.raises(ConfigError, match=message):
            net(options(**{**STAGES, **changes}), resolution=resolution)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("build, role", [(generator, "G_ema"), (discriminator, "D")])
def test_a_flat_file_says_its_own_architecture_and_comes_back_bit_equal(build, role: str, classes: int, tmp_path):
    net = build(classes)
    torch.save(net.state_dict(), tmp_path / "flat.pt")
    assert main(["import", str(tmp_path / "flat.pt"), "--out", str(tmp_path / "in")]) == 0
    assert main(["export", str(tmp_path / "in"), "--role", role, "--out", str(tmp_path / "back.pt")]) == 0
    network = load_network(tmp_path / "back.pt")
    assert (network.kind, network.resolution, network.num_classes) == ("r3gan", 16, classes)
    said = type(net.options)(**as_tuples(network.options))
    embed_dim = {("G_ema", 3): 5, ("D", 3): 12}.get((role, classes), said.embed_dim)  # without classes it is unsaid
    assert said == replace(net.options, embed_dim=embed_dim)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())


def test_a_snapshot_is_inspected_without_running_anything(capsys):
    assert main(["import", "--inspect", str(R3GAN / "r3_snapshot_legacy.pkl")]) == 0
    said = capsys.readouterr().out
    assert "what        R3GAN snapshot" in said
    assert "network     G_ema r3gan generator 8 px, 5 classes" in said
    assert "class       training.networks_baseline.Generator" in said


def test_a_snapshot_says_its_number_formats_and_may_be_read_in_another():
    networks = read_official(R3GAN / "r3_snapshot.pkl").networks
    assert {network.options["num_low_precision_res"] for network in networks.values()} == {1}
    full = read_official(R3GAN / "r3_snapshot.pkl", num_low_precision_res=0).networks
    assert {network.options["num_low_precision_res"] for network in full.values()} == {0}


def test_a_file_that_only_begins_like_the_network_is_one_sentence(tmp_path):
    torch.save({"Model.AggregationLayer.Layer.weight": torch.zeros(3, 8, 1, 1)}, tmp_path / "cut.pt")
    with pytest.raises(WeightsError, match="begins like R3GAN has no residual blocks; the file is damaged"):
        load_network(tmp_path / "cut.pt")


@pytest.mark.parametrize("harm", ["lost", "flat", "empty"])
def test_a_file_with_a_harmed_weight_is_one_sentence(harm: str, tmp_path):
    state = generator().state_dict()
    name = "Model.MainLayers.1.Layers.1.LinearLayer2.Layer.weight"
    weight = state.pop(name)
    state |= {"lost": {}, "flat": {name: weight.flatten()}, "empty": {name: weight[:, :0]}}[harm]
    torch.save(state, tmp_path / "harmed.pt")
    with pytest.raises(WeightsError, match=f"has no usable {name}; the file is damaged"):
        load_network(tmp_path / "harmed.pt")


def test_only_known_classes_of_its_modules_become_records():
    assert class_token("R3GAN.Networks.ResidualBlock") and class_token(
        "BaselineGAN.Resamplers.InterpolativeUpsamplerCUDA"
    )
    assert class_token("R3GAN.Trainer.AdversarialTraining") is None
    assert class_token("training.training_loop.training_loop") is None
