"""Exchange with official checkpoints: without these tests weights could change on the way in or out, or be misread."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, run_python
from torch import Tensor, nn

from sdtrain.cli import main
from sdtrain.commands.exporting import export
from sdtrain.commands.importing import import_file
from sdtrain.errors import WeightsError
from sdtrain.interop.architectures import recognise
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import Network, save_network
from sdtrain.interop.official import read_official
from sdtrain.models.fastgan import networks as fastgan
from sdtrain.models.projected import networks as projected
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.stylegan2 import networks as stylegan2
from sdtrain.models.stylenat import networks as stylenat

SDGAN = GOLDEN / "sdgan"
STYLENAT = stylenat.GeneratorOptions(
    style_dim=16, mlp_layers=2, channel_max=32, min_heads=2, kernels=((3,),) * 4, dilations=((1,), (1,), (1, 2), (1, 4))
)


def made(kind: str) -> tuple[nn.Module, object, int | None]:
    """A small network, its options and resolution."""
    torch.manual_seed(0)
    makers = {
        "stylegan2 G": lambda: (stylegan2.Generator, stylegan2.GeneratorOptions(
            z_dim=8, w_dim=12, mapping_layers=3, channel_base=256, channel_max=16), 32),
        "stylegan2 D": lambda: (stylegan2.Discriminator, stylegan2.DiscriminatorOptions(
            architecture="skip", channel_base=256, channel_max=16), 32),
        "fastgan G": lambda: (fastgan.Generator, fastgan.GeneratorOptions(z_dim=8, ngf=4), 128),
        "fastgan lite 256 G": lambda: (fastgan.Generator, fastgan.GeneratorOptions(z_dim=8, ngf=4, lite=True), 256),
        "fastgan of own norms G": lambda: (
            fastgan.Generator,
            fastgan.GeneratorOptions(z_dim=8, ngf=4, lite=True, own_norms=3),
            64,
        ),
        "fastgan 64 G": lambda: (fastgan.Generator, fastgan.GeneratorOptions(z_dim=8, ngf=4), 64),
        "projected D": lambda: (projected.Discriminator, projected.DiscriminatorOptions(
            separable=True, patch=True, num_discs=2), 256),
        "stylenat G": lambda: (stylenat.Generator, STYLENAT, 32),
        "stylenat D": lambda: (stylenat.Discriminator, stylenat.DiscriminatorOptions(channel_max=16), 32),
    }  # fmt: skip
    cls, options, resolution = makers[kind]()
    return cls(options, resolution=resolution), options, resolution


KINDS = [
    "stylegan2 G", "stylegan2 D", "fastgan G", "fastgan lite 256 G", "fastgan of own norms G", "fastgan 64 G",
    "projected D", "stylenat G", "stylenat D",
]  # fmt: skip


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_golden_snapshots_and_containers_are_read_exactly():
    sys.path.insert(0, str(GOLDEN))
    import check

    lines = check.run(SDGAN, ["*_snapshot*", "snat_container_*", "evil_*"])
    assert len(lines) > 35
    assert all(line.verdict == check.OK for line in lines), "\n".join(map(str, lines))


def test_import_writes_every_network_with_a_card_and_export_returns_the_same_bytes(tmp_path):
    list(import_file(SDGAN / "sg2_snapshot.pkl", tmp_path / "in"))
    card = json.loads((tmp_path / "in" / "G_ema.json").read_text())
    assert {"kind", "player", "role", "options", "resolution", "num_classes", "source"} <= card.keys()
    assert card["source"]["file"] == "sg2_snapshot.pkl" and len(card["source"]["sha256"]) == 64
    assert (card["resolution"], card["num_classes"], card["options"]["mapping_layers"]) == (16, 4, 2)
    assert json.loads((tmp_path / "in" / "import.json").read_text())["ada_p"] == 0.3125
    for role in ("G", "D", "G_ema"):
        assert main(["export", str(tmp_path / "in"), "--role", role, "--out", str(tmp_path / f"{role}.pt")]) == 0
        assert main(["import", str(tmp_path / f"{role}.pt"), "--out", str(tmp_path / "again"), "--role", role]) == 0
        first, second = ((tmp_path / folder / f"{role}.safetensors").read_bytes() for folder in ("in", "again"))
        assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_official_file_says_its_own_architecture(kind, tmp_path):
    net, options, resolution = made(kind)
    torch.save(net.state_dict(), tmp_path / "flat.pt")
    network = read_official(tmp_path / "flat.pt").networks[("D" if kind.endswith("D") else "G_ema")]
    assert network.note is None and network.kind == type(net).__module__.split(".")[-2]
    assert same(network.state, net.state_dict())
    assert same(network.build().state_dict(), net.state_dict())
    if kind != "projected D":
        assert network.resolution == resolution
    wanted = asdict(options)
    for name, value in (network.options or {}).items():
        if name not in ("channel_base", "channel_multiplier", "min_heads"):  # several values give the same widths
            assert json.dumps(value) == json.dumps(wanted[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_flat_tensors_that_load_strictly(kind, tmp_path):
    net, options, resolution = made(kind)
    role = "D" if kind.endswith("D") else "G_ema"
    network = recognise(net.state_dict(), role, {"file": "x"}, options=asdict(options), resolution=resolution)
    path = export(network, tmp_path / "out")
    state = torch.load(path, weights_only=True)
    assert path.suffix == ".pt" and all(isinstance(value, Tensor) for value in state.values())
    net.load_state_dict(state, strict=True)
    back = load_network(path)
    assert {**back.card, "source": None} == {**network.card, "source": None}
    assert back.source["origin"] == network.source


def test_a_released_stylenat_file_becomes_the_current_layout_and_goes_back(tmp_path):
    net, options, _ = made("stylenat G")
    legacy = stylenat.to_legacy(net.state_dict())
    tensors = {"g": legacy, "d": made("stylenat D")[0].state_dict(), "g_ema": legacy}
    torch.save({**tensors, "g_optim": {}, "d_optim": {}, "args": Namespace(size=32)}, tmp_path / "old.pt")
    torch.save({"args": {"runs": {"size": 32}}, "state_dicts": tensors, "lr_dicts": {}}, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        found = read_official(tmp_path / name)
        assert sorted(found.networks) == ["D", "G", "G_ema"] and found.networks["D"].note is None
        assert same(found.networks["G_ema"].state, net.state_dict())
        z = torch.randn(2, 16)
        assert torch.equal(found.networks["G_ema"].build()(z), net.eval()(z))
    back = export(found.networks["G_ema"], tmp_path / "back.pt", layout="legacy")
    assert same(torch.load(back, weights_only=True), legacy)


def test_dilations_that_the_file_does_not_say_come_from_its_arguments_or_are_asked_for(tmp_path):
    dilations = [[1], [1], [1, 2, 1], [1, 2, 4]]
    options = stylenat.GeneratorOptions(**{**asdict(STYLENAT), "min_heads": 4, "dilations": dilations})
    state = stylenat.Generator(options, resolution=32).state_dict()
    torch.save({"state_dicts": {"g_ema": state}, "args": {"model": {"dilations": dilations}}}, tmp_path / "says.pt")
    assert load_network(tmp_path / "says.pt").options["dilations"] == dilations
    torch.save({"state_dicts": {"g_ema": state}}, tmp_path / "silent.pt")
    with pytest.raises(WeightsError, match=r"does not say the dilations of levels \[2, 3\]"):
        load_network(tmp_path / "silent.pt")
    assert load_network(tmp_path / "silent.pt", dilations=dilations).options["dilations"] == dilations
    out = str(tmp_path / "out")
    assert (
        main(["import", str(tmp_path / "silent.pt"), "--out", out, "--set", f"dilations={json.dumps(dilations)}"]) == 0
    )


def test_a_run_folder_is_exported_by_its_best_weights_and_its_config(tmp_path):
    net, options, _ = made("stylegan2 G")
    network = Network(kind="stylegan2", player="Generator", role="G_ema", state=net.state_dict(), resolution=32)
    save_network(network, tmp_path / "run" / "best" / "G_ema")
    (tmp_path / "run" / "best" / "G_ema.json").unlink()
    path = tmp_path / "G.safetensors"
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(path)]) == 0
    back = load_network(path)
    assert back.options["mapping_layers"] == options.mapping_layers and same(
        back.build().state_dict(), net.state_dict()
    )
    with pytest.raises(WeightsError, match="holds no D.safetensors"):
        load_network(tmp_path / "run", "D")


def test_a_super_resolution_student_goes_to_other_tools(tmp_path):
    options = rrdbnet.GeneratorOptions(num_feat=8, num_block=1, num_grow_ch=4)
    net = rrdbnet.Generator(options)
    torch.save({"params_ema": net.state_dict()}, tmp_path / "student.pth")
    list(import_file(tmp_path / "student.pth", tmp_path / "in"))
    network = load_network(tmp_path / "in")
    assert network.kind == "rrdbnet" and same(network.state, net.state_dict())
    official = export(network, tmp_path / "official.pth")
    assert same(torch.load(official, weights_only=True)["params_ema"], net.state_dict())
    wide = export(network, tmp_path / "wide.pth", "spandrel")
    assert torch.load(wide, weights_only=True)["params_ema"]["body.0.rdb1.conv1.weight"].shape[0] == 32
    gan = recognise(made("stylegan2 G")[0].state_dict(), None, {})
    with pytest.raises(WeightsError, match="for super-resolution networks, this is stylegan2"):
        export(gan, tmp_path / "x.pth", "spandrel")


def test_a_discriminator_without_its_frozen_part_is_not_official(tmp_path):
    net, _, _ = made("projected D")
    trained = {name: value for name, value in net.state_dict().items() if ".pretrained." not in name}
    network = recognise(trained, "D", {"file": "D.safetensors"})
    with pytest.raises(WeightsError, match="leaves out the frozen feature_network.pretrained, which"):
        export(network, tmp_path / "D.pt")


def test_a_network_that_does_not_fit_names_tensors_and_shapes():
    net, _, _ = made("stylegan2 G")
    network = recognise(net.state_dict(), None, {"file": "G.pt"})
    smaller = Network(**{**vars(network), "options": {**network.options, "channel_max": 8}})
    with pytest.raises(WeightsError, match=r"has synthesis.b4.const \[16, 4, 4\], the network \[8, 4, 4\]"):
        smaller.build()
    with_classes = Network(**{**vars(network), "num_classes": 3})
    with pytest.raises(WeightsError, match="lacks mapping.embed.weight"):
        with_classes.build()


@pytest.mark.parametrize(
    "kind, player",
    [
        ("../../x", "Generator"),
        ("os", "system"),
        ("..errors", "Generator"),
        ("ghost", "Generator"),
        ("stylegan2", "importlib"),
    ],
)
def test_a_card_can_name_nothing_but_networks_of_this_package(kind, player, tmp_path):
    network = recognise(made("stylegan2 G")[0].state_dict(), None, {})
    path = save_network(network, tmp_path / "G")
    path.with_suffix(".json").write_text(json.dumps({**network.card, "kind": kind, "player": player}))
    with pytest.raises(WeightsError, match="the card names the|kind, player, role and file are no names"):
        load_network(path).build()


@pytest.mark.parametrize("make, message", [
    (lambda p: (p / "a.pt").write_bytes(b"PK\x03\x04 broken"), "damaged zip"),
    (lambda p: torch.save({"weights": {"a": torch.ones(1)}}, p / "a.pt"), "holds no weights; its top level"),
    (lambda p: torch.save({"a": torch.ones(1)}, p / "a.pt"), "holds no network known here"),
    (lambda p: torch.save([1, 2], p / "a.pt"), "holds a list, where networks are expected"),
    (lambda p: None, "cannot be read"),
])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_a_sentence_and_exit_code_2(make, message, tmp_path, capsys):
    make(tmp_path)
    assert main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_prints_globals_arguments_and_tensors(capsys):
    assert main(["import", str(SDGAN / "sg2_snapshot.pkl"), "--inspect"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "torch_utils.persistence._reconstruct_persistent_obj",
        '"mapping_kwargs": {"num_layers": 2}',
        "[16, 4, 4]",
    ):
        assert part in shown
    assert main(["import", str(SDGAN / "snat_container_old.pt"), "--inspect"]) == 0
    assert "argparse.Namespace" in capsys.readouterr().out


def test_inspect_reads_what_a_run_has_written(tmp_path, capsys):
    list(import_file(SDGAN / "sg2_snapshot.pkl", tmp_path))
    assert main(["import", str(tmp_path / "G_ema.safetensors"), "--inspect"]) == 0
    of_file = capsys.readouterr().out
    assert "safetensors, which holds no code" in of_file and "network     G_ema stylegan2 generator" in of_file
    assert main(["import", str(tmp_path), "--inspect"]) == 0
    assert capsys.readouterr().out == of_file


def test_both_commands_explain_themselves_without_torch():
    code = "import sys, sdtrain.commands.importing, sdtrain.commands.exporting; assert 'torch' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_wrong_role_and_missing_out_are_sentences(tmp_path, capsys):
    assert main(["import", str(SDGAN / "sg2_snapshot.pkl")]) == 2
    assert "needs --out" in capsys.readouterr().err
    list(import_file(SDGAN / "sg2_snapshot.pkl", tmp_path, ["D"]))
    with pytest.raises(WeightsError, match="holds D, where G is wanted"):
        load_network(tmp_path / "D.safetensors", "G")
    assert main(["import", str(SDGAN / "sg2_snapshot.pkl"), "--out", str(tmp_path), "--set", "x=y"]) == 2
    assert "give KEY=VALUE with a JSON value" in capsys.readouterr().err


MISLEADING = [
    ("official", "x.pkl", "a state dict under the official names, without pickled classes", "x.pt"),
    ("official", "x.safetensors", "a state dict under the official names, without pickled classes", "x.pt"),
    ("safetensors", "x.pth", "plain tensors with a card beside them", "x.safetensors"),
    ("onnx", "x.pt", "a graph", "x.onnx"),
]


@pytest.mark.parametrize(("form", "name", "content", "better"), MISLEADING)
def test_an_ending_that_misleads_is_refused_before_the_network_is_read(form, name, content, better, tmp_path, capsys):
    source, out = str(tmp_path / "absent.pkl"), tmp_path / name
    assert main(["export", source, "--format", form, "--out", str(out)]) == 2
    said = f"--out {name}: format {form} writes {content}, which {out.suffix} does not say; name it {better}"
    assert capsys.readouterr().err.strip() == f"sdtrain: {said}"


def test_an_export_says_what_it_wrote_and_where_it_cannot_write(tmp_path, capsys):
    snapshot = str(SDGAN / "sg2_snapshot.pkl")
    assert main(["export", snapshot, "--out", str(tmp_path / "face-v1.5")]) == 0
    said = capsys.readouterr().out.strip()
    content = "a state dict under the official names, without pickled classes"
    assert said == f"{tmp_path}/face-v1.5.pt: G_ema of {snapshot} as official, {content}"
    assert (tmp_path / "face-v1.5.pt").is_file()
    assert main(["export", "absent.pkl", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is a folder; name a file in it" in capsys.readouterr().err
    assert main(["export", "absent.pkl", "--out", str(tmp_path / "face-v1.5.pt" / "x.pt")]) == 2
    assert "cannot be written (Not a directory); choose another place" in capsys.readouterr().err


def test_onnx_without_its_packages_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    network = recognise(made("stylegan2 G")[0].state_dict(), None, {})
    with pytest.raises(ValueError, match="needs the packages onnx and onnxscript"):
        export(network, tmp_path / "G.onnx", "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stylegan2 G", "stylenat G", "rrdbnet"])
def test_onnx_agrees_with_the_network_at_another_batch_size(kind, tmp_path: Path, capsys):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if kind == "rrdbnet":
        net: nn.Module = rrdbnet.Generator(rrdbnet.GeneratorOptions(num_feat=8, num_block=1, num_grow_ch=4))
    else:
        net = made(kind)[0]
    export(recognise(net.state_dict(), None, {}), tmp_path / "G.onnx", "onnx")
    assert "onnxruntime agrees" in capsys.readouterr().out
