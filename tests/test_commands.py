"""`sdtrain sample`, `evaluate RUN`, `bench` and weights in `report`: what is done with a run after and before it.

Without these a picture could depend on the batch it was drawn in, a run could be measured by another protocol than its
own, a table could mix numbers that do not compare, and a mistake would end in a traceback.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sdtrain import cli
from sdtrain.commands import evaluate, sample, source

CONFIG = """
method: sdgan
batch_size: 8
ghost_batch: 4
total_img: 32
log_img: 8
sample_img: 0
eval_img: 32
save_img: 16
keep_checkpoints: 3
snapshots: []
seed: 7
tracker: none
data: {train: SHARDS, workers: 0}
model:
  generator: {kind: stylegan2, z_dim: 8, w_dim: 8, channel_base: 64, channel_max: 8, mapping_layers: 1}
  discriminator: {kind: stylegan2, channel_base: 64, channel_max: 8, cmap_dim: 8}
adversarial: logistic
sd: {alpha: 1.0, loss: l1}
metrics: {names: [rfid], num_fake: 6, num_real: 6, seeds: 1, tap: 64, select_by: rfid, batch_size: 3}
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 16 px: two thirds of class `a`, one third of class `b`."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(24):
        (folder / "ab"[i % 3 == 0]).mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "ab"[i % 3 == 0] / f"{i:02d}.png")
    out = tmp_path_factory.mktemp("shards") / "toy"
    assert cli.main(["pack", str(folder), str(out), "--resolution", "16", "--labels", "folder", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(shards)))
    return path


@pytest.fixture(scope="session")
def run_folder(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with a conditional StyleGAN2."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert cli.main(["train", "--cfg", str(config), "--out", str(out)]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out


@pytest.fixture(scope="session")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator without styles and without classes, in a file of its own."""
    from sdtrain.interop.network import Network, save_network

    options = {"z_dim": 8, "ngf": 2, "lite": False}
    blank = Network(kind="fastgan", player="Generator", role="G_ema", state={}, options=options, resolution=256)
    torch.manual_seed(0)
    network = Network(**{**vars(blank), "state": blank.fresh().state_dict()})
    return save_network(network, tmp_path_factory.mktemp("file") / "plain")


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The sentence with which a command refuses; its exit code must be that of a user error."""
    capsys.readouterr()
    assert command(*words) == 2
    return capsys.readouterr().err.strip()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# sample


def test_an_image_depends_on_its_index_and_not_on_its_company(run_folder, tmp_path):
    assert command("sample", run_folder, "--out", tmp_path / "many", "--num", 5, "--batch", 5) == 0
    assert command("sample", run_folder, "--out", tmp_path / "few", "--indices", "1,3-4", "--batch", 2) == 0
    assert sorted(file.name for file in (tmp_path / "few").iterdir()) == ["000001.png", "000003.png", "000004.png"]
    for name in ("000001.png", "000003.png", "000004.png"):
        assert np.abs(pixels(tmp_path / "many" / name).astype(int) - pixels(tmp_path / "few" / name)).max() <= 1
    assert (pixels(tmp_path / "few" / "000001.png") != pixels(tmp_path / "few" / "000003.png")).any()


def test_images_are_those_of_the_training_run_with_the_same_seed(run_folder):
    """The run's own sampler, on the network as the run holds it."""
    from sdtrain.sampling import sampler

    mine = source.Source(run_folder, "cpu")
    assert (mine.seed, mine.role, source.position_of(mine.file)) == (7, "G_ema", {"seen_img": 32})
    counts = mine.class_counts
    assert counts == [16, 8]
    theirs = sampler(mine.net, seed=7, class_counts=counts, device="cpu")
    assert torch.equal(mine([0, 5]), theirs([0, 5]))
    other = source.Source(run_folder, "cpu", seed=8)
    assert not torch.equal(mine([0]), other([0]))


def test_average_and_generator_are_different_weights(run_folder):
    average, raw = (source.Source(run_folder, "cpu", weights=weights) for weights in ("ema", "raw"))
    assert (raw.role, average.role) == ("G", "G_ema")
    assert raw.file.parent.name == "img_000000032" and average.file.parent.name == "best"
    assert not torch.equal(raw([0]), average([0]))


def test_a_checkpoint_folder_and_its_file_are_one_source(run_folder):
    folder = source.Source(run_folder / "checkpoints" / "img_000000016", "cpu")
    file = source.Source(run_folder / "checkpoints" / "img_000000016" / "G_ema.safetensors", "cpu")
    assert source.position_of(folder.file) == {"seen_img": 16}
    assert torch.equal(folder([0, 1]), file([0, 1]))


def test_a_class_is_drawn_alone_when_asked(run_folder):
    for label in ("1", "b"):
        one = source.Source(run_folder, "cpu", label=label)
        assert one.latents(range(20))[1].tolist() == [[0.0, 1.0]] * 20
    both = source.Source(run_folder, "cpu").latents(range(2000))[1].mean(0)
    assert 0.63 < both[0] < 0.7  # a standard deviation is 0.011


def test_truncation_to_zero_makes_all_styles_the_mean(run_folder):
    mean = source.Source(run_folder, "cpu", truncation=0.0).styles([0, 1, 2])
    assert torch.equal(mean[0], mean[1]) and torch.equal(mean[0], mean[2])
    part = source.Source(run_folder, "cpu", truncation=0.0, truncation_cutoff=2).styles([0, 1])
    free = source.Source(run_folder, "cpu").styles([0, 1])
    assert torch.equal(part[:, 2:], free[:, 2:]) and torch.equal(part[0, :2], part[1, :2])


def test_a_grid_is_one_sheet(run_folder, tmp_path):
    assert command("sample", run_folder, "--out", tmp_path, "--num", 7, "--grid") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert pixels(tmp_path / "grid.png").shape == (48, 48, 3)
    assert not pixels(tmp_path / "grid.png")[32:, 16:].any()


def test_a_mixing_grid_shows_styles_at_its_edges_and_mixtures_inside(run_folder, tmp_path):
    assert command("sample", run_folder, "--out", tmp_path, "--num", 4, "--mixing-grid", "--mixing-layers", "0-99") == 0
    sheet = pixels(tmp_path / "mixing.png").astype(int)
    assert sheet.shape == (48, 48, 3) and not sheet[:16, :16].any()
    for row in (1, 2):  # all layers from the column: every row repeats the first one
        assert np.abs(sheet[16 * row : 16 * row + 16, 16:] - sheet[:16, 16:]).max() <= 1
    assert np.abs(sheet[16:32, :16] - sheet[:16, 16:32]).max() > 1
    assert command("sample", run_folder, "--out", tmp_path, "--num", 4, "--mixing-grid") == 0  # coarse layers alone
    mixed = pixels(tmp_path / "mixing.png").astype(int)
    assert (mixed[16:, :16] == sheet[16:, :16]).all() and (mixed[:16] == sheet[:16]).all()
    assert np.abs(mixed[16:32, 16:32] - mixed[32:, 16:32]).max() > 1


def test_an_interpolation_returns_to_its_start_and_has_even_steps(run_folder, tmp_path):
    words = ["--indices", "0-1", "--interpolate", 4, "--gif", "--fps", 25]
    assert command("sample", run_folder, "--out", tmp_path, *words) == 0
    assert len(list((tmp_path / "interpolation").iterdir())) == 8
    with Image.open(tmp_path / "interpolation.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (8, 40)
    there, back = (pixels(tmp_path / "interpolation" / f"{i:04d}.png").astype(int) for i in (1, 7))
    assert np.abs(there - back).max() <= 1  # the way back is the way there


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="optional program is absent: ffmpeg")
def test_an_interpolation_becomes_a_film(run_folder, tmp_path):
    assert command("sample", run_folder, "--out", tmp_path, "--indices", "0-1", "--interpolate", 4, "--mp4") == 0
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    look = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "interpolation.mp4"), *raw]
    film = np.frombuffer(subprocess.run(look, capture_output=True, check=True).stdout, np.uint8).reshape(8, 16, 16, 3)
    pictures = np.stack([pixels(tmp_path / "interpolation" / f"{i:04d}.png") for i in range(8)])
    assert np.abs(film.astype(int) - pictures).mean() < 16  # lossy, and colour at half the resolution


def test_latents_turn_on_the_great_circle():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    middle = sample.slerp(a, b, torch.tensor([[0.5]]))
    torch.testing.assert_close(middle, torch.tensor([[1.0, 1.0]]) * 4 / 2**0.5)
    torch.testing.assert_close(sample.slerp(a, a, torch.tensor([[0.3]])), a)


def test_a_generator_without_styles_is_interpolated_in_z(plain_file, tmp_path):
    assert command("sample", plain_file, "--out", tmp_path, "--indices", "0-1", "--interpolate", 1) == 0
    first, second = (pixels(tmp_path / "interpolation" / f"{i:04d}.png").astype(int) for i in (0, 1))
    assert first.shape == (256, 256, 3) and np.abs(first - second).max() > 1


SAMPLE_REFUSALS = [
    (["--indices", "3-1"], "--indices 3-1: '3-1' is neither a number nor a range such as 0-63"),
    (["--num", "0"], "--num, --batch and --fps must be at least 1"),
    (["--gif"], "--gif is for a moving picture; add --interpolate FRAMES"),
    (["--grid", "--mixing-grid"], "--grid, --mixing-grid and --interpolate are three pictures; ask for one at a time"),
    (
        ["--truncation-cutoff", "2"],
        "--truncation-cutoff says in which layers --truncation works; add --truncation PSI",
    ),
    (
        ["--num", "1", "--interpolate", "2"],
        "a mixing grid or an interpolation needs at least two images; raise --num or widen --indices",
    ),
    (["--interpolate", "0"], "--interpolate 0: take at least 1 frame from an image to the next"),
]


def test_sample_says_what_is_cheap_to_see_before_it_reads_a_network(plain_file, capsys, monkeypatch):
    monkeypatch.setattr(sample, "Source", lambda *_, **__: pytest.fail("the network was read"))
    said = refusal(capsys, "sample", plain_file, "--out", plain_file.parent / "out", "--device", "banana")
    assert said == "sdtrain: --device banana is no device; say auto, cpu, cuda or cuda:1"
    said = refusal(capsys, "sample", plain_file, "--out", plain_file / "out")
    place = f"{plain_file} cannot be written (Not a directory)"
    assert said == f"sdtrain: --out {plain_file}/out: {place}; choose another folder"


@pytest.mark.parametrize(("words", "sentence"), SAMPLE_REFUSALS)
def test_sample_refuses_arguments_that_cannot_work(words, sentence, tmp_path, capsys):
    assert refusal(capsys, "sample", tmp_path, "--out", tmp_path / "out", *words) == f"sdtrain: {sentence}"
    assert not (tmp_path / "out").exists()


def test_sample_says_what_a_source_has_not(run_folder, plain_file, tmp_path, capsys, monkeypatch):
    to = ["--out", tmp_path / "out"]
    best = run_folder / "best" / "G_ema.safetensors"
    said = refusal(capsys, "sample", run_folder, *to, "--class", 2)
    assert said == f"sdtrain: --class 2: {best} has the classes 0 to 1"
    said = refusal(capsys, "sample", run_folder, *to, "--class", "bb")
    assert said == f"sdtrain: --class bb: {best} has the classes 0 to 1, none of that name; did you mean b?"
    said = refusal(capsys, "sample", run_folder, *to, "--class", "zebra")
    assert said == f"sdtrain: --class zebra: {best} has the classes 0 to 1, none of that name; the names are a, b"
    said = refusal(capsys, "sample", plain_file, *to, "--class", 0)
    assert said == f"sdtrain: --class 0: {plain_file} has no classes; leave it out"
    said = refusal(capsys, "sample", plain_file, *to, "--truncation", 0.7)
    assert said == "sdtrain: --truncation is for generators with a style space; fastgan has none, leave it out"
    said = refusal(capsys, "sample", plain_file, *to, "--mixing-grid")
    assert said == "sdtrain: --mixing-grid is for generators with a style space; fastgan has none"
    critic = run_folder / "checkpoints" / "img_000000032" / "D.safetensors"
    said = refusal(capsys, "sample", critic, *to)
    assert said == f"sdtrain: {critic} holds a discriminator, which makes no images; give the file of a generator"
    Image.new("RGB", (8, 8)).save(picture := tmp_path / "a.png")
    said = refusal(capsys, "upscale", picture, "--model", run_folder, *to)
    assert said == f"sdtrain: {best} holds stylegan2, which draws images from noise; use `sdtrain sample`"
    said = refusal(capsys, "sample", tmp_path / "nothing", *to)
    assert said.endswith("nothing; give a run folder, a checkpoint folder or a weights file")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refusal(capsys, "sample", run_folder, *to, "--interpolate", 2, "--mp4")
    assert said == "sdtrain: --mp4 needs the program ffmpeg, which is not on this machine; install it, or take --gif"
    assert not (tmp_path / "out").exists()


# evaluate RUN


def rows(file: Path, kind: str = "eval") -> list[dict]:
    return [row for row in map(json.loads, file.read_text().splitlines()) if row.get("kind") == kind]


def test_a_run_is_measured_as_it_measured_itself(run_folder, tmp_path, capsys):
    metrics = run_folder / "metrics.jsonl"
    words = ["--json", tmp_path / "rows.jsonl", "--cache", tmp_path / "cache", "--workers", 0]
    assert command("evaluate", run_folder, "--split", "val", "--against", metrics, *words) == 0
    own, again = rows(metrics)[-1], rows(tmp_path / "rows.jsonl")[-1]
    assert again["rfid"] == pytest.approx(own["rfid"], rel=1e-12)
    assert again["protocol"] == own["protocol"]
    assert (again["seen_img"], again["weights"]) == (32, "ema")
    assert "->" in capsys.readouterr().out


def test_a_run_with_random_inception_is_measured_with_the_same_stand_in(run_folder, tmp_path):
    copy, metrics = tmp_path / "run", run_folder / "metrics.jsonl"
    shutil.copytree(run_folder, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["weights"]["inception"], tree["metrics"]["extractor"] = "random", "inception"
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    words = ["--split", "val", "--cache", tmp_path / "cache", "--workers", 0, "--against", metrics]
    assert command("evaluate", copy, *words) == 0


def test_an_unlike_seed_or_number_is_told_apart_from_the_runs_own_protocol(run_folder, tmp_path, capsys):
    words = ["--against", run_folder / "metrics.jsonl", "--cache", tmp_path / "cache", "--workers", 0]
    said = refusal(capsys, "evaluate", run_folder, *words, "--num", 4)
    assert "num_fake: 6 and 4" in said


def test_split_test_of_a_run_is_measured_on_other_latents_than_chose_its_weights(run_folder):
    def filled(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        args = parser.parse_args([str(run_folder), *words])
        evaluate.fill_in(args, source.config_of(run_folder))
        return args

    assert filled("--split", "val").seed == 7 and filled().seed == filled("--split", "test").seed == 8
    assert filled("--seed", "3").seed == 3


# bench


def test_the_cost_table_compares_variants_and_splits_the_cost(config, tmp_path, capsys):
    words = ["--steps", 2, "--variants", "baseline,sd-l1,sd", "--json", tmp_path / "bench.jsonl"]
    assert command("bench", "--cfg", config, *words) == 0
    out = capsys.readouterr().out
    assert "medians of 2 interleaved steps" in out and "images of " in out
    found = json.loads((tmp_path / "bench.jsonl").read_text())
    rows_of = found["variants"]
    assert list(rows_of) == ["baseline", "sd-l1", "sd"]
    assert rows_of["baseline"]["ratio"] == 1
    assert rows_of["sd"]["ratio"] > 2, "VGG weighs more than a toy generator"
    assert rows_of["sd"]["memory_gb"] > rows_of["sd-l1"]["memory_gb"] >= rows_of["baseline"]["memory_gb"] > 0
    split = found["distillation"]
    assert list(split["parts"]) == ["teacher forward", "T", "distance forward", "backward"]
    # Two images through VGG16 forward, one back to the pixels: half of the forward operations again
    forward, backward = (split["parts"][name]["flops"] for name in ("distance forward", "backward"))
    assert backward == pytest.approx(forward / 2, rel=0.1)
    total = sum(part["seconds"] for part in split["parts"].values())
    assert 0.3 < total / split["measured_extra"] < 3


def test_bench_amortises_what_is_done_every_few_steps(config):
    from sdtrain.commands.variants import Variant
    from sdtrain.config.load import load_config

    lazy = load_config(config, ["r1.gamma=1", "path_length.weight=2", "r1.every=16", "path_length.every=4"])
    variant = Variant("lazy", lazy, torch.device("cpu"), 16, (1, 1))
    assert variant.shares() == {"ema": 1, "G": 1, "G_pl": 1 / 4, "D": 1, "D_r1": 1 / 16}
    assert variant.step_seconds({"G": 1.0, "G_pl": 4.0, "D": 1.0, "D_r1": 16.0, "ema": 0.0}) == 4.0


def test_bench_amortises_lazy_self_distillation(config, monkeypatch):
    from sdtrain.commands.variants import BETWEEN, Variant, compare, synthetic
    from sdtrain.config.load import load_config
    from sdtrain.engine.timing import Clock

    lazy = load_config(config, ["sd.alpha=1", "sd.loss=l1", "sd.augment=false", "sd.every=5"])
    variant = Variant("lazy", lazy, torch.device("cpu"), 16, (1, 1))
    assert variant.shares() == {"ema": 1, "G": 1 / 5, BETWEEN: 4 / 5, "D": 1}
    assert variant.step_seconds({"G": 5.0, BETWEEN: 2.5, "D": 1.0, "ema": 0.0}) == 4.0
    phases, plain = [], variant.method.L_SD

    def noted(fake, x, draws):
        phases.append(x.step)
        return plain(fake, x, draws)

    monkeypatch.setattr(variant.method, "L_SD", noted)
    batch = synthetic(lazy, variant.method.feed, 16, 2)
    compare([variant], itertools.repeat(batch), 2, Clock(torch.device("cpu")))
    assert set(phases) == {0, 240, 480}, "every fifth step has L_SD, and those between have none"
    assert list(variant.seconds) == ["G", BETWEEN, "D", "ema"] and len(variant.seconds[BETWEEN]) == 2
    assert set(variant.memory) == {"G", BETWEEN, "D"} and variant.memory[BETWEEN] < variant.memory["G"]


def test_bench_runs_on_noise_and_says_so(config, capsys):
    words = ["--set", "data.train=no/such/shards", "--resolution", 32, "--steps", 1, "--variants", "baseline", "--bf16"]
    assert command("bench", "--cfg", config, *words) == 0
    out = capsys.readouterr().out
    assert "noise instead of images: waiting for data is not measured" in out
    assert "at 32 px on CPU" in out and ", bf16, batch 8 in ghosts of 4" in out


def test_bench_refuses_what_it_cannot_compare(config, capsys):
    said = refusal(capsys, "bench", "--cfg", config, "--variants", "sd,fast")
    assert said == "sdtrain: --variants has fast; choose from baseline, sd-l1, sd-plain, sd, sd-bf16"
    said = refusal(capsys, "bench", "--cfg", config, "--steps", 0)
    assert said == "sdtrain: --steps 0: measure at least 1 step"
    said = refusal(capsys, "bench", "--cfg", "dirac")
    assert said == "sdtrain: dirac: method dirac has no self-distillation (sd) whose cost could be shown"
    said = refusal(capsys, "bench", "--cfg", config, "--set", "data.train=no/such/shards")
    assert said == "sdtrain: no/such/shards cannot be read and says no size; add --resolution PIXELS"


# report: what it shows of saved weights


def test_variation_and_interplay_come_from_the_checkpoints(run_folder, tmp_path, capsys):
    words = ["--variation", "--latents", 4, "--interplay", "--interplay-latents", 24, "--extremes", 9]
    assert command("report", run_folder, "--out", tmp_path / "page.md", *words, "--lpips", "random") == 0
    out = capsys.readouterr().out
    assert "LPIPS of random weights between consecutive weights, 4 latents" in out
    assert "| toy | 40, 100 | 16, 32 |" in out
    picture = tmp_path / "page_interplay_toy.png"
    assert picture.is_file() and f"![{picture.stem}]" in (tmp_path / "page.md").read_text()


def test_quadrants_hold_the_extremes_of_both_objectives(run_folder):
    from argparse import Namespace

    from sdtrain.commands import snapshots

    args = Namespace(device="cpu", lpips="random", interplay_latents=24, extremes=9, batch=5)
    found = snapshots.interplay(run_folder, args)
    worst, best = found["worst"], found["best"]
    assert min(worst["distances"]) >= max(best["distances"])
    for part in (worst, best):
        assert part["logits"] == sorted(part["logits"])
        assert part["images"].shape == (8, 16, 16, 3)
    again = snapshots.interplay(run_folder, args)
    assert again["worst"]["indices"] == worst["indices"] and again["best"]["logits"] == best["logits"]


def snapshot_of(run: Path, checkpoint: int, at: int) -> Path:
    """A snapshot at `at` images with the weights of a checkpoint, complete."""
    from sdtrain.engine.checkpoint import digest

    folder = run / "snapshots" / f"img_{at:09d}"
    folder.mkdir(parents=True)
    names = ("G.safetensors", "G_ema.safetensors")
    for name in names:
        shutil.copy(run / "checkpoints" / f"img_{checkpoint:09d}" / name, folder)
    (folder / "complete.json").write_text(json.dumps({"files": {name: digest(folder / name) for name in names}}))
    return folder


VARIATION = ["--variation", "--latents", 4, "--lpips", "random", "--device", "cpu"]


def test_variation_takes_snapshots_and_checkpoints_at_the_shares_asked_for(run_folder, tmp_path, capsys):
    run = tmp_path / "toy"
    shutil.copytree(run_folder, run)
    snapshot_of(run, 16, 8), snapshot_of(run, 32, 24)
    assert command("report", run, "--out", tmp_path / "a.md", *VARIATION, "--shares", "25,50,75,100") == 0
    said = capsys.readouterr()
    assert "| toy | 25, 50, 75, 100 | 8, 16, 24, 32 |" in said.out and "no weights" not in said.err
    assert command("report", run, "--out", tmp_path / "a.md", *VARIATION, "--shares", "50,100") == 0
    assert "| toy | 50, 100 | 16, 32 |" in capsys.readouterr().out


def test_shares_without_weights_and_damaged_weights_are_named(run_folder, tmp_path, capsys):
    run = tmp_path / "toy"
    shutil.copytree(run_folder, run)
    broken, unmarked = snapshot_of(run, 16, 8), snapshot_of(run, 16, 24)
    (broken / "G_ema.safetensors").write_bytes(b"x")
    (unmarked / "complete.json").unlink()
    assert command("report", run, "--out", tmp_path / "a.md", *VARIATION, "--shares", "25,50,75,100") == 0
    said = capsys.readouterr()
    assert "| toy | 50, 100 | 16, 32 |" in said.out
    assert "toy: no weights within 16 images of 25, 75 % of 32 images" in said.err
    assert "toy: img_000000008 is not used: G_ema.safetensors does not match its digest" in said.err
    assert "toy: img_000000024 is not used: it has no marker" in said.err
    shutil.rmtree(run / "checkpoints" / "img_000000016")
    said = refusal(capsys, "report", run, "--out", tmp_path / "a.md", *VARIATION)
    assert said == (
        f"sdtrain: {run} has weights at 1 of the shares 20, 40, 60, 80, 100 % of 32 images, and variation compares at "
        "least two; save snapshots, raise keep_checkpoints, or name other --shares"
    )


def test_runs_saved_at_unlike_shares_have_tables_of_their_own(run_folder, tmp_path, capsys):
    run = tmp_path / "other"
    shutil.copytree(run_folder, run)
    snapshot_of(run, 16, 7)
    assert command("report", run_folder, run, "--out", tmp_path / "a.md", *VARIATION) == 0
    said = capsys.readouterr()
    assert said.out.count("LPIPS of random weights between consecutive weights") == 2
    assert "toy and other: shares 40, 100 and 20, 40, 100" in said.err


def test_a_position_stands_for_the_share_it_is_nearest_to_and_for_no_other():
    from sdtrain.commands.snapshots import at_shares

    shares = [20.0, 40.0, 60.0, 80.0, 100.0]
    assert at_shares([200, 400, 600, 800, 1000], shares, 1000, 100) == dict(zip(shares, [200, 400, 600, 800, 1000]))
    assert at_shares([190, 215, 500, 1000], shares, 1000, 500) == {20.0: 190, 40.0: 500, 100.0: 1000}
    assert at_shares([150, 900], shares, 1000, 49) == {}


def test_variation_does_not_depend_on_how_many_images_are_made_at_once(run_folder, tmp_path, capsys):
    said = []
    for batch in (1, 3):
        assert command("report", run_folder, "--out", tmp_path / "a.md", *VARIATION, "--batch", batch) == 0
        said.append(next(line for line in capsys.readouterr().out.splitlines() if "40, 100" in line))
    assert said[0] == said[1]
