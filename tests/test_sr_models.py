"""Super-resolution networks are only useful while they are the published ones. Without this file a student could be
built from a network that official checkpoints do not fit, of another width than the paper's, or with noise of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, shared_dir
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.config.load import load_config
from sdtrain.contracts import Chunk
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.interop.architectures import recognise, require
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import Network, load_into, save_network
from sdtrain.interop.pth import export_student, save_pth
from sdtrain.interop.super_resolution import pad_growth_to_32
from sdtrain.models.gcfsr import networks as gcfsr
from sdtrain.models.gcfsr import options as gcfsr_options
from sdtrain.models.ghost import close_phase, next_chunk, open_phase
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.rrdbnet import options as rrdbnet_options
from sdtrain.models.srvgg import networks as srvgg
from sdtrain.models.srvgg import options as srvgg_options
from sdtrain.models.unet_sn import networks as unet_sn
from sdtrain.models.unet_sn import options as unet_sn_options
from sdtrain.restoration.inputs import Photos
from sdtrain.rng import Draws

sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402

SDAKD = GOLDEN / "sdakd"
PATTERNS = ["rrdbnet*", "srvgg*", "unet*", "gcfsr*", "stylegan2_d*", "*.pth", "pth*", "init*", "train_step*"]


def assert_golden(folder: Path, patterns: list[str]) -> None:
    lines = check.run(folder, patterns)
    assert check.bad(lines) == []
    assert sum(line.verdict == check.OK for line in lines) >= len(patterns)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_networks_files_and_three_training_steps_equal_the_official_numbers() -> None:
    assert_golden(SDAKD, PATTERNS)


def test_the_larger_official_networks_agree_too() -> None:
    folder = shared_dir("golden", "sdakd")
    assert_golden(folder, ["rrdbnet_x4.safetensors", "unet_disc_sn.safetensors", "gcfsr_g64.safetensors"])


@pytest.mark.parametrize(
    "C, num_g, num_d",
    [("1", 16697987, 4376897), ("1/2", 4178755, 1094817), (0.25, 1046819, 274001), ("1/8", 262771, 68649)],
)
def test_real_esrgan_has_the_published_sizes_at_every_width(C: str | float, num_g: int, num_d: int) -> None:
    with torch.device("meta"):
        options = rrdbnet_options.scaled(rrdbnet.GeneratorOptions(num_block=1), C)
        one, two = (rrdbnet.Generator(dataclasses.replace(options, num_block=n)) for n in (1, 2))
        D = unet_sn.Discriminator(unet_sn_options.scaled(unet_sn.DiscriminatorOptions(), C))
    # depth does not change with C, so a block more tells what 23 have
    assert count(one) + 22 * (count(two) - count(one)) == num_g
    assert len(one.state_dict()) + 22 * (len(two.state_dict()) - len(one.state_dict())) == 702
    assert count(D) == num_d


@pytest.mark.parametrize(
    "C, fixed, scaled, num_d",
    [("1", 66668706, 66668706, 29007905), ("1/2", 24790114, 16676450, 7253777), ("1/8", 4600210, 1045778, 454037)],
)
def test_gcfsr_has_the_published_sizes_at_every_width(C: str, fixed: int, scaled: int, num_d: int) -> None:
    with torch.device("meta"):
        for style, wanted in (("fixed", fixed), ("scaled", scaled)):
            G = gcfsr.Generator(gcfsr_options.scaled(gcfsr.GeneratorOptions(), C, style), resolution=1024)
            assert (count(G), len(G.state_dict())) == (wanted, 170)
        D = gcfsr.Discriminator(gcfsr_options.scaled(gcfsr.DiscriminatorOptions(), C), resolution=1024)
    assert count(D) == num_d


def test_growth_channels_stay_when_they_are_fixed() -> None:
    options = rrdbnet_options.scaled(rrdbnet.GeneratorOptions(), "1/4", growth="fixed")
    assert (options.num_feat, options.num_grow_ch, options.num_block) == (16, 32, 23)


def test_a_student_of_the_x2_network_keeps_twelve_inputs() -> None:
    net = rrdbnet.Generator(rrdbnet_options.scaled(rrdbnet.GeneratorOptions(scale=2, num_block=1), "1/8"))
    assert net.conv_first.weight.shape == (8, 12, 3, 3)
    assert srvgg_options.scaled(srvgg.GeneratorOptions(), "1/4").num_feat == 16


@pytest.mark.parametrize(
    "C, message",
    [
        ("1/128", r"C = 1/128 leaves num_grow_ch without channels \(32 \* 1/128 is less than 1\); use C >= 1/32"),
        ("zero", "C = 'zero' is not a number; write a fraction such as 1/4 or 0.25"),
        ("1/0", "C = '1/0' is not a number"),
        (0, r"C = 0 lies outside \(0, 1\]; a student keeps a part of its teacher's channels, e.g. 1/2"),
        (2, r"C = 2 lies outside \(0, 1\]"),
    ],
)
def test_a_fraction_that_leaves_nothing_is_refused(C: str | float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rrdbnet_options.scaled(rrdbnet.GeneratorOptions(), C)


def test_a_face_network_without_channels_is_refused() -> None:
    options = gcfsr_options.scaled(gcfsr.GeneratorOptions(), "1/64")
    with pytest.raises(
        ConfigError, match="narrow = 0.015625 leaves the 1024 px level of a 1024 px GCFSR without channels"
    ):
        gcfsr.Generator(options, resolution=1024)
    with pytest.raises(ConfigError, match="GCFSR has no 48 px network; use a power of two from 32 to 1024"):
        gcfsr.Discriminator(gcfsr.DiscriminatorOptions(), resolution=48)


def small_rrdb(**values: int) -> nn.Module:
    torch.manual_seed(0)
    return rrdbnet.Generator(rrdbnet.GeneratorOptions(**{"num_feat": 8, "num_grow_ch": 4, "num_block": 2, **values}))


def small_face(narrow: float = 1 / 64, style: int = 12) -> nn.Module:
    torch.manual_seed(0)
    net = gcfsr.Generator(gcfsr.GeneratorOptions(narrow=narrow, num_style_feat=style), resolution=32).eval()
    for layer in net.modules():
        if isinstance(layer, gcfsr.StyleConv):
            layer.weight.data.fill_(0.5)
    return net


def test_feature_layers_come_back_by_name_with_the_channels_they_announce() -> None:
    net, x = small_rrdb(), torch.rand(1, 3, 6, 5)
    out, maps = net(x, net.layer_names)
    assert torch.equal(out, net(x)) and tuple(maps) == (
        "conv_first",
        "body.0",
        "body.1",
        "conv_body",
        "trunk",
        "conv_hr",
    )
    assert all(value.shape[1] == net.layer_channels(name) for name, value in maps.items())
    assert maps["conv_hr"].shape[-2:] == (24, 20)
    face = small_face()
    _, maps = face(torch.rand(1, 3, 32, 32), 8, layers=face.layer_names)
    assert set(maps) == set(face.layer_names)
    assert all(value.shape[1] == face.layer_channels(name) for name, value in maps.items())
    assert torch.equal(maps["last_style_conv"], maps["style_conv.32"])


def test_a_feature_layer_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="there is no feature layer 'conv_9'; this network has conv_first, body.0"):
        small_rrdb()(torch.rand(1, 3, 4, 4), ("conv_9",))
    with pytest.raises(ConfigError, match="there is no feature layer 'trunk'"):
        small_face().layer_channels("trunk")


def test_teacher_and_student_share_noise_whatever_their_widths() -> None:
    draws = Draws(seed=1, step=2, ghosts=(4, 5), ghost_batch=2)
    wide, narrow = small_face(1 / 16), small_face(1 / 64)
    for a, b in zip(wide._noise(draws), narrow._noise(draws)):
        assert a.shape == b.shape and torch.equal(a, b)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(narrow(x, 8, draws), narrow(x, 8, draws))
    assert not torch.equal(narrow(x, 8, draws), narrow(x, 8, draws.sub("other")))
    assert not torch.equal(narrow(x, 8, draws), narrow(x, 8)), "without draws there is no noise"


def test_noise_belongs_to_the_ghost_however_the_batch_is_cut() -> None:
    draws, net = Draws(seed=1, step=2, ghosts=(0, 1), ghost_batch=1), small_face()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    parts = [net(x[i : i + 1], 16, draws.select((i,))) for i in range(2)]
    torch.testing.assert_close(net(x, 16, draws), torch.cat(parts))


def test_the_factor_is_a_condition_of_each_image() -> None:
    net, x = small_face(), torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)
    both = net(x, torch.tensor([4.0, 64.0]))
    torch.testing.assert_close(both[:1], net(x[:1], 4))
    assert not torch.allclose(both[0], both[1], atol=1e-4)


def test_the_blind_variant_ignores_the_factor_and_has_the_wide_code_path() -> None:
    net = gcfsr.Generator(gcfsr.GeneratorOptions(blind=True, narrow=1 / 64, num_style_feat=8), resolution=32)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(net(x, 4), net(x, 64))
    assert net.final_linear.weight.shape[1] == 16 * 8
    assert recognised(net).typed_options == net.options


def test_the_face_discriminator_judges_each_image_alone_and_the_stddev_one_does_not() -> None:
    x = torch.rand(4, 3, 32, 32)
    for group in (0, 4):
        torch.manual_seed(0)
        net = gcfsr.Discriminator(gcfsr.DiscriminatorOptions(narrow=1 / 32, stddev_group=group), resolution=32)
        alone = torch.cat([net(image[None]) for image in x])
        assert torch.allclose(net(x), alone, atol=1e-6) == (group == 0)
        net.ghost_batch = 2
        torch.testing.assert_close(net(x), torch.cat([net(x[:2]), net(x[2:])]))


def test_spectral_vectors_advance_once_a_pass_however_it_is_cut() -> None:
    x = torch.rand(4, 3, 16, 16)
    states = []
    for chunks in (1, 2):
        torch.manual_seed(0)
        net = unet_sn.Discriminator(unet_sn.DiscriminatorOptions(num_feat=4)).train()
        open_phase(net)
        for part in x.chunk(chunks):
            next_chunk(net)
            net(part), net(part)
        close_phase(net)
        states.append(net.state_dict())
    torch.manual_seed(0)
    official = unet_sn.Discriminator(unet_sn.DiscriminatorOptions(num_feat=4)).train()
    official(x), official(x)
    for name, value in official.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value)


def test_on_a_cpu_convolutions_get_channels_last_and_find_the_same() -> None:
    planes = torch.rand(2, 3, 16, 16)
    net = unet_sn.Discriminator(unet_sn.DiscriminatorOptions(num_feat=4)).eval()
    assert net.features(planes).is_contiguous(memory_format=torch.channels_last)
    G = small_rrdb().eval()
    seen: list[Tensor] = []
    G.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    draws = Draws(seed=0, step=0, ghosts=(0,), ghost_batch=2)
    chunk = Chunk(step=0, seen_img=0, real=planes, labels=None, draws=draws, inputs={"lq": planes})
    made = Photos(load_config("small/sdakd"), scale=4)(G, chunk, draws)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made, G(planes))


def test_sides_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"a x2 RRDBNet needs sides that are multiples of 2, got \(5, 4\)"):
        small_rrdb(scale=2)(torch.rand(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"needs sides that are multiples of 8, got \(12, 8\)"):
        unet_sn.Discriminator(unet_sn.DiscriminatorOptions(num_feat=2))(torch.rand(1, 3, 12, 8))
    with pytest.raises(ValueError, match=r"this GCFSR works at 32 x 32 px, got \(16, 16\)"):
        small_face()(torch.rand(1, 3, 16, 16), 4)


# files


def recognised(net: nn.Module) -> Network:
    return recognise(net.state_dict(), None, {})


def described(net: Any, **more: Any) -> Network:
    """A module as a network with all its options, as a run writes it."""
    state, options = net.state_dict(), dict(vars(net.options))
    kind, player = type(net).__module__.split(".")[-2], type(net).__name__
    return Network(kind=kind, player=player, role="G_ema", state=state, options=options, **more)


@pytest.mark.parametrize(
    "net",
    [
        small_rrdb(),
        small_rrdb(scale=2, num_feat=6),
        small_rrdb(scale=1),
        srvgg.Generator(srvgg.GeneratorOptions(num_feat=6, num_conv=3, upscale=3)),
        unet_sn.Discriminator(unet_sn.DiscriminatorOptions(num_feat=4)),
        small_face(),
        gcfsr.Generator(gcfsr.GeneratorOptions(narrow=1 / 64, channel_multiplier=1), resolution=64),
        gcfsr.Discriminator(gcfsr.DiscriminatorOptions(narrow=1 / 32, stddev_group=4), resolution=64),
    ],
    ids=lambda net: type(net).__module__.rsplit(".")[-1] + type(net).__name__,
)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_network_is_recognised_from_its_tensors_alone(net: nn.Module, form: str, tmp_path: Path) -> None:
    found = recognised(net)
    assert found.typed_options == net.options
    path = export_student(found, tmp_path / "net.pth") if form == "pth" else save_network(found, tmp_path / "net")
    path.with_suffix(".json").unlink()
    again = load_network(path).build()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_description_beside_the_file_has_the_last_word(tmp_path: Path) -> None:
    options = srvgg.GeneratorOptions(num_feat=4, num_conv=2, act_type="leakyrelu")
    net = srvgg.Generator(options)
    path = export_student(described(net), tmp_path / "a.pth")
    assert load_network(path).typed_options.act_type == "leakyrelu"
    path.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match="without PReLU does not say which activation it has; configure act_type"):
        load_network(path)
    path.with_suffix(".json").write_text(json.dumps({"kind": "nothing", "options": {"act_type": "leakyrelu"}}))
    with pytest.raises(WeightsError, match="a.json describes nothing, and the tensors are srvgg's; mend or delete it"):
        load_network(path)
    path.with_suffix(".json").write_text(json.dumps({"options": 3}))
    with pytest.raises(WeightsError, match="does not describe a network .*; mend or delete it"):
        load_network(path)


def test_a_section_of_a_configuration_serves_as_options(tmp_path: Path) -> None:
    from sdtrain.config.schema import role_class

    section = role_class("generator", "gcfsr")(kind="gcfsr", num_style_feat=64)
    options = gcfsr_options.scaled(section, "1/32", "scaled")
    net = gcfsr.Generator(options, resolution=32)
    require("t.pth", recognised(net), kind="gcfsr", options=options)
    found = described(net, resolution=32)
    assert "kind" in (found.options or {})
    assert load_network(save_network(found, tmp_path / "s")).typed_options.narrow == 1 / 32


def test_averaged_weights_are_preferred_and_the_other_kind_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    both = SDAKD / "RRDBNet_x2_nf8_params_and_ema.pth"
    average, raw = (load_network(both, prefer=key).state for key in ("params_ema", "params"))
    torch.testing.assert_close(average["conv_first.weight"], 0.99 * raw["conv_first.weight"])
    assert load_network(SDAKD / "UNetD_nf4_params.pth").state
    assert load_network(SDAKD / "RRDBNet_x4_nf8_params_ema.pth", prefer="params").state
    wrapped = {f"module.{name}": value for name, value in raw.items()}
    save_pth(wrapped, tmp_path / "wrapped.pth", None)
    assert load_network(tmp_path / "wrapped.pth").state.keys() == raw.keys()


def test_the_wrong_teacher_is_refused_naming_both_sides() -> None:
    x4 = SDAKD / "RRDBNet_x4_nf8_params_ema.pth"
    found, options = load_network(x4), rrdbnet.GeneratorOptions(num_feat=8, num_grow_ch=4, num_block=2)
    shown = r"RRDBNet generator \(scale 4, num_feat 8, num_block 2, num_grow_ch 4\)"
    require("t.pth", found, kind="rrdbnet", options=options)
    cases = {
        rf"t.pth holds a {shown}, but the configuration asks for scale 2; set scale: 4 or give another file": dict(
            options=dataclasses.replace(options, scale=2)
        ),
        rf"t.pth holds a {shown}, but the configuration asks for num_feat 64; set num_feat: 8": dict(
            options=dataclasses.replace(options, num_feat=64)
        ),
        rf"t.pth holds a {shown}, but the configuration asks for GCFSR; change one": dict(kind="gcfsr"),
        rf"t.pth holds a {shown}, but a discriminator is needed here; give the discriminator's file": dict(
            player="Discriminator"
        ),
    }
    for message, wanted in cases.items():
        with pytest.raises(WeightsError, match=message):
            require("t.pth", found, **wanted)
    D = load_network(SDAKD / "UNetD_nf4_params.pth")
    with pytest.raises(
        WeightsError,
        match=r"t.pth holds a UNetDiscriminatorSN discriminator \(num_feat 4\), but a generator is needed here; "
        "give the generator's file",
    ):
        require("t.pth", D)
    face = load_network(SDAKD / "GCFSR_32_narrow32_params_and_ema.pth")
    with pytest.raises(
        WeightsError, match=r"GCFSR generator \(32 px, .* but the configuration asks for 1024 px; change one"
    ):
        require("t.pth", face, resolution=1024)


def test_a_third_of_the_channels_is_the_same_network_when_read_back() -> None:
    options = gcfsr_options.scaled(gcfsr.GeneratorOptions(narrow=1 / 16, num_style_feat=8), "1/3")
    net = gcfsr.Generator(options, resolution=64)
    found = recognised(net)
    require("t.pth", found, options=options)
    again = found.build()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


def test_strict_loading_names_what_differs() -> None:
    net, state = small_rrdb(), small_rrdb(num_block=1, num_feat=6).state_dict()
    state["extra"] = torch.zeros(1)
    with pytest.raises(
        WeightsError,
        match=r"t.pth does not fit the network: it lacks body.1.rdb1.conv1.weight; .* and \d+ more; use the",
    ):
        load_into(net, state, "t.pth")
    fitting = {**net.state_dict(), "conv_last.bias": torch.zeros(4)}
    with pytest.raises(WeightsError, match=r"it has conv_last.bias \[4\], the network \[3\];"):
        load_into(net, fitting, "t.pth")


class Runs:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "cut.pth").write_bytes((SDAKD / "UNetD_nf4_params.pth").read_bytes()[:9000])
    torch.save({"params": Runs()}, tmp_path / "code.pth")
    torch.save({"epoch": 3, "iter": 5}, tmp_path / "state.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    messages = {
        "absent.pth": r"absent.pth: cannot be read \(No such file or directory\); give an existing file",
        "cut.pth": "cut.pth: .*nothing of the file was run, use a file from a source you trust",
        "code.pth": "code.pth: wants the global .__builtin__.print., which no known checkpoint needs; nothing of",
        "state.pth": "holds no weights; its top level has epoch, iter, where params_ema or params is expected",
        "list.pth": "holds a list, where networks are expected; give a checkpoint",
        "other.safetensors": "other.safetensors holds no network known here .*; its first tensors are w",
    }
    for name, message in messages.items():
        with pytest.raises(WeightsError, match=message):
            load_network(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("grow", [2, 5, 32])
def test_padding_growth_to_32_changes_no_output(grow: int) -> None:
    net, x = small_rrdb(num_grow_ch=grow).eval(), torch.rand(1, 3, 9, 7)
    for value in net.parameters():
        value.data.normal_(0, 0.1)
    padded = pad_growth_to_32(net.state_dict())
    wide = recognise(padded, None, {})
    assert wide.typed_options.num_grow_ch == 32
    again = wide.build().eval()
    again.load_state_dict(padded)
    y = net(x).detach()
    torch.testing.assert_close(again(x).detach(), y, rtol=0, atol=1e-6 * float(y.abs().max()))


def test_a_padded_student_opens_in_spandrel(tmp_path: Path) -> None:
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed")
    net, x = small_rrdb().eval(), torch.rand(1, 3, 8, 8)
    path = export_student(recognised(net), tmp_path / "s.pth", "spandrel")
    opened = spandrel.ModelLoader().load_from_file(str(path))
    assert (opened.architecture.id, opened.scale) == ("ESRGAN", 4)
    torch.testing.assert_close(opened(x), net(x).clamp(0, 1), rtol=0, atol=2e-7)


def test_a_network_no_other_tool_knows_is_not_written_for_them(tmp_path: Path) -> None:
    net = small_face()
    with pytest.raises(WeightsError, match="opens in no other tool; export it as pth or safetensors"):
        export_student(recognised(net), tmp_path / "s.pth", "spandrel")
    assert not list(tmp_path.iterdir())
