"""SDAKD. Without these an equation could lose a term, a stage could start from the wrong weights after a kill, or a
teacher could go on learning, and the only sign would be a student that is a little worse than it should be.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, run_ranks
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from sdtrain.config.load import load_config
from sdtrain.config.options import parse_span, span_img
from sdtrain.contracts import Chunk, Stage, spans
from sdtrain.data.degrade.chain import apply_chain, decide, flip_images
from sdtrain.data.degrade.kernels import sharpen
from sdtrain.engine.runfolder import RunFolder
from sdtrain.errors import ConfigError, DataError, WeightsError
from sdtrain.interop.pth import save_pth
from sdtrain.main import main
from sdtrain.methods.sdakd import build as sr_build
from sdtrain.plan import check_data, make_plan
from sdtrain.rng import Draws
from sdtrain.tasks import sr_pictures
from sdtrain.trainer import Trainer

SIDE = 32
ADAM = {"lr": 1e-3, "betas": [0.9, 0.99]}
NETS = {"G", "D", "MLP", "G_ema", "G_T", "D_T", "G_T_raw"}
PLAYERS = ("G_pixel", "G_original", "D_original", "G_sup", "D_sup", "G", "D")


def picture(number: int, side: int) -> Image.Image:
    """A colour gradient with a disc, a function of its number."""
    chance = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 2), -1)
    image = grid @ chance.normal(size=(2, 3)) * 60 + chance.uniform(60, 200, 3)
    image[np.linalg.norm(grid, axis=-1) < chance.uniform(0.2, 0.8)] = chance.uniform(0, 255, 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def tar(folder: Path, numbers: range, side: int = SIDE) -> str:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000.tar", "w") as file:
        for number in numbers:
            data = io.BytesIO()
            picture(number, side).save(data, "PNG")
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(data.getvalue())
            file.addfile(member, io.BytesIO(data.getvalue()))
    return str(folder)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lists")
    parts = {"train": range(24), "val": range(100, 103), "test": range(200, 203)}
    return {name: tar(root / name, numbers) for name, numbers in parts.items()}


def settings(lists: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Three stages of four steps, the first half of them L1 alone, with the degradation, the pool and everything on."""
    tree = {
        "method": "sdakd",
        "batch_size": 4,
        "ghost_batch": 2,
        **{n: "4 steps" for n in ("n1", "n2", "n3")},
        **{"log_img": 4, "sample_img": 0, "save_img": 8, "eval_img": 8, "eval_epochs": 0, "keep_checkpoints": 99},
        "tracker": "none",
        "data": {**lists, "workers": 0, "resolution": SIDE},
        "model": {
            "generator": {"kind": "rrdbnet", "num_feat": 8, "num_grow_ch": 4, "num_block": 1},
            "discriminator": {"kind": "unet_sn", "num_feat": 4},
        },
        "student": {"C": "1/2"},
        "lambda_2": "auto",
        "recipe": {"perceptual": 0, "pixel_share": 0.5},
        "supervision": {"perceptual": 0},
        "degradation": {
            **{"source_size": SIDE, "crop_size": SIDE, "pool_size": 4, "kernel_size": [3, 5]},
            "resize_range1": [0.5, 1.5],
        },
        "optimizer": {name: ADAM for name in PLAYERS},
        "ema": {"decay": 0.5, "rampup": None},
        "validation": {"lq": "bicubic", "names": ["psnr_y", "ssim_y"], "select_by": "psnr_y", "histogram_images": 3},
        "metrics": {"extractor": "random-inception", "tap": 64},
        "weights": {"perceptual": "random", "alex": "random"},
    }
    for key, value in changes.items():
        *outer, last = key.split("__")
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = copy.deepcopy(value)
    return tree


FACES: dict[str, Any] = {
    "model": {
        "generator": {"kind": "gcfsr", "narrow": 0.03125, "num_style_feat": 8},
        "discriminator": {"kind": "gcfsr", "narrow": 0.03125},
    },
    "order": "D first",
    "lq": "down_up",
    "factors": [4, 8],
    "r1": {"gamma": 10, "every": 2, "joint": True},
    "perceptual": "vgg16",
    "validation": {"lq": "down_up", "factors": [4, 8], "names": ["fid", "psnr_y"], "histogram_images": 2},
}


def write(folder: Path, tree: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(json.dumps(tree))
    return str(folder / "tiny.yaml")


def load(tmp_path: Path, tree: dict[str, Any]) -> Any:
    return load_config(write(tmp_path / "cfg", tree))


def build(config: Any, side: int = SIDE) -> Any:
    """The method, wired; `enter` begins one of its stages."""
    return Trainer(config, torch.device("cpu"), side, num_samples=6 * config.batch_size)


def stage(trainer: Any, name: str) -> Stage:
    return next(stage for stage in trainer.method.stages if stage.name == name)


def rows(run: Path, kinds: tuple[str, ...] = ("train", "eval", "baseline")) -> list[dict[str, Any]]:
    return [row for line in (run / "metrics.jsonl").open() if (row := json.loads(line))["kind"] in kinds]


def chunk(method: Any, config: Any, step: int = 0) -> Chunk:
    draws = Draws(seed=0, step=step, ghosts=(0, 1), ghost_batch=config.ghost_batch)
    images = torch.stack([torch.from_numpy(np.array(picture(i, SIDE))).permute(2, 0, 1) for i in range(4)])
    x = Chunk(step=step, seen_img=0, real=method.to_range(images), labels=None, draws=draws)
    return method.inputs.prepare(x, "supervised")


@pytest.fixture
def students(lists, tmp_path) -> tuple[Any, Any, Chunk]:
    """(method, config, chunk) with frozen teachers, as stages 2 and 3 have them."""
    config = load(tmp_path, settings(lists, lambda_1=0.7, lambda_2=0.3))
    trainer = build(config)
    trainer.enter(stage(trainer, "supervised"), {})
    return trainer.method, config, chunk(trainer.method, config)


def naive_sup(method: Any, x: Chunk) -> torch.Tensor:
    fake, teacher = method.nets["G"](x.inputs["lq"]), method.nets["G_T"](x.inputs["lq"])
    return sum((a - b).abs() for a, b in zip(fake.flatten(), teacher.flatten())) / fake.numel()


def naive_mlp(method: Any, x: Chunk) -> torch.Tensor:
    """Pixel by pixel: |W2 relu(W1 f_S + b1) + b2 - f_T|^2, mean over all elements."""
    _, s = method.nets["G"](x.inputs["lq"], layers=("trunk",))
    _, t = method.nets["G_T"](x.inputs["lq"], layers=("trunk",))
    W1, b1, W2, b2 = (p.flatten(1) if p.ndim == 4 else p for p in method.nets["MLP"].module.parameters())
    f_s, f_t, total = s["trunk"], t["trunk"], torch.zeros(())
    for n in range(len(f_s)):
        for y in range(f_s.shape[2]):
            for v in range(f_s.shape[3]):
                total = total + ((W2 @ (W1 @ f_s[n, :, y, v] + b1).relu() + b2 - f_t[n, :, y, v]) ** 2).sum()
    return total / f_t.numel()


def test_eq_1_is_the_distance_to_the_teacher_plus_lambda_1_times_the_map_distance(students):
    method, config, x = students
    loss, terms = method.loss_G_stage2(x)
    torch.testing.assert_close(terms["G/sup"], naive_sup(method, x))
    torch.testing.assert_close(terms["G/mlp"], naive_mlp(method, x))
    torch.testing.assert_close(loss, naive_sup(method, x) + 0.7 * naive_mlp(method, x))


def test_eq_2_is_the_mean_square_of_the_difference_of_probabilities_on_both_kinds_of_images(students):
    method, config, x = students
    method.loss_G_stage2(x)
    images = method.judged_in_stage2(x)
    real = [torch.equal(a, b) for a, b in zip(images, x.real)]
    assert real == [True, False, True, False]  # half of each ghost
    assert [torch.equal(a, b) for a, b in zip(method.judged_in_stage2(replace(x, step=1)), x.real)] != real
    method.nets["D"].module.eval()  # the same spectral vectors for both computations
    loss, _ = method.loss_D_stage2(x)
    p_s, p_t = (1 / (1 + torch.exp(-method.nets[n](images))) for n in ("D", "D_T"))
    torch.testing.assert_close(loss, ((p_s - p_t) ** 2).sum() / p_s.numel())


def test_eq_3_adds_lambda_2_times_the_adversarial_loss_of_the_student_discriminator(students):
    method, config, x = students
    method.nets["D"].module.eval()
    loss, terms = method.loss_G_stage3(x)
    logits = method.nets["D"](method.nets["G"](x.inputs["lq"]))
    adv = -torch.log(torch.sigmoid(logits)).mean()
    torch.testing.assert_close(terms["G/adv"], adv)
    torch.testing.assert_close(loss, naive_sup(method, x) + 0.7 * naive_mlp(method, x) + 0.3 * adv)


def test_eq_4_is_the_adversarial_loss_on_ground_truth_and_on_the_images_of_the_generators_step(students):
    method, config, x = students
    method.nets["D"].module.eval()
    method.loss_G_stage3(x)
    fake = method.nets["G"](x.inputs["lq"])
    with torch.no_grad():
        method.nets["G"].module.conv_last.bias.add_(1.0)  # the step of G: D must still see the images before it
    loss, _ = method.loss_D_stage3(x)
    bce = F.binary_cross_entropy_with_logits
    real, judged = method.nets["D"](x.real), method.nets["D"](fake)
    torch.testing.assert_close(loss, bce(real, torch.ones_like(real)) + bce(judged, torch.zeros_like(judged)))


def wide_chunk(method: Any, config: Any, stage: str, step: int = 0) -> tuple[torch.Tensor, Chunk, Chunk]:
    """(mirrored sources in [0, 1], the chunk as it came, the prepared chunk) of a degradation that crops 64 to 32."""
    draws = Draws(seed=0, step=step, ghosts=(0, 1), ghost_batch=config.ghost_batch)
    images = torch.stack([torch.from_numpy(np.array(picture(i, 64))).permute(2, 0, 1) for i in range(4)])
    x = Chunk(step=step, seen_img=0, real=method.to_range(images), labels=None, draws=draws)
    mirrored = flip_images(x.real, draws.sub("degrade"), config.degradation.flip_prob)
    return mirrored, x, method.inputs.prepare(x, stage)


def official_pair(gt: torch.Tensor, config: Any, x: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(raw crops, sharpened crops, LQ crops) as published: sharpen the whole, degrade that, then cut all alike."""
    cut: list[list[torch.Tensor]] = [[], [], []]
    for row, ghost in enumerate(x.draws.ghosts):
        one = x.draws.select([ghost])
        raw = gt[row * 2 : row * 2 + 2]
        sharp = sharpen(raw)
        lq = apply_chain(sharp, decide(config.degradation, one), 4)
        top, left = (int(v * (16 - 8 + 1)) for v in one.uniform_per_ghost("degrade/crop", 2)[0].tolist())
        for found, image, k in zip(cut, (raw, sharp, lq), (4, 4, 1)):
            found.append(image[..., top * k : top * k + 8 * k, left * k : left * k + 8 * k])
    raw, sharp, lq = (torch.cat(part) for part in cut)
    return raw, sharp, lq


WIDE = {"degradation__source_size": 64, "data__resolution": 64}


@pytest.mark.parametrize("stage", ["teacher_pixel", "naive_pixel"])
def test_the_stage_of_L1_alone_compares_with_crops_of_the_sharpened_source_that_was_degraded(lists, tmp_path, stage):
    config = load(tmp_path, settings(lists, **WIDE))
    method = build(config).method
    gt, x, made = wide_chunk(method, config, stage)
    raw, sharp, lq = official_pair(gt, config, x)
    assert torch.equal(made.inputs["lq"], lq)
    assert torch.equal(method.inputs.target(made), sharp)
    assert (sharpen(raw) - sharp).abs().max() > 0.005  # what sharpening after the crop would give
    loss, _ = method.loss_pixel("G_T_raw", made)
    torch.testing.assert_close(loss, (method.nets["G_T_raw"](lq) - sharp).abs().mean())


def test_the_adversarial_recipe_judges_raw_crops_and_sharpens_its_target_after_the_pool(lists, tmp_path):
    config = load(tmp_path, settings(lists, **WIDE))
    method = build(config).method
    gt, x, made = wide_chunk(method, config, "teacher")
    raw, _, lq = official_pair(gt, config, x)
    assert torch.equal(made.real, raw) and torch.equal(made.inputs["lq"], lq)
    assert torch.equal(method.inputs.target(made), sharpen(raw))


def test_no_sharpened_image_of_the_L1_stage_is_left_in_the_pool_of_the_next(lists, tmp_path):
    config = load(tmp_path, settings(lists, **WIDE))
    method = build(config).method
    for step in range(3):  # a pool of 4 pairs a ghost is full after two steps
        wide_chunk(method, config, "teacher_pixel", step)
    assert {len(pool["_order"]) for pool in method.ghost_state().values()} == {4}
    resumed = build(config).method
    resumed.load_ghost_state(copy.deepcopy(method.ghost_state()), torch.device("cpu"))
    for step in range(3, 7):
        (gt, x, made), (_, _, again) = (wide_chunk(m, config, "teacher", step) for m in (method, resumed))
        assert torch.equal(made.real, (made.real * 255).round() / 255)  # levels of 8 bits: never sharpened
        assert torch.equal(made.real, again.real) and torch.equal(made.inputs["lq"], again.inputs["lq"])
        if step < 5:  # the pool fills again
            assert torch.equal(made.real, official_pair(gt, config, x)[0])


def test_self_distillation_adds_the_distance_to_the_students_own_average(lists, tmp_path):
    config = load(tmp_path, settings(lists, lambda_2=0.3, sd={"alpha": 2.0, "loss": "l1", "augment": False}))
    trainer = build(config)
    trainer.enter(stage(trainer, "adversarial"), {})
    method = trainer.method
    x = chunk(method, config)
    with torch.no_grad():
        method.nets["G_ema"].module.conv_last.bias.add_(0.25)
    loss, terms = method.loss_G_stage3(x)
    assert terms["G/sd"].item() == pytest.approx(0.5, rel=1e-4)  # 0.25 of [0, 1] is 0.5 of [-1, 1]
    plain = terms["G/sup"] + terms["G/mlp"] + 0.3 * terms["G/adv"]
    torch.testing.assert_close(loss, plain + 2.0 * terms["G/sd"])


def test_lambda_1_zero_computes_no_map_and_trains_no_mlp(lists, tmp_path):
    trainer = build(load(tmp_path, settings(lists, lambda_1=0)))
    assert "MLP" not in trainer.nets and trainer.method.layers == ()
    assert stage(trainer, "supervised").players["G_sup"] == ("G",)


def test_teachers_get_no_gradient_in_the_stages_of_the_students(students):
    method, config, x = students
    loss, _ = method.loss_G_stage3(x)
    loss.backward()
    for name in ("G_T", "D_T", "G_ema"):
        module = method.nets[name].module
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert not module.train().training
    assert all(p.grad is not None for name in ("G", "MLP") for p in method.nets[name].module.parameters())


def test_frozen_teachers_cost_no_optimizer_state_and_the_plan_says_what_each_stage_trains(lists, tmp_path):
    plan = make_plan(load(tmp_path, settings(lists)))
    assert [s["name"] for s in plan["stages"]] == ["teacher_pixel", "teacher", "supervised", "adversarial"]
    assert [s["end_img"] for s in plan["stages"]] == [8, 16, 32, 48]
    assert plan["stages"][3]["trains"] == ["G", "MLP", "D"]
    of = plan["networks"]
    live = max(of["G_T_raw"]["trainable"] + of["D_T"]["trainable"], sum(of[n]["trainable"] for n in ("G", "MLP", "D")))
    assert plan["memory_gb_per_rank"]["optimizer"] == pytest.approx(live * 8 / 1e9)


@pytest.mark.parametrize(
    "text, images",
    [("2 epochs", 48), ("3 steps", 12), ("64 images", 64), ("1kimg", 1000), ("1ki", 1000), ("0 steps", 0)],
)
def test_lengths_are_epochs_steps_or_images(text, images):
    assert span_img(parse_span(text), 6.0, 4) == images


def test_stages_follow_each_other_on_one_clock_and_given_teachers_leave_out_stage_1(lists, tmp_path):
    config = load(tmp_path, settings(lists, n3="1 epoch"))
    ends = [(s.name, s.end_img) for s in sr_build.stages_of(config, NETS, 6.0, 4)]
    assert ends == [("teacher_pixel", 8), ("teacher", 16), ("supervised", 32), ("adversarial", 56)]
    given = replace(config, teacher=replace(config.teacher, generator="a", discriminator="b"))
    assert [s.name for s in sr_build.stages_of(given, NETS, 6.0, 4)] == ["supervised", "adversarial"]
    short = sr_build.stages_of(replace(config, total_img=20), NETS, 6.0, 4)
    assert (short[-1].name, short[-1].end_img) == ("supervised", 20)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"stages": ["naive"]}, {"naive_pixel": ("G",), "naive": ("G", "D")}),
        ({"adversary": "teacher"}, {"supervised": ("G", "MLP"), "adversarial": ("G", "MLP", "D")}),
        ({"adversary": "teacher", "teacher_d": "frozen"}, {"adversarial": ("G", "MLP")}),
    ],
)
def test_baselines_and_ablations_are_configurations(lists, tmp_path, changes, expected):
    trainer = build(load(tmp_path, settings(lists, **changes)))
    method = trainer.method
    for name, nets in expected.items():
        assert tuple(net for part in stage(trainer, name).players.values() for net in part) == nets
    if "adversary" in changes:
        assert method.nets["D"].module.options.num_feat == 4  # the teacher's width
        trainer.enter(stage(trainer, "adversarial"), {})
        for key, value in method.nets["D_T"].module.state_dict().items():
            torch.testing.assert_close(method.nets["D"].module.state_dict()[key], value)
    else:
        assert "G_T" not in method.nets


@pytest.fixture(scope="module")
def finished(lists, tmp_path_factory) -> Path:
    """A whole run, uninterrupted, with a checkpoint after every second step."""
    root = tmp_path_factory.mktemp("run")
    assert main(["--cfg", write(root, settings(lists)), "--out", str(root / "whole")]) == 0
    return root / "whole"


def test_a_run_leaves_the_best_and_the_last_of_each_stage_and_tests_once(finished):
    best = {path.name for path in (finished / "best").glob("*.safetensors")}
    for stage in ("teacher", "supervised", "adversarial"):
        assert {f"{stage}_G.safetensors", f"{stage}_last_G.safetensors", f"{stage}_last_D.safetensors"} <= best
    found = rows(finished, ("eval",))
    assert [r["split"] for r in found].count("test") == 1 and found[-1]["split"] == "test"
    assert {r["seen_img"] for r in found if r["split"] == "val"} == {8, 16, 24, 32, 40, 48}
    assert all(len(r["protocol"]["lq_hash"]) == 64 for r in found)
    chosen = json.loads((finished / "best" / "metrics.json").read_text())
    late = [r for r in found if r["split"] == "val" and r["stage"] == "adversarial"]
    assert chosen["psnr_y"] == max(r["psnr_y"] for r in late)


def test_the_exported_student_is_the_one_that_was_tested(finished, lists):
    from sdtrain.interop.loading import load_network

    net = load_network(finished).build()
    assert net.options.num_feat == 4
    best = load_file(finished / "best" / "adversarial_G.safetensors")
    assert all(torch.equal(best[key], value) for key, value in net.state_dict().items())


def test_an_export_of_a_run_shows_what_it_was_tested_with_and_on_its_own_inputs(finished, tmp_path):
    from sdtrain.cli import main as command

    to = tmp_path / "export"
    assert command(["export", str(finished), "--to", str(to), "--format", "safetensors", "--format", "spandrel"]) == 0
    proof, card = json.loads((to / "export.json").read_text()), (to / "README.md").read_text()
    assert proof["inputs"] == "the inputs that the run measures on (test)" and len(proof["artefacts"]) == 2
    tested = rows(finished, ("eval",))[-1]
    assert f"| student (adversarial) at {tested['seen_img']} images |" in card and f"{tested['psnr_y']:.3f}" in card
    assert tested["protocol"]["lq_hash"] in card and "width of the student | C " in card


def test_lambda_2_auto_balances_eq_3_once_and_is_kept(finished):
    late = [r for r in rows(finished, ("train",)) if r["stage"] == "adversarial"]
    assert len({r["G/lambda_2"] for r in late}) == 1
    assert late[0]["G/ratio_adv"] == pytest.approx((1 + late[0]["G/ratio_mlp"]) / 2, rel=0.05)
    state = json.loads((finished / "checkpoints" / "img_000000048" / "state.json").read_text())
    assert state["method"]["lambda_2"] == pytest.approx(late[0]["G/lambda_2"], rel=1e-6)


def test_a_finished_run_that_is_started_again_measures_nothing_twice(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert main(["--cfg", str(finished.parent / "tiny.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert rows(tmp_path / "run") == rows(finished)


def killed_at(finished: Path, position: int, target: Path) -> Path:
    """The run folder as a kill right after the checkpoint at `position` leaves it; best/ is lost as well."""
    shutil.copytree(finished, target)
    for path in (target / "checkpoints").glob("img_*"):
        if int(path.name.removeprefix("img_")) > position:
            shutil.rmtree(path)
    shutil.rmtree(target / "best")
    return target


# 8 and 16 and 32 are hand-overs, the others lie inside a stage
@pytest.mark.parametrize("position", [8, 16, 24, 32, 40])
def test_a_killed_run_goes_on_bit_for_bit_and_enters_each_stage_once(finished, tmp_path, position, monkeypatch):
    entered: list[str] = []
    take = Trainer.take_starts

    def taken(self: Any, stage: Stage, best: Any) -> None:
        entered.append(stage.name)
        take(self, stage, best)

    monkeypatch.setattr(Trainer, "take_starts", taken)
    run = killed_at(finished, position, tmp_path / "run")
    assert main(["--cfg", str(finished.parent / "tiny.yaml"), "--out", str(run)]) == 0
    ends = {"teacher_pixel": 8, "teacher": 16, "supervised": 32, "adversarial": 48}
    begins = dict(zip(ends, [0, 8, 16, 32]))
    assert entered == [stage for stage in ends if begins[stage] >= position]
    assert rows(run) == rows(finished)
    for file in (finished / "checkpoints" / "img_000000048").glob("*.safetensors"):
        assert file.read_bytes() == (run / "checkpoints" / "img_000000048" / file.name).read_bytes(), file.name
    assert (finished / "best" / "G_ema.safetensors").read_bytes() == (run / "best" / "G_ema.safetensors").read_bytes()


def test_stage_3_starts_from_the_generator_that_validation_liked_and_the_last_discriminator(lists, tmp_path):
    trainer = build(load(tmp_path, settings(lists)))
    method = trainer.method
    liked = {k: v + 1 for k, v in method.nets["G_ema"].module.state_dict().items()}
    D = {k: v.clone() for k, v in method.nets["D"].module.state_dict().items()}
    trainer.enter(stage(trainer, "adversarial"), {"G_ema": liked})
    for net in ("G", "G_ema"):
        assert all(torch.equal(liked[k], v) for k, v in method.nets[net].module.state_dict().items())
    assert all(torch.equal(D[k], v) for k, v in method.nets["D"].module.state_dict().items())


@pytest.mark.parametrize("work", ["photos", pytest.param("faces", marks=pytest.mark.slow)])
def test_one_and_two_ranks_agree_in_every_stage(lists, tmp_path, work):
    tree = settings(lists, **(FACES if work == "faces" else {}), validation__names=["psnr_y", "fid"])
    tree |= {n: "7 steps" for n in ("n1", "n2", "n3")} | {"save_img": 0, "eval_img": 28}
    cfg = write(tmp_path, tree)
    assert main(["--cfg", cfg, "--out", str(tmp_path / "one")]) == 0
    done = run_ranks(2, "sdtrain/main.py", "--cfg", cfg, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 rank(s)" in done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, rel=1e-4, abs=2e-6), (key, a["seen_img"])
            else:
                assert b[key] == value


def test_gcfsr_measures_every_factor_and_selects_by_the_mean(lists, tmp_path):
    tree = settings(lists, **FACES, sd={"alpha": 1.0, "loss": "l1"})
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "run"), "--set", "eval_img=16"]) == 0
    row = rows(tmp_path / "run", ("eval",))[-1]
    assert row["fid"] == pytest.approx((row["fid_4"] + row["fid_8"]) / 2)
    late = [r for r in rows(tmp_path / "run", ("train",)) if r["stage"] == "adversarial"]
    assert any("D/r1" in r for r in late) and all("G/sd" in r for r in late)
    card = json.loads((tmp_path / "run" / "best" / "G_ema.json").read_text())
    assert card["resolution"] == SIDE and card["options"]["narrow"] == 0.015625


def test_validation_under_two_degradations_has_values_of_each_and_the_first_chooses(lists, tmp_path):
    names = ["psnr_y", "fid"]
    tree = settings(lists, validation__lq=["second_order", "bicubic"], validation__names=names, total_img=8, save_img=0)
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "both")]) == 0
    row = rows(tmp_path / "both", ("eval",))[0]
    assert row["protocol"]["lq"] == ["second_order", "bicubic"] and row["protocol"]["factors"] == [4]
    for name in names:
        assert row[name] == row[f"{name}_second_order"] != row[f"{name}_bicubic"]
    chosen = json.loads((tmp_path / "both" / "best" / "metrics.json").read_text())
    evals = [r for r in rows(tmp_path / "both", ("eval",)) if r["split"] == "val"]
    assert chosen["psnr_y"] == max(r["psnr_y_second_order"] for r in evals)
    for lq in ("second_order", "bicubic"):  # each is what a run of it alone measures, under the same protocol as before
        alone = tmp_path / lq
        assert main(["--cfg", str(tmp_path / "tiny.yaml"), "--out", str(alone), "--set", f"validation.lq={lq}"]) == 0
        first = rows(alone, ("eval",))[0]
        assert (first["protocol"]["lq"], first["psnr_y"]) == (lq, row[f"psnr_y_{lq}"])
        assert "psnr_y_bicubic" not in first


def test_discriminator_alone_is_trained_on_a_given_generator(lists, tmp_path, finished):
    path = finished / "best" / "teacher_G.safetensors"
    tree = settings(lists, teacher={"generator": str(path)}, total_img=16)
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "run")]) == 0
    stage = [r for r in rows(tmp_path / "run", ("train",)) if r["stage"] == "teacher"]
    assert len(stage) == 4 and all("D/real" in r and "G/adv" not in r for r in stage)
    saved = tmp_path / "run" / "checkpoints" / "img_000000016"
    assert not (saved / "G_T.safetensors").exists() and not (saved / "G_T_raw.safetensors").exists()


def test_given_teachers_are_in_no_checkpoint(lists, tmp_path, finished):
    files = {name: str(finished / "best" / f"teacher_{end}.safetensors") for name, end in TEACHERS.items()}
    tree = settings(lists, teacher=files, total_img=8)
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "run")]) == 0
    saved = {path.stem for path in (tmp_path / "run" / "checkpoints" / "img_000000008").glob("*.safetensors")}
    assert {"G", "D", "MLP", "G_ema"} <= saved and not {"G_T", "D_T", "G_T_raw"} & saved


TEACHERS = {"generator": "G", "discriminator": "last_D"}


def test_pictures_show_strips_and_what_discriminators_say(lists, tmp_path):
    tree = settings(lists, sample_img=16, total_img=16)
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "run")]) == 0
    made = tmp_path / "run" / "samples"
    with Image.open(made / "strips_000000016.png") as strip:
        assert strip.size == (5 * 192, 28 + 3 * 2 * 192)  # names, then 3 images with details
        header = np.asarray(strip.convert("L"))[:28].reshape(28, 5, 192)
        assert (header.min((0, 2)) < 100).all() and (header[0] == 255).all()  # each column has a name
    with Image.open(made / "d_outputs_000000016.png") as figure:
        assert figure.width > 500 and figure.height > 400  # two panels with axes and words
    assert (made / "strips_test_000000016.png").exists()
    said = json.loads((made / "d_outputs_000000016.json").read_text())
    for name in ("D_T", "D_S"):
        assert len(said[name]["probabilities"]) == 3 and sum(said[name]["counts"]) == 3
        assert len(said[name]["counts"]) == 20


def test_the_judge_of_the_ablations_is_named_as_the_teachers(lists, tmp_path, monkeypatch):
    written: dict[str, Any] = {}
    monkeypatch.setattr(RunFolder, "histogram", lambda self, tag, values, seen: written.setdefault(tag, seen))
    tree = settings(lists, adversary="teacher", lambda_1=0.0, sample_img=48, eval_img=0)
    legends, draw = [], sr_pictures.bars

    def bars(counts: dict[str, list[int]], title: str) -> Any:
        legends.append([*counts, title])
        return draw(counts, title)

    monkeypatch.setattr(sr_pictures, "bars", bars)
    assert main(["--cfg", write(tmp_path, tree), "--out", str(tmp_path / "run")]) == 0
    said = json.loads((tmp_path / "run" / "samples" / "d_outputs_000000048.json").read_text())
    assert list(said) == ["seen_img", "D_T", "D_T_judge"]
    title = "Discriminators on 3 images of the student, stage adversarial, 48 images seen"
    assert legends == [["D_T", "D_T_judge", title]]
    assert list(written) == ["d_outputs/D_T", "d_outputs/D_T_judge"]


REFUSALS = [
    ({"student": {"C": "1/16"}}, "C = 1/16 leaves num_feat without channels"),
    ({"student": {"C": 2}}, "lies outside (0, 1]"),
    ({**FACES, "student": {"C": "half"}}, "C = 'half' is not a number; write a fraction such as 1/4"),
    ({**FACES, "student": {"C": "1/1024", "style": "scaled"}}, "C = 1/1024 leaves num_style_feat without channels"),
    ({"stages": ["supervised", "adversarial"]}, "supervised needs a teacher generator and discriminator that nobody"),
    ({"stages": ["adversarial", "supervised"]}, "in this order, or naive alone"),
    ({"lq": "down_up"}, "lq down_up does not feed rrdbnet"),
    ({**FACES, "factors": [2, 64]}, "factors: factor 2 is outside [4, 64]"),
    ({**FACES, "validation__factors": [128]}, "validation.factors: factor 128 is outside [4, 64]"),
    ({"degradation__pool_size": 5}, "pool_size = 5 is not a multiple of ghost_batch = 2"),
    ({"validation__lq": ["bicubic", "down_up"]}, "validation.lq down_up does not feed rrdbnet"),
    ({"validation__lq": ["bicubic", "bicubic"]}, "validation.lq is [bicubic, bicubic]: name at least one"),
    ({"validation__lq": []}, "validation.lq is []: name at least one way"),
    ({"validation__select_by": "fid"}, "validation.select_by fid is not measured"),
    ({"degradation__crop_size": 16}, "recipe.sharpen_target needs crops of at least 26 pixels, not 16"),
    ({"degradation__crop_size": 28}, "crop_size 28 does not fit the networks, which take multiples of 8: set 24 or 32"),
    ({"n2": "soon"}, "write a number and its unit, such as 30 epochs, 500 steps or 64k images"),
    ({"model__discriminator": {"kind": "gcfsr"}}, "a gcfsr discriminator does not belong to a rrdbnet generator"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_a_configuration_that_cannot_work_is_refused_with_a_sentence(lists, tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, settings(lists, **changes))
    assert message in str(caught.value)


def test_gcfsr_refuses_a_student_without_channels(lists, tmp_path):
    config = load(tmp_path, settings(lists, **{**FACES, "student": {"C": "1/512"}}))
    with pytest.raises(ConfigError, match="without channels; use a larger C"):
        build(config)


def test_images_too_small_for_the_second_order_degradation_are_refused_with_the_keys_that_matter(lists, tmp_path):
    tree = settings(lists, degradation__kernel_size=[7, 21])
    with pytest.raises(ConfigError, match=r"source_size 32 is too small: the second-order degradation needs 44 pixels"):
        load(tmp_path, tree)
    tree["degradation"]["source_size"] = 400
    with pytest.raises(DataError, match=r"32 pixels, and the second-order .* needs 44 pixels; .*kernel_size, raise"):
        check_data(load(tmp_path, tree))


def test_images_smaller_than_the_crop_are_refused_before_training(lists, tmp_path):
    config = load(tmp_path, settings(lists, lq="bicubic", degradation__crop_size=64, degradation__source_size=64))
    with pytest.raises(DataError, match="holds images of 32 pixels, smaller than the crop of 64"):
        check_data(config)


@pytest.mark.parametrize("pair", [("val", "test"), ("val", "train"), ("test", "train")])
def test_lists_that_share_images_are_refused(lists, tmp_path, pair):
    again = tar(tmp_path / "again", {"train": range(5, 7), "test": range(201, 204)}[pair[1]])
    config = load(tmp_path, settings({**lists, pair[0]: again}))
    with pytest.raises(DataError, match=r"shares 2 images with data\.\w+ \(first 0\d\d\d\)"):
        check_data(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_feat": 16}, "asks for num_feat 16"),
        ({"scale": 2}, "asks for scale 2"),
        ({"kind": "srvgg"}, "asks for SRVGGNetCompact"),
    ],
)
def test_a_teacher_of_another_width_scale_or_architecture_is_refused(lists, tmp_path, finished, changes, message):
    generator = {"kind": "rrdbnet", "num_feat": 8, "num_grow_ch": 4, "num_block": 1, **changes}
    generator = {"kind": "srvgg"} if changes.get("kind") else generator
    files = {name: str(finished / "best" / f"teacher_{end}.safetensors") for name, end in TEACHERS.items()}
    config = load(tmp_path, settings(lists, model__generator=generator, teacher=files))
    with pytest.raises(WeightsError) as caught:
        build(config)
    assert message in str(caught.value) and "RRDBNet generator" in str(caught.value)


def test_the_run_that_trained_the_teachers_can_be_named_for_both(lists, tmp_path, finished):
    config = load(tmp_path, settings(lists, teacher={"generator": str(finished), "discriminator": str(finished)}))
    nets = build(config).method.nets
    for net, file in (("G_T", "teacher_G"), ("D_T", "teacher_last_D")):
        wanted, found = load_file(finished / "best" / f"{file}.safetensors"), nets[net].module.state_dict()
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)


def test_a_discriminator_given_as_generator_is_refused(lists, tmp_path, finished):
    path = tmp_path / "netD.pth"
    save_pth(load_file(finished / "best" / "teacher_last_D.safetensors"), path, "params")
    config = load(tmp_path, settings(lists, teacher={"generator": str(path)}))
    with pytest.raises(WeightsError, match="discriminator .*, but a generator is needed here"):
        build(config)


def test_a_teacher_file_that_is_not_there_is_named(lists, tmp_path):
    config = load(tmp_path, settings(lists, teacher={"generator": "nowhere.pth"}))
    with pytest.raises(DataError, match="teacher.generator nowhere.pth does not exist"):
        check_data(config)


@pytest.mark.parametrize("work", ["gcfsr", "realesrgan"])
def test_the_matched_baseline_sees_as_many_images_as_stages_2_and_3_of_the_student(work):
    def stages(name: str) -> dict[str, tuple[int, int]]:
        config = load_config(name)
        nets = {"G", "D", "MLP", "G_T", "D_T"}
        found = sr_build.stages_of(config, nets, 100.0, config.batch_size)
        return {s.name: (begin, s.end_img) for s, begin in spans(found)}

    student, naive = stages(f"sdakd_{work}"), stages(f"sdakd/{work}_naive_CC_matched")
    assert naive["naive"][1] == student["adversarial"][1] - student["supervised"][0]
    if work == "realesrgan":  # its recipe begins without a discriminator, for as long as stage 2
        assert naive["naive_pixel"][1] == student["supervised"][1] - student["supervised"][0]
    fair, paper = load_config(f"sdakd/{work}_naive_CC_matched"), load_config(f"sdakd/{work}_naive_CC")
    recipe = replace(fair.recipe, pixel_share=paper.recipe.pixel_share)
    assert replace(fair, n1=paper.n1, recipe=recipe, name=paper.name) == paper


@pytest.mark.parametrize("work", ["gcfsr", "realesrgan"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_frozen_judge_is_the_only_difference_to_the_ablation(work, number):
    plain, frozen = (load_config(f"sdakd/{work}_ablation{number}{end}") for end in ("", "_frozen"))
    assert (plain.adversary, plain.teacher_d, frozen.teacher_d) == ("teacher", "train", "frozen")
    assert replace(frozen, teacher_d="train", name=plain.name) == plain
    nets = {"G", "D", "MLP", "G_T", "D_T"} if plain.lambda_1 else {"G", "D", "G_T", "D_T"}
    last = sr_build.stages_of(frozen, nets, 100.0, frozen.batch_size)[-1]
    assert list(last.players) == ["G"] and "D" in last.frozen


CONFIGS = sorted(str(path.relative_to(REPO)) for path in REPO.glob("configs/**/*.yaml") if "sdakd" in str(path))
CONFIGS = [name for name in CONFIGS if "suites" not in name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_sdakd_loads(name):
    compared = next((method for method in ("omgd", "dcd") if f"_{method}" in name), "sdakd")
    assert load_config(REPO / name).method == compared


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_stage_saves_and_the_same_command_goes_on(lists, tmp_path, finished):
    """A real SIGTERM to a real process, then the same command: equal to the run that was never stopped."""
    cfg = write(tmp_path, settings(lists))
    command = [sys.executable, "sdtrain/main.py", "--cfg", cfg, "--out", str(tmp_path / "run")]
    first = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("supervised") > 2):
        time.sleep(0.02)
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 75
    assert subprocess.run(command, cwd=REPO).returncode == 0
    assert rows(tmp_path / "run") == rows(finished)
