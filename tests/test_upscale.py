"""`sdtrain upscale` is what people touch. Without this file seams, lost transparency, lost bits, a traceback for one
bad picture in a thousand, or a discriminator used as a generator would be found by them.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPO
from PIL import Image
from test_sdakd import finished, lists  # noqa: F401
from torch.nn import functional as F

from sdtrain.commands import upscale
from sdtrain.commands.exporting import export
from sdtrain.commands.upscaler import Upscaler
from sdtrain.data.read.picture import Picture, _turn, png_of, read_picture, values_of
from sdtrain.errors import ConfigError, DataError, WeightsError
from sdtrain.files import write_bytes
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import Network, save_network
from sdtrain.interop.pth import export_student
from sdtrain.interop.tiled import Span, auto_overlap, enlarge, reach, spans
from sdtrain.models.gcfsr import networks as gcfsr
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.srvgg import networks as srvgg
from sdtrain.serve.worker import maker_of


def network_of(net: Any, **more: Any) -> Network:
    """A module of sdtrain.models as a network with a card."""
    kind, options = type(net).__module__.split(".")[-2], dataclasses.asdict(net.options)
    return Network(kind=kind, player="Generator", role="G_ema", state=net.state_dict(), options=options, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small x2 network that enlarges recognisably: SRVGG adds its body to the nearest-enlarged input."""
    torch.manual_seed(0)
    options = srvgg.GeneratorOptions(num_feat=4, num_conv=2, upscale=2)
    net = srvgg.Generator(options)
    net.body[-1].weight.data.mul_(0.1)
    net.body[-1].bias.data.zero_()
    path = tmp_path_factory.mktemp("model") / "student.safetensors"
    return save_network(network_of(net), path)


@pytest.fixture(scope="module")
def face_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options = gcfsr.GeneratorOptions(narrow=1 / 64, num_style_feat=8)
    net = gcfsr.Generator(options, resolution=32)
    for name, value in net.named_parameters():
        if name.endswith(".weight") and value.shape == (1,):
            value.data.fill_(0.3)  # strength of the noise
    path = tmp_path_factory.mktemp("face") / "gcfsr.pth"
    return export_student(network_of(net, resolution=32), path)


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    upscale.add_arguments(parser)
    return upscale.run(parser.parse_args([str(word) for word in words]))


def photo(height: int, width: int, channels: int = 3, top: int = 255) -> np.ndarray:
    """A smooth picture with an edge."""
    y, x = np.mgrid[:height, :width]
    planes = [(np.sin(x / 5 + c) + np.cos(y / 4 - c)) / 4 + 0.25 + 0.5 * (x > width // 2) for c in range(channels)]
    return (np.stack(planes, 2).clip(0, 1) * top).round()


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    "net, fold",
    [
        (srvgg.Generator(srvgg.GeneratorOptions(num_feat=4, num_conv=3, upscale=2)), 1),
        (rrdbnet.Generator(rrdbnet.GeneratorOptions(num_feat=4, num_grow_ch=2, num_block=1)), 1),
        (rrdbnet.Generator(rrdbnet.GeneratorOptions(num_feat=4, num_grow_ch=2, num_block=1, scale=2)), 2),
    ],
    ids=["srvgg", "rrdbnet x4", "rrdbnet x2"],
)
def test_tiled_equals_whole_where_the_overlap_is_twice_the_reach(net: torch.nn.Module, fold: int) -> None:
    for value in net.parameters():
        value.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    net.eval().requires_grad_(False)
    overlap = 2 * reach(net)
    image = torch.rand(3, 2 * overlap + 23, 2 * overlap + 6, generator=torch.Generator().manual_seed(2))
    whole = enlarge(net, image, scale=net.scale, fold=fold, tile=1 << 20)
    tiled = enlarge(net, image, scale=net.scale, fold=fold, tile=overlap + 15, overlap=overlap)
    assert whole.shape == (3, image.shape[1] * net.scale, image.shape[2] * net.scale)
    assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize(
    "size, tile, overlap", [((90, 130), 40, 16), ((33, 61), 20, 7), ((50, 50), 64, 32), ((64, 9), 20, 0)]
)
def test_tiles_are_added_up_as_if_each_was_weighed_as_a_whole(size: tuple[int, int], tile: int, overlap: int) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
    net = torch.nn.Upsample(scale_factor=3, mode="bicubic")
    whole = torch.zeros(3, *(3 * side for side in size))
    for y in spans(size[0], tile, overlap):
        for x in spans(size[1], tile, overlap):
            result = net(image[None, :, y.start : y.stop, x.start : x.stop])[0]
            place = whole[:, 3 * y.start : 3 * y.stop, 3 * x.start : 3 * x.stop]
            place += result * (weights_of(y, 3)[:, None] * weights_of(x, 3))
    made = enlarge(net, image, scale=3, tile=tile, overlap=overlap)
    torch.testing.assert_close(made, whole, rtol=0, atol=1e-6)
    for bits, kind in ((8, torch.uint8), (16, torch.uint16)):
        values = enlarge(net, image, scale=3, tile=tile, overlap=overlap, bits=bits)
        assert values.dtype == kind and made.min() < 0 and made.max() > 1, "bicubic goes beyond the values it is given"
        assert torch.equal(values.float(), (made.clamp(0, 1) * (2**bits - 1)).round())


def weights_of(span: Span, scale: int) -> torch.Tensor:
    """How much each pixel of a tile's output counts: rising and falling linearly around where two cores meet."""
    at = torch.arange(span.start * scale, span.stop * scale) + 0.5
    width = max(span.overlap * scale, 1)
    rising = ((at - span.core_start * scale) / width + 0.5).clamp(0, 1) if span.core_start else torch.ones_like(at)
    if span.core_stop == span.size:
        return rising
    return rising * (0.5 - (at - span.core_stop * scale) / width).clamp(0, 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_picture_is_rounded_alike_in_pieces_and_as_a_whole(bits: int, alpha: bool) -> None:
    values = np.random.default_rng(0).normal(0.5, 0.4, (150, 7, 4)).astype(np.float32)
    picture = Picture(values[..., :3], values[..., 3] if alpha else None, bits)
    whole = (values[..., : 3 + alpha].clip(0, 1) * (2**bits - 1)).round()
    assert np.array_equal(values_of(picture), whole)


def test_a_small_overlap_leaves_differences_but_no_step_at_the_seam() -> None:
    def smear(x: torch.Tensor) -> torch.Tensor:  # looks 32 px to the left, four times the overlap
        return F.avg_pool2d(F.pad(x, (32, 0)), (1, 33), 1)

    image = torch.ones(3, 8, 128)
    error = enlarge(smear, image, scale=1, tile=64, overlap=8) - enlarge(smear, image, scale=1, tile=128)
    step = (error[..., 1:] - error[..., :-1]).abs().max()
    assert error.abs().max() > 0.5
    assert step < 0.2 * error.abs().max(), "cutting instead of blending puts the whole error into one step"


@pytest.mark.parametrize(
    "size, tile, overlap, fold", [(100, 30, 10, 1), (101, 512, 32, 1), (64, 20, 7, 4), (33, 32, 16, 1)]
)
def test_tiles_are_multiples_of_the_fold_and_what_they_agree_on_is_left_as_it_is(
    size: int, tile: int, overlap: int, fold: int
) -> None:
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(4))

    def net(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] % fold == x.shape[3] % fold == 0
        return F.interpolate(x, scale_factor=3)

    made = enlarge(net, image, scale=3, tile=tile, overlap=overlap, fold=fold)
    assert torch.equal(made, F.interpolate(image[None], scale_factor=3)[0])


def test_tiles_narrower_than_their_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match="an overlap of 40 px is wider than tiles of 20 px; make tiles at least 80"):
        spans(100, 20, 40)


def test_auto_overlap_is_exact_for_shallow_networks_and_bounded_for_deep_ones() -> None:
    shallow = srvgg.Generator(srvgg.GeneratorOptions(num_feat=2, num_conv=3))
    with torch.device("meta"):
        deep = rrdbnet.Generator(rrdbnet.GeneratorOptions(num_block=4))
    assert (auto_overlap(shallow), auto_overlap(deep)) == (10, 32)


def test_files_and_folders_become_pictures_of_twice_the_size(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    save(tmp_path / "in" / "a.png", photo(20, 30))
    save(tmp_path / "in" / "deep" / "b.bmp", photo(17, 9))
    single = save(tmp_path / "c.jpg", photo(16, 16))
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert run(tmp_path / "in", single, "--model", model, "--out", tmp_path / "out") == 0
    sizes = {str(p.relative_to(tmp_path / "out")): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"a.png": (60, 40), "deep/b.png": (18, 34), "c.png": (32, 32)}
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_result_resembles_the_input(model: Path, tmp_path: Path) -> None:
    values = photo(40, 40)
    run(save(tmp_path / "a.png", values), "--model", model, "--out", tmp_path / "out")
    got = np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(float)
    assert np.abs(got.reshape(40, 2, 40, 2, 3).mean((1, 3)) - values).mean() < 12


def test_two_inputs_of_one_name_do_not_overwrite_each_other(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(8, 8))
    save(tmp_path / "a.jpg", photo(12, 12))
    assert run(tmp_path, "--model", model, "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "a_png.png"}


def test_inputs_are_read_once_and_results_of_an_earlier_run_are_no_inputs(model: Path, tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.png", photo(8, 8))
    files = [tmp_path / folder / "a.png" for folder in ("x", "y", "z")]
    for _ in range(2):
        assert run(*files, tmp_path / "x", tmp_path / "x", "--model", model, "--out", tmp_path / "x" / "out") == 0
        assert {p.name for p in (tmp_path / "x" / "out").iterdir()} == {"a.png", "a_png.png", "a_png_2.png"}


def test_a_picture_is_never_replaced_by_its_result(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save(tmp_path / "a.png", photo(8, 8))
    before = source.read_bytes()
    assert run(source, "--model", model, "--out", tmp_path) == 2
    assert "would replace its own input" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_bad_files_are_named_the_rest_is_done_and_the_exit_status_is_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = save(tmp_path / "good.png", photo(12, 12))
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:80])
    (tmp_path / "page.jpg").write_text("<html>not here</html>")
    names = [tmp_path / name for name in ("broken.png", "page.jpg", "absent.png", "good.png")]
    assert run(*names, "--model", model, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"upscaled 1 of 4 pictures into {tmp_path / 'out'}"
    lines = said.err.splitlines()
    assert lines[0] == "refused 3:" and len(lines) == 4
    assert "broken.png: " in lines[1] and "HTML" in lines[2] and "absent.png: No such file or directory" in lines[3]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize("scale, size", [(3.5, (35, 28)), (1, (10, 8)), (4, (40, 32)), (0.5, (5, 4))])
def test_any_output_scale_is_reached(model: Path, tmp_path: Path, scale: float, size: tuple[int, int]) -> None:
    source = save(tmp_path / "a.png", photo(8, 10))
    assert run(source, "--model", model, "--out", tmp_path / "out", "--scale", scale) == 0
    assert Image.open(tmp_path / "out" / "a.png").size == size


def test_transparency_is_kept(model: Path, tmp_path: Path) -> None:
    values = photo(10, 12, 4)
    values[..., 3] = np.where(np.arange(12) < 6, 0, 200)
    run(save(tmp_path / "a.png", values), "--model", model, "--out", tmp_path / "out")
    got = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert got.shape == (20, 24, 4)
    assert (got[:, :8, 3] < 12).all() and (np.abs(got[:, 16:, 3].astype(int) - 200) < 12).all()


def test_sixteen_bits_are_kept(model: Path, tmp_path: Path) -> None:
    fine = photo(16, 16, top=1)[..., :1] * 0 + np.linspace(0.5, 0.504, 256).reshape(16, 16, 1)
    write_bytes(tmp_path / "a.png", png_of(Picture(np.repeat(fine, 3, 2).astype(np.float32), bits=16)))
    run(tmp_path / "a.png", "--model", model, "--out", tmp_path / "out")
    got = read_picture(tmp_path / "out" / "a.png")
    assert got.bits == 16 and got.rgb.shape == (32, 32, 3)
    assert len(np.unique(got.rgb)) > 100, "8 bits would leave two or three levels of this ramp"


@pytest.mark.parametrize("channels", [3, 4])
def test_a_written_sixteen_bit_picture_reads_back_exactly(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (9, 13, 4)).astype(np.float32) / 65535
    alpha = values[..., 3] if channels == 4 else None
    write_bytes(tmp_path / "a.png", png_of(Picture(values[..., :3], alpha, bits=16)))
    got = read_picture(tmp_path / "a.png")
    assert np.array_equal(got.rgb, values[..., :3])
    assert alpha is None or np.array_equal(got.alpha, alpha)


def test_grey_sixteen_bit_files_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 6)).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name).rgb[..., 1], values.astype(np.float32) / 65535)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_agree_with_pillow(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    image = Image.fromarray(photo(6, 9).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(_turn(np.asarray(image), orientation), upright)


def test_a_colour_profile_is_kept(model: Path, tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo(8, 8).astype(np.uint8)).save(tmp_path / "a.png", icc_profile=profile)
    run(tmp_path / "a.png", "--model", model, "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.png").info["icc_profile"] == profile


def test_a_face_gets_the_factor_and_the_same_noise_every_time(face_model: Path, tmp_path: Path) -> None:
    face = save(tmp_path / "a.png", photo(8, 8))
    pictures = {}
    for name, words in {"auto": [], "same": ["--factor", 4], "other": ["--factor", 32], "seed": ["--seed", 1]}.items():
        assert run(face, "--model", face_model, "--out", tmp_path / name, *words) == 0
        pictures[name] = np.asarray(Image.open(tmp_path / name / "a.png"))
    assert pictures["auto"].shape == (32, 32, 3)
    assert np.array_equal(pictures["auto"], pictures["same"]), "8 px of 32 is factor 4"
    assert not np.array_equal(pictures["auto"], pictures["other"])
    assert not np.array_equal(pictures["auto"], pictures["seed"])


@pytest.mark.parametrize(
    "size, words, reason",
    [
        ((8, 6), [], "GCFSR takes square, aligned faces of at most 32 px, not 6 x 8; crop the face"),
        ((40, 40), [], "GCFSR takes square, aligned faces of at most 32 px, not 40 x 40; crop the face"),
        ((32, 32), [], "a 32 px face is no reduction by 4 to 64 of 32 px; say --factor, how blurred it is"),
    ],
)
def test_faces_that_do_not_fit_are_refused(
    face_model: Path, tmp_path: Path, size: tuple, words: list, reason: str, capsys: pytest.CaptureFixture
) -> None:
    face = save(tmp_path / "a.png", photo(*size))
    assert run(face, "--model", face_model, "--out", tmp_path / "out", *words) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--factor", 3], r"--factor 3 is outside \[4, 64\], the range GCFSR is trained for"),
        (["--factor", 8], "--factor is GCFSR's condition, but .* holds a SRVGGNetCompact generator"),
        (["--scale", 0], r"--scale 0 is outside \(0, 32\]"),
        (["--tile", 8], "--tile 8 is too small; use at least 64 pixels"),
        (["--overlap", "wide"], "--overlap wide is neither a number of pixels nor auto"),
        (["--tile", 64, "--overlap", 40], "--overlap 40 is more than half of --tile 64"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used on this machine; leave it out, or say cpu"),
    ],
)
def test_settings_that_cannot_work_are_refused(model: Path, tmp_path: Path, words: list, message: str) -> None:
    source = save(tmp_path / "a.png", photo(8, 8))
    with pytest.raises(ConfigError, match=message):
        run(source, "--model", model, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_run_folder_gives_its_best_student(model: Path, tmp_path: Path) -> None:
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    for suffix in (".safetensors", ".json"):
        (best / f"G_ema{suffix}").write_bytes(model.with_suffix(suffix).read_bytes())
    Image.fromarray(photo(20, 16).astype(np.uint8)).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--model", tmp_path / "run", "--out", tmp_path / "one") == 0
    assert run(tmp_path / "a.png", "--model", model, "--out", tmp_path / "two") == 0
    assert (tmp_path / "one" / "a.png").read_bytes() == (tmp_path / "two" / "a.png").read_bytes()
    with pytest.raises(WeightsError, match=r"holds no G.safetensors; give a run that has saved, or a file$"):
        run(tmp_path / "a.png", "--model", tmp_path / "run", "--weights", "raw", "--out", tmp_path / "three")


def test_what_is_cheap_to_see_is_said_before_a_network_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upscaler, "of", lambda args: pytest.fail("the network was read"))
    Image.fromarray(photo(20, 16).astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "a.png", "--model", model, "--out", out)
    place = tmp_path / "file"
    assert str(caught.value) == f"--out {out}: {place} cannot be written (Not a directory); choose another folder"
    with pytest.raises(WeightsError, match=r"^--model .*absent does not exist; give a run folder, .pth, .safe"):
        run(tmp_path / "a.png", "--model", tmp_path / "absent", "--out", tmp_path / "out")


def test_a_disk_that_is_full_ends_the_work_and_what_is_done_is_not_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.png", photo(16, 16))
    write, tried = upscale._write, []

    def full(job: Any, data: bytes) -> None:
        tried.append(job.target.name)
        if job.target.name == "b.png" and len(tried) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(job, data)

    monkeypatch.setattr(upscale, "_write", full)
    words = [*sorted(tmp_path.glob("?.png")), "--model", model, "--out", tmp_path / "out"]
    with pytest.raises(OSError, match="No space left"):  # a sentence and exit code 2: exits.py
        run(*words)
    assert run(*words) == 0 and tried == ["a.png", "b.png", "b.png", "c.png"]


def test_a_folder_without_pictures_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no pictures in .*; give files, or folders that hold some"):
        run(tmp_path, "--model", model, "--out", tmp_path / "out")


def test_a_discriminator_is_refused_as_a_generator(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", photo(8, 8))
    file = GOLDEN / "sdakd" / "UNetD_nf4_params.pth"
    with pytest.raises(
        WeightsError, match="holds a UNetDiscriminatorSN discriminator .* but a generator is needed here"
    ):
        run(source, "--model", file, "--out", tmp_path / "out")


def test_an_official_file_works_without_a_description(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", photo(9, 7))
    file = GOLDEN / "sdakd" / "ESRGAN_oldarch_x4_nf8.pth"
    assert run(source, "--model", file, "--out", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out" / "a.png").size == (28, 36)


def test_running_out_of_memory_halves_the_tiles(model: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    upscale.add_arguments(parser)
    args = parser.parse_args(["x", "--model", str(model), "--out", "y", "--tile", "256", "--device", "cpu"])
    upscaler = Upscaler.of(args)
    picture = Picture(photo(20, 300, top=1).astype(np.float32), bits=16)
    whole = upscaler(picture)
    net = upscaler.net

    class Tight(torch.nn.Module):
        scale = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return net(x)

    tight = dataclasses.replace(upscaler, net=Tight())
    assert np.abs(tight(picture).rgb.astype(int) - whole.rgb).max() <= 1
    assert tight.tile == 64
    with pytest.raises(DataError, match="tiles of 64 px do not fit into memory; use --device cpu"):
        tight.overlap = 60
        tight(picture)


def test_importing_the_command_does_not_import_torch() -> None:
    code = "import sys, sdtrain.commands.upscale; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_a_real_run_of_sdakd_enlarges_by_its_student(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    Image.fromarray(photo(20, 16).astype(np.uint8)).save(tmp_path / "a.png")
    sizes = set()
    for model in (finished, finished / "best" / "G_ema.safetensors"):
        assert run(tmp_path / "a.png", "--model", model, "--out", tmp_path / "out") == 0
        sizes.add(Image.open(tmp_path / "out" / "a.png").size)
    assert len(sizes) == 1 and sizes != {(16, 20)}
    assert run(tmp_path / "a.png", "--model", finished, "--weights", "raw", "--out", tmp_path / "raw") == 0


@pytest.fixture(scope="module")
def graph(model: Path) -> Path:
    """The network of `model` as an ONNX file."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return export(load_network(model), model.with_name("student.onnx"), "onnx")


def test_an_exported_graph_enlarges_as_its_network_does(model: Path, graph: Path, tmp_path: Path) -> None:
    save(tmp_path / "in.png", photo(70, 101))
    for path in (model, graph):
        assert run(tmp_path / "in.png", "--model", path, "--out", tmp_path / path.suffix[1:], "--tile", 64) == 0
    one, two = (np.asarray(Image.open(tmp_path / form / "in.png")).astype(int) for form in ("safetensors", "onnx"))
    assert one.shape == (140, 202, 3) and np.abs(one - two).max() <= 1


def test_a_graph_has_the_page_of_a_network_for_pictures(graph: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", photo(7, 9))
    assert run(source, "--model", graph, "--out", tmp_path / "out") == 0
    page = maker_of({"path": str(graph), "weights": "ema", "device": "cpu", "max_image_mb": 64})
    assert (page.about()["does"], page.about()["title"]) == ("pictures", "SRVGGNetCompact graph (scale 2)")
    assert page({}, source.read_bytes())[1] == (tmp_path / "out" / "in.png").read_bytes()


def test_a_graph_of_another_network_is_refused_before_anything_is_written(graph: Path, tmp_path: Path) -> None:
    import onnx

    save(tmp_path / "in.png", photo(8, 8))
    words = [tmp_path / "in.png", "--out", tmp_path / "out", "--model", tmp_path / "g.onnx"]

    def refuse(change: Any, said: str) -> None:
        model = onnx.load(graph)
        change(model)
        (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(WeightsError, match=said):
            run(*words)

    def say(text: str) -> Any:
        return lambda model: setattr(model.metadata_props[-1], "value", text)

    refuse(say('{"kind": "stylegan2", "scale": 1}'), "g.onnx holds a graph of stylegan2, which enlarges no photographs")
    refuse(lambda model: model.ClearField("metadata_props"), "holds a graph of another program")
    refuse(say("[1"), "is no ONNX graph")
    outside = onnx.TensorProto.EXTERNAL
    refuse(lambda model: setattr(model.graph.initializer[0], "data_location", outside), "keeps tensors in other files")
    refuse(lambda model: setattr(model.graph.node[0], "op_type", "Absent"), "is refused by onnxruntime")
    (tmp_path / "g.onnx").write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    with pytest.raises(WeightsError, match="g.onnx is no ONNX graph"):
        run(*words)
    with pytest.raises(ConfigError, match="--factor and --device are not for an .onnx file"):
        run(*words, "--factor", 16)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_lies_about_its_scale_is_refused_in_the_act(graph: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(graph)
    model.metadata_props[-1].value = '{"kind": "srvgg", "scale": 4}'
    onnx.save(model, tmp_path / "g.onnx")
    save(tmp_path / "in.png", photo(8, 8))
    assert run(tmp_path / "in.png", "--out", tmp_path / "out", "--model", tmp_path / "g.onnx") == 2
    assert not list((tmp_path / "out").glob("*.png"))
