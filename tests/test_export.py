"""`sdtrain export --to` gives away what people will load elsewhere. Without these tests a file could differ from the
network that was trained, a card could show code that does not run, or a failed export could look like a whole one.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from tiny import make_shards
from torch import Tensor, nn

from sdtrain.cli import main
from sdtrain.commands import push
from sdtrain.files import sha256_of_file
from sdtrain.interop.network import Network, save_network
from sdtrain.interop.official import read_official
from sdtrain.interop.pickle_machine import Record
from sdtrain.interop.safe_pickle import read_checkpoint
from sdtrain.models.fastgan import networks as fastgan
from sdtrain.models.gcfsr import networks as gcfsr
from sdtrain.models.ghost import settle_spectral_norms
from sdtrain.models.r3gan import networks as r3gan
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.rrdbnet.options import scaled
from sdtrain.models.srvgg import networks as srvgg
from sdtrain.models.stylegan2 import networks as stylegan2
from sdtrain.models.stylenat import networks as stylenat
from sdtrain.release.forms import Release
from sdtrain.release.outward import Outward, in_order, input_name
from sdtrain.release.pictures import spread
from sdtrain.release.snapshot import snapshot_bytes
from sdtrain.rng import Draws

for needed in ("onnx", "onnxscript", "onnxruntime", "spandrel"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

SNAPSHOT = GOLDEN / "sdgan" / "sg2_snapshot.pkl"
STYLEGAN2 = stylegan2.GeneratorOptions(z_dim=8, w_dim=12, mapping_layers=3, channel_base=256, channel_max=16)
STYLENAT = stylenat.GeneratorOptions(
    style_dim=16, mlp_layers=2, channel_max=16, min_heads=2, kernels=((3,),) * 3, dilations=((1,), (1,), (1, 2))
)
WIDTHS = [(C, growth, scale) for C in ("1", "1/2", "1/4", "1/8") for growth in ("scaled", "fixed") for scale in (4, 2)]


def network_of(net: nn.Module, options: Any, resolution: int | None = None, num_classes: int = 0) -> Network:
    """A network that draws something: no strength of noise is zero, no photograph is black."""
    torch.manual_seed(1)
    for name, value in net.named_parameters():
        if value.numel() == 1:
            value.data.fill_(0.3)
        if name == "conv_last.bias":
            value.data.fill_(0.5)
    settle_spectral_norms(net)
    kind, state = type(net).__module__.split(".")[-2], net.state_dict()
    more: dict[str, Any] = {"options": asdict(options), "resolution": resolution, "num_classes": num_classes}
    return Network(kind=kind, player="Generator", role="G_ema", state=state, **more)


def student(C: str, growth: Any, scale: int) -> Network:
    options = scaled(rrdbnet.GeneratorOptions(num_block=1, scale=scale), C, growth)
    return network_of(rrdbnet.Generator(options), options)


def compact() -> Network:
    options = srvgg.GeneratorOptions(num_feat=4, num_conv=2, upscale=2)
    return network_of(srvgg.Generator(options), options)


def faces(blind: bool = False) -> Network:
    options = gcfsr.GeneratorOptions(narrow=1 / 64, num_style_feat=8, blind=blind)
    return network_of(gcfsr.Generator(options, resolution=32), options, 32)


def style(num_classes: int = 0) -> Network:
    net = stylegan2.Generator(STYLEGAN2, resolution=16, num_classes=num_classes)
    net.mapping.w_avg.fill_(0.1)
    return network_of(net, STYLEGAN2, 16, num_classes)


def fast(num_classes: int = 0) -> Network:
    options = fastgan.GeneratorOptions(z_dim=8, ngf=4)
    return network_of(fastgan.Generator(options, resolution=32, num_classes=num_classes), options, 32, num_classes)


def attention() -> Network:
    return network_of(stylenat.Generator(STYLENAT, resolution=16), STYLENAT, 16)


def baseline() -> Network:
    options = r3gan.GeneratorOptions(z_dim=8, widths=(16, 16), groups=(4, 4), blocks=(1, 1))
    return network_of(r3gan.Generator(options, resolution=8), options, 8)


PHOTO_FORMS = {"safetensors", "official", "onnx", "onnx-fp16", "pt2"}
GAN_FORMS = {"safetensors", "official", "onnx", "onnx-fp16", "pt2"}
KINDS: dict[str, tuple[Callable[[], Network], set[str]]] = {
    "SRVGG": (compact, PHOTO_FORMS),
    "FastGAN": (fast, GAN_FORMS),
    "RRDBNet 1/4 scaled x2": (lambda: student("1/4", "scaled", 2), PHOTO_FORMS | {"spandrel"}),
}
LONG: dict[str, tuple[Callable[[], Network], set[str]]] = {
    **{
        f"RRDBNet {C} {growth} x{scale}": (
            lambda C=C, growth=growth, scale=scale: student(C, growth, scale),  # type: ignore[misc]
            PHOTO_FORMS | ({"spandrel"} if growth == "scaled" and C != "1" else set()),
        )
        for C, growth, scale in WIDTHS
    },
    "GCFSR": (faces, PHOTO_FORMS),
    "StyleGAN2": (style, GAN_FORMS | {"pkl"}),
    "FastGAN of 3 classes": (lambda: fast(3), GAN_FORMS),
    "GCFSR blind": (lambda: faces(blind=True), PHOTO_FORMS),
    "StyleGAN2 of 3 classes": (lambda: style(3), GAN_FORMS | {"pkl"}),
    "StyleNAT": (attention, GAN_FORMS),
    "R3GAN": (baseline, GAN_FORMS),
}
MATRIX = [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


def exported(network: Network, folder: Path, *words: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an export, and its proof."""
    source, to = save_network(network, folder / "net"), folder / "export"
    assert main(["export", str(source), "--to", str(to), *words]) == 0
    return to, json.loads((to / "export.json").read_text())


@pytest.mark.parametrize("name", MATRIX)
def test_every_file_of_an_export_gives_its_consumer_the_network_of_training(name, tmp_path, monkeypatch):
    make, forms = (KINDS | LONG)[name]
    to, proof = exported(make(), tmp_path)
    rows = proof["artefacts"]
    assert {row["form"] for row in rows} == forms and not proof["left_out"]
    assert {row["consumer"] for row in rows if "unproven" in row} <= {"stylegan2-ada-pytorch"}
    for row in rows:
        assert sha256_of_file(to / row["file"]) == row["sha256"] and (to / row["file"]).stat().st_size == row["bytes"]
        assert len(row["cases"]) == (0 if "unproven" in row else 2)
        for result in row["cases"].values():
            assert result["max"] <= (0.05 if row["form"] == "onnx-fp16" else 1e-5), row
    if name.startswith(("RRDBNet", "SRVGG")):
        assert "spandrel" in {row["consumer"] for row in rows}
    assert Image.open(to / "preview.png").size[0] >= 32
    snippets_run(to, monkeypatch)


def test_pictures_are_taken_from_all_over_a_list():
    numbers = [torch.tensor(i) for i in range(12)]
    assert [int(x) for x in spread(numbers, 3)] == [2, 6, 10]
    assert [int(x) for x in spread(numbers[:2], 3)] == [0, 1] and spread([], 3) == []


def snippets_run(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snippet of the card, as somebody in the folder would run it."""
    monkeypatch.chdir(to)
    blocks = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    for block in blocks:
        made: dict[str, Any] = {}
        exec(block, made)
        if "image" in made:
            assert len(made["image"].shape) == 4 and float(made["image"].max()) <= 1


class Seen(Draws):
    """Draws that remember what was drawn, by the name of the input it has in a graph."""

    def normal(self, purpose: str, *shape: int) -> Tensor:
        found = super().normal(purpose, *shape)
        MAPS[input_name(purpose)] = found
        return found


MAPS: dict[str, Tensor] = {}


@pytest.mark.parametrize(
    "make", [style, fast, faces, lambda: style(3)], ids=["StyleGAN2", "FastGAN", "GCFSR", "classes"]
)
def test_noise_inputs_are_the_maps_that_the_network_draws(make):
    MAPS.clear()
    network = make()
    outward, net = Outward(network).eval(), network.build()
    draws = Seen(seed=1, step=2, ghosts=(0, 1), ghost_batch=1)
    inputs = outward.inputs(2, "test", torch.rand(2, 3, outward.side, outward.side))
    inputs |= {"truncation_psi": torch.ones(1)} if outward.truncates else {}
    with torch.no_grad():
        if network.kind == "gcfsr":
            expected = net(inputs["face"], inputs["factor"], draws)
        else:
            expected = net(inputs["z"], inputs.get("c"), draws)
        assert MAPS.keys() == outward.noise.keys()
        got, silent = (outward(*in_order(outward.names, inputs | maps)) for maps in (MAPS, zeros(MAPS)))
    torch.testing.assert_close(got, expected.clamp(-1, 1), rtol=1e-5, atol=1e-6)
    assert (got - silent).abs().max() > 1e-3


def zeros(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in maps.items()}


def test_truncation_is_an_input_that_moves_styles_to_their_mean():
    network = style()
    outward, net = Outward(network).eval(), network.build()
    inputs = outward.inputs(2, "test") | {"truncation_psi": torch.tensor([0.4])}
    with torch.no_grad():
        got = outward(*in_order(outward.names, inputs | zeros({name: inputs[name] for name in outward.noise})))
        expected = net(inputs["z"], truncation_psi=0.4, noise="none").clamp(-1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def tree(value: Any) -> Any:
    """A checkpoint's content as values that can be compared."""
    if isinstance(value, Record):
        return value.name, {name: tree(part) for name, part in value.attributes.items()}
    if isinstance(value, dict):
        return {name: tree(part) for name, part in value.items()}
    return (str(value.dtype), value.tolist()) if isinstance(value, Tensor) else value


def test_a_snapshot_has_the_classes_arguments_and_attributes_of_an_official_one(tmp_path):
    official = read_checkpoint(SNAPSHOT)
    (tmp_path / "ours.pkl").write_bytes(snapshot_bytes(read_official(SNAPSHOT).networks["G_ema"]))
    ours = read_checkpoint(tmp_path / "ours.pkl")
    assert tree(ours.tree["G_ema"]) == tree(official.tree["G_ema"]) and ours.tree["G"] is ours.tree["G_ema"]
    assert (
        not any("sdtrain" in name for name in ours.globals) and b"sdtrain" not in (tmp_path / "ours.pkl").read_bytes()
    )
    found = read_official(tmp_path / "ours.pkl").networks
    assert sorted(found) == ["G", "G_ema"] and found["G_ema"].num_classes == 4


def test_blocks_in_float16_are_said_as_the_official_program_says_them():
    half = replace(style(), options=asdict(replace(STYLEGAN2, num_low_precision_res=1, low_precision="fp16")))
    assert b"num_fp16_res\x94K\x01" in snapshot_bytes(half)
    assert b"num_fp16_res\x94K\x00" in snapshot_bytes(style())


@pytest.mark.slow
def test_an_8_bit_graph_is_calibrated_and_its_loss_is_in_the_proof(tmp_path):
    shards = str(make_shards(tmp_path / "shards", samples=3))
    _, proof = exported(compact(), tmp_path, "--format", "onnx", "--format", "onnx-int8", "--calibrate", shards)
    plain, small = proof["artefacts"]
    assert small["form"] == "onnx-int8" and all(20 < result["psnr"] < 80 for result in small["cases"].values())
    assert all(result["psnr"] is None or result["psnr"] > 100 for result in plain["cases"].values())


def test_pictures_that_are_named_are_compared_on_and_a_folder_without_any_is_refused(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(50, 40), (100, 90)]):
        Image.new("RGB", size, (40 * i, 90, 120)).save(tmp_path / "photos" / f"{i}.png")
    _, proof = exported(compact(), tmp_path, "--format", "safetensors", "--images", str(tmp_path / "photos"))
    assert proof["inputs"] == "pictures of photos"
    assert list(proof["artefacts"][0]["cases"]) == ["lq 1 x 3 x 40 x 50", "lq 2 x 3 x 40 x 50"]
    words = ("--to", tmp_path / "f", "--images", tmp_path / "export")
    (tmp_path / "export" / "preview.png").unlink()
    assert "holds no pictures; name a folder of PNG" in refused(capsys, tmp_path / "net.safetensors", *words)


# What cannot be


@pytest.fixture
def network_file(tmp_path: Path) -> str:
    return str(save_network(compact(), tmp_path / "net"))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that ends with code 2."""
    assert main(["export", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_consumer_that_is_not_installed_is_named_and_nothing_is_claimed(network_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", network_file, "--to", str(tmp_path / "e")]) == 0
    shown = capsys.readouterr().out
    assert "not proven here: install spandrel" in shown and "left out onnx: export to onnx needs the packages" in shown
    assert "spandrel (ComfyUI" not in (tmp_path / "e" / "README.md").read_text()
    assert "needs the packages" in refused(capsys, network_file, "--to", tmp_path / "f", "--format", "onnx")


def test_a_folder_that_exists_is_left_as_it_is(network_file, tmp_path, capsys):
    (tmp_path / "e").mkdir()
    assert "exists, and nothing is written over an export" in refused(capsys, network_file, "--to", tmp_path / "e")
    assert list((tmp_path / "e").iterdir()) == []


def test_a_full_disk_is_said_before_and_leaves_nothing_behind(network_file, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
        assert "has 1 MB free and the export needs about 8 MB" in refused(capsys, network_file, "--to", tmp_path / "e")

    def full(self: Release, form: str) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Release, "_bytes", full)
    assert "No space left on device" in refused(capsys, network_file, "--to", tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_a_file_that_differs_from_the_network_is_not_given_away(network_file, tmp_path, capsys, monkeypatch):
    whole = Release.graph.func  # type: ignore[attr-defined]
    other = replace(compact(), state={name: value * 1.01 for name, value in compact().state.items()})
    monkeypatch.setattr(Release, "graph", property(lambda self: whole(Release(other))))
    said = refused(capsys, network_file, "--to", tmp_path / "e", "--format", "onnx")
    assert "model.onnx differs from the network by" in said and not (tmp_path / "e").exists()


UNFIT = [
    ("spandrel", "format spandrel is for super-resolution networks, this is stylegan2; use official"),
    ("onnx-int8", "format onnx-int8 is for RRDBNet and SRVGGNetCompact, this is stylegan2"),
]


@pytest.mark.parametrize(("form", "said"), UNFIT)
def test_a_form_that_a_network_has_not_is_refused(form, said, tmp_path, capsys):
    assert said in refused(capsys, SNAPSHOT, "--to", tmp_path / "e", "--format", form)


def test_a_pkl_is_for_stylegan2_and_must_be_called_so(network_file, tmp_path, capsys):
    assert "format pkl is for StyleGAN2" in refused(capsys, network_file, "--out", tmp_path / "x", "--format", "pkl")
    said = refused(capsys, SNAPSHOT, "--out", tmp_path / "x.pt", "--format", "pkl")
    assert "format pkl writes the generator as official StyleGAN2-ADA snapshots hold it" in said and "x.pkl" in said


def run_folder(folder: Path, total_img: int, seen_img: int) -> Path:
    """What an export reads of a run: plan, a complete checkpoint, the best weights."""
    save_network(compact(), folder / "best" / "G_ema")
    (folder / "config.yaml").write_text("method: sdakd\n")
    (folder / "plan.json").write_text(json.dumps({"stages": [{"end_img": total_img}]}))
    (folder / "checkpoints" / f"img_{seen_img:09d}").mkdir(parents=True)
    (folder / "checkpoints" / f"img_{seen_img:09d}" / "complete.json").write_text("{}")
    return folder


def test_a_run_that_has_not_ended_and_a_folder_that_is_none_are_refused(tmp_path, capsys):
    run = run_folder(tmp_path / "run", 96, 32)
    assert "has saved 32 of 96 images; train on, or say --unfinished" in refused(capsys, run, "--to", tmp_path / "e")
    (tmp_path / "other").mkdir()
    assert "is no run of sdtrain: it has no config.yaml" in refused(capsys, tmp_path / "other", "--to", tmp_path / "e")


@pytest.mark.parametrize("words, said", [
    ([], "say either --to DIR for everything or --out FILE for one form"),
    (["--to", "e", "--out", "f"], "say either --to DIR"),
    (["--out", "f", "--format", "onnx", "--format", "pt2"], "--out f is one file, but --format names 2"),
    (["--out", "f", "--licence", "mit"], "--licence: of no use here"),
    (["--to", "e", "--dry-run"], "--dry-run: of no use here"),
    (["--to", "e", "--role", "D"], "--to is for generators"),
    (["--to", "e", "--layout", "legacy"], "--layout legacy is for one file: take it with --out FILE"),
    (["--push", "face"], "--push 'face' is no repository; give OWNER/NAME"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_one_sentence(words, said, capsys):
    assert said in refused(capsys, "absent.pkl", *words)


# The hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(compact(), tmp_path, "--format", "safetensors", "--licence", "cc-by-4.0")[0]


class Hub:
    """What is asked of huggingface.co."""

    asked: list[Any] = []
    error: Exception | None = None

    def create_repo(self, repo: str, exist_ok: bool) -> None:
        if self.error:
            raise self.error

    def upload_folder(self, **said: Any) -> None:
        self.asked.append(said)


def test_an_export_is_pushed_whole_and_a_dry_run_sends_nothing(folder, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(hub, "HfApi", Hub)
    (folder / "notes.txt").write_text("of nobody's business")
    assert main(["export", str(folder), "--push", "me/face", "--dry-run"]) == 0
    assert "dry run: 5 files" in capsys.readouterr().out and Hub.asked == []
    assert main(["export", str(folder), "--push", "me/face"]) == 0
    names = ["README.md", "export.json", "model.json", "model.safetensors", "preview.png"]
    assert Hub.asked.pop()["allow_patterns"] == names
    assert (folder / "README.md").read_text().startswith('---\nlibrary_name: sdtrain\nlicense: "cc-by-4.0"\n')
    monkeypatch.setattr(Hub, "error", ConnectionError("Name or service not known"))
    said = refused(capsys, folder, "--push", "me/face")
    assert "huggingface.co did not take" in said and "the folder is complete: once this machine reaches it" in said


def test_an_export_whose_files_changed_is_not_pushed(folder, capsys):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    said = refused(capsys, folder, "--push", "me/face", "--dry-run")
    assert "'model.safetensors' is not the file that export.json speaks of" in said
    assert "is no export: its export.json cannot be used" in refused(
        capsys, folder.parent, "--push", "me/face", "--dry-run"
    )


def test_without_the_package_the_way_to_it_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(push.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sdtrain[hub]'" in refused(capsys, folder, "--push", "me/face")
