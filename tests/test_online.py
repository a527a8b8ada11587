"""OMGD and DCD. Without these a term of their losses could be missing, a teacher be read after its step, or modified
training be the plain one, and the methods that SDAKD is compared with would be weaker than they are.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from test_sdakd import ADAM, FACES, SIDE, build, chunk, lists, load, rows, settings, stage, write  # noqa: F401
from torch.nn import functional as F

from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.main import main
from sdtrain.plan import make_plan

PLAYERS = {
    "omgd": ("G_wide_pixel", "G_deep_pixel", "G_wide", "D_wide", "G_deep", "D_deep", "G"),
    "dcd": ("G_teacher_pixel", "G_teacher", "D_teacher", "G"),
}
OF_SDAKD = ("n1", "n2", "n3", "lambda_2", "supervision")


def online(lists: dict[str, str], method: str, **changes: Any) -> dict[str, Any]:  # noqa: F811
    """Two steps of teachers alone and four of all together, with the degradation, its pool and maps."""
    tree = settings(lists, **changes)
    for key in OF_SDAKD:
        tree.pop(key)
    optimizer = {name: ADAM for name in PLAYERS[method]}
    return {**tree, "method": method, "n": "6 steps", "optimizer": optimizer} | {
        "recipe": {"perceptual": 0, "pixel_share": 1 / 3, **changes.get("recipe", {})},
        "weights": {"perceptual": "random", "alex": "random", "vgg16": "random"},
    }


def begun(tree: dict[str, Any], tmp_path: Path) -> tuple[Any, Any]:
    """(method, chunk) in the stage of all together, teachers having made their images of the step."""
    config = load(tmp_path, tree)
    trainer = build(config)
    trainer.enter(stage(trainer, "online"), {})
    method = trainer.method
    for name in ("D_T", "D_deep"):
        if name in method.nets:
            method.nets[name].module.eval()  # the same spectral vectors for both computations
    x = chunk(method, config)
    method.phases(trainer.stage, 0)
    for G, D in (("G_T_raw", "D_T"), ("G_deep", "D_deep")):
        if G in method.nets:
            method.loss_G_original(G, D, x)
    return method, x


def maps_of(net: Any, x: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return net(x.inputs["lq"], layers=net.module.distilled_layers)


def vgg_maps(method: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return method.vgg(images)  # [0, 1] already, as the response network wants them


def slow_style(method: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Gram matrix by Gram matrix, channel by channel."""
    total = torch.zeros(())
    ours, theirs = vgg_maps(method, a), vgg_maps(method, b)
    for layer in ("relu1_2", "relu2_2", "relu3_3", "relu4_3"):
        f, t = ours[layer], theirs[layer]
        n, c, h, w = f.shape
        grams = [torch.stack([m[i].flatten(1) @ m[i].flatten(1).T / (c * h * w) for i in range(n)]) for m in (f, t)]
        total = total + (grams[0] - grams[1]).abs().sum() / (n * c * c)
    return total


def slow_feature(method: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (vgg_maps(method, a)["relu2_2"] - vgg_maps(method, b)["relu2_2"]).abs().mean()


def slow_tv(image: torch.Tensor) -> torch.Tensor:
    rows, columns = image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]
    return rows.abs().sum() + columns.abs().sum()


VGG = re.compile("style|feature")


@pytest.fixture
def omgd(lists, tmp_path) -> tuple[Any, Any]:  # noqa: F811
    return begun(online(lists, "omgd"), tmp_path)


@pytest.fixture
def dcd(lists, tmp_path) -> tuple[Any, Any]:  # noqa: F811
    return begun(online(lists, "dcd"), tmp_path)


def test_omgds_student_is_pulled_to_both_teachers_and_its_maps_to_the_wide_one(omgd):
    method, x = omgd
    loss, terms = method.loss_G(x)
    fake, maps = maps_of(method.nets["G"], x)
    wide, wide_maps = maps_of(method.nets["G_T_raw"], x)
    deep = method.nets["G_deep"](x.inputs["lq"])
    expected = torch.zeros(())
    for name, teacher in (("wide", wide), ("deep", deep)):
        tv = sum(slow_tv(2 * image - 1) for image in fake) / len(fake) * (256 * 256 / SIDE**2)
        style, feature = slow_style(method, fake, teacher), slow_feature(method, fake, teacher)
        torch.testing.assert_close(terms[f"G/style_{name}"], style)
        torch.testing.assert_close(terms[f"G/feature_{name}"], feature)
        expected = expected + 10 * terms[f"G/ssim_{name}"] + 1e4 * style + 10 * feature + 1e-5 * tv
    for layer, connector in zip(method.layers, method.nets["conn"].module.connect, strict=True):
        halves = [connector(half) for half in maps[layer].split(2)]  # batch norm is of a ghost
        ours = torch.cat(halves).flatten(2).sum(2) / maps[layer][0, 0].numel()
        theirs = wide_maps[layer].flatten(2).sum(2) / maps[layer][0, 0].numel()
        expected = expected + 10 * ((ours - theirs) ** 2).sum() / ours.numel()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method, more", [("omgd", {}), ("dcd", {"sup": 1.0})])
def test_without_style_and_feature_no_vgg_is_built_or_needed_and_the_rest_is_the_same(lists, tmp_path, method, more):  # noqa: F811
    from sdtrain.plan import weights_needed

    tree = online(lists, method)
    plain, x = begun({**tree, "response": {"style": 0.0, "feature": 0.0, **more}}, tmp_path / "plain")
    full, y = begun({**tree, "response": more}, tmp_path / "full")
    assert plain.vgg is None and full.vgg is not None
    assert "vgg16" not in weights_needed(load(tmp_path / "plain", {**tree, "response": {"style": 0, "feature": 0}}))
    loss, terms = plain.loss_G(x)
    whole, all_terms = full.loss_G(y)
    assert {name for name in all_terms if name not in terms} == {name for name in all_terms if VGG.search(name)}
    for name, value in terms.items():
        torch.testing.assert_close(value, all_terms[name])
    seen = sum((1e4 if "style" in n else 10.0) * value for n, value in all_terms.items() if VGG.search(n))
    torch.testing.assert_close(loss, whole - seen)


def test_the_student_learns_from_what_teachers_made_before_their_step(omgd, dcd):
    for method, x in (omgd, dcd):
        before, _ = method.loss_G(x)
        with torch.no_grad():
            for name in ("G_T_raw", "G_deep"):
                if name in method.nets:
                    method.nets[name].module.conv_last.bias.add_(1.0)
        after, _ = method.loss_G(x)
        torch.testing.assert_close(after, before)


def test_dcds_student_compares_maps_in_the_last_hidden_map_of_the_teachers_discriminator(dcd):
    method, x = dcd
    loss, terms = method.loss_G(x)
    D = method.nets["D_T"].module
    fake, maps = maps_of(method.nets["G"], x)
    teacher, teacher_maps = maps_of(method.nets["G_T_raw"], x)
    adv = F.softplus(-D(fake)).mean()
    expected = adv + 1e4 * slow_style(method, fake, teacher) + 10 * slow_feature(method, fake, teacher)
    for i, layer in enumerate(method.layers):
        hidden = []
        for name, found in (("conn_S", maps), ("conn_T", teacher_maps)):
            connector = method.nets[name].module.connect[i]
            seen = torch.cat([connector(half) for half in found[layer].split(2)])
            large = F.interpolate(seen, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            hidden.append(D.features(large))
        expected = expected + (hidden[0] - hidden[1]).abs().sum() / hidden[0].numel()
    torch.testing.assert_close(terms["G/adv"], adv)
    torch.testing.assert_close(loss, expected)


def test_no_gradient_of_the_student_reaches_a_teacher_and_both_connectors_learn(omgd, dcd):
    for method, x in (omgd, dcd):
        method.loss_G(x)[0].backward()
        for name, net in method.nets.items():
            moved = any(p.grad is not None for p in net.module.parameters())
            if name in ("G", "conn", "conn_S", "conn_T"):
                assert all(p.grad is not None for p in net.module.parameters()), name
            elif name != "D_T":  # which the engine freezes in this phase; DCD's verdict goes through it
                assert not moved, name


def test_modified_training_calls_the_students_images_fake_too_with_half_of_the_weight(lists, tmp_path, dcd):  # noqa: F811
    modified, x = begun(online(lists, "dcd", judged="both"), tmp_path / "both")
    D = modified.nets["D_T"].module
    real, teacher = D(x.real), D(modified.nets["G_T_raw"](x.inputs["lq"]))
    student = D(modified.nets["G"](x.inputs["lq"]))
    L_real, L_T, L_S = F.softplus(-real).mean(), F.softplus(teacher).mean(), F.softplus(student).mean()
    torch.testing.assert_close(modified.loss_D_of("G_T_raw", "D_T", x)[0], L_real + L_T / 2 + L_S / 2)
    plain, y = dcd
    D = plain.nets["D_T"].module
    L_T = F.softplus(D(plain.nets["G_T_raw"](y.inputs["lq"]))).mean()
    torch.testing.assert_close(plain.loss_D_of("G_T_raw", "D_T", y)[0], F.softplus(-D(y.real)).mean() + L_T)


def test_the_deep_teacher_has_the_students_width_and_more_layers_and_the_wide_one_is_the_full_network(omgd):
    method, _ = omgd
    shapes = {name: vars(method.nets[name].module.options) for name in ("G", "G_deep", "G_T_raw")}
    assert [shapes[n]["num_feat"] for n in shapes] == [4, 4, 8]
    assert [shapes[n]["num_block"] for n in shapes] == [1, 2, 1]


WORK = [("omgd", {}), ("dcd", {"judged": "both"})]


@pytest.fixture(scope="module", params=WORK, ids=["omgd", "dcd"])
def finished(request, lists, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """(configuration, folder) of an uninterrupted run of one rank."""
    method, changes = request.param
    root = tmp_path_factory.mktemp(method)
    cfg = write(root, online(lists, method, save_img=8, eval_img=8, **changes))
    assert main(["--cfg", cfg, "--out", str(root / "whole")]) == 0
    return Path(cfg), root / "whole"


def test_a_run_trains_teachers_alone_first_and_leaves_the_students_best(finished):
    _, run = finished
    found = [row["stage"] for row in rows(run, ("train",))]
    assert found == ["teacher_pixel"] * 2 + ["online"] * 4
    best = {path.name for path in (run / "best").glob("*.safetensors")}
    assert {"teacher_pixel_G.safetensors", "online_G.safetensors", "G_ema.safetensors"} <= best
    card = json.loads((run / "best" / "G_ema.json").read_text())
    assert card["options"]["num_feat"] == 4
    names = {row["method"] for row in rows(run, ("baseline",))}
    assert names == {"bicubic", "teacher"}


def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    cfg, run = finished
    target = tmp_path / "run"
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / "img_000000024")
    assert main(["--cfg", str(cfg), "--out", str(target)]) == 0
    assert rows(target) == rows(run)
    for file in (run / "checkpoints" / "img_000000024").glob("*.safetensors"):
        assert file.read_bytes() == (target / "checkpoints" / "img_000000024" / file.name).read_bytes(), file.name


def test_two_ranks_are_one_rank(finished, tmp_path):
    cfg, run = finished
    done = run_ranks(2, "sdtrain/main.py", "--cfg", str(cfg), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 rank(s)" in done.stderr
    for a, b in zip(rows(run), rows(tmp_path / "two"), strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), key


@pytest.mark.parametrize("method", ["omgd", "dcd"])
def test_gcfsr_and_srvgg_train_by_every_method(lists, tmp_path, method):  # noqa: F811
    short = {"n": "2 steps", "save_img": 0, "eval_img": 0}
    faces = online(lists, method, **FACES) | short
    assert main(["--cfg", write(tmp_path / "faces", faces), "--out", str(tmp_path / "gcfsr")]) == 0
    small = online(lists, method) | short
    small["model"]["generator"] = {"kind": "srvgg", "num_feat": 8, "num_conv": 3}
    assert main(["--cfg", write(tmp_path / "small", small), "--out", str(tmp_path / "srvgg")]) == 0
    assert "G/cd" in rows(tmp_path / "gcfsr", ("train",))[-1]


def test_the_plan_names_every_network_and_stage(lists, tmp_path):  # noqa: F811
    plan = make_plan(load(tmp_path, online(lists, "omgd")))
    assert [s["name"] for s in plan["stages"]] == ["teacher_pixel", "online"]
    assert {"G", "G_ema", "G_T", "G_T_raw", "D_T", "G_deep", "D_deep", "conn"} <= set(plan["networks"])


@pytest.mark.parametrize(
    "method, changes, sentence",
    [
        ("omgd", {"lambda_2": 0.1}, "lambda_2"),
        ("dcd", {"student": {"C": "1/64"}}, "leaves num_feat without channels"),
        ("omgd", {"lq": "down_up"}, "lq down_up does not feed rrdbnet"),
    ],
)
def test_what_cannot_work_is_one_sentence(lists, tmp_path, method, changes, sentence):  # noqa: F811
    with pytest.raises(ConfigError, match=sentence):
        load_config(write(tmp_path / "cfg", online(lists, method) | changes))


def test_maps_of_their_own_size_are_for_a_discriminator_that_takes_them(lists, tmp_path):  # noqa: F811
    tree = online(lists, "dcd", **FACES) | {"map_size": "own"}
    with pytest.raises(ConfigError, match="set map_size: image"):
        load_config(write(tmp_path / "cfg", tree))
    tree = online(lists, "dcd") | {"map_size": "own"}
    load_config(write(tmp_path / "cfg", tree))
    tree["degradation"] = tree["degradation"] | {"crop_size": 24}
    with pytest.raises(ConfigError, match="maps of a crop of 24 are 6 pixels wide, .* multiples of 8: set map_size"):
        load_config(write(tmp_path / "cfg", tree))
