"""What SD-GAN's phases hand to G and D. Without these tests fakes could borrow the labels of the real batch, a student
and its teacher could be given different classes, and ADA could steer by another statistic than the published one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, write_config
from torch import Tensor

from sdtrain.config.load import load_config
from sdtrain.contracts import Chunk
from sdtrain.rng import Draws
from sdtrain.sampling import labels_for
from sdtrain.trainer import Trainer

COUNTS = (1, 2, 5)
NET = {"kind": "stylegan2", "channel_base": 128, "channel_max": 8}
STYLE = {
    "model__generator": {**NET, "z_dim": 8, "w_dim": 8, "mapping_layers": 2},
    "model__discriminator": {**NET, "mbstd_group": 2},
    "sd__augment": False,
    "sd__loss": "l1",
}


def built(folder: Path, **changes: Any) -> Any:
    config = load_config(write_config(folder / "c.yaml", tiny_config(folder, **{**STYLE, **changes})))
    return Trainer(config, torch.device("cpu"), 32, COUNTS, num_samples=8).method


def chunk(step: int = 0) -> Chunk:
    draws = Draws(seed=0, step=step, ghosts=range(8), ghost_batch=4)
    real = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Chunk(step=step, seen_img=0, real=real, labels=torch.eye(3)[[2] * 32], draws=draws)


def watched(method: Any) -> dict[str, list[Tensor]]:
    """Labels that each network is called with, in order."""
    seen: dict[str, list[Tensor]] = {"G": [], "G_ema": [], "D": []}
    for name, calls in seen.items():
        net = getattr(method, name)

        def call(x: Tensor, c: Tensor, *args: Any, _net: Any = net, _calls: list = calls, **more: Any) -> Any:
            _calls.append(c)
            return _net.module(x, c, *args, **more)

        net.__class__ = type("Watched", (type(net),), {"__call__": lambda self, *a, _call=call, **k: _call(*a, **k)})
    return seen


def test_labels_of_fakes_are_drawn_for_each_phase_and_shared_with_the_teacher(tmp_path: Path) -> None:
    method, x = built(tmp_path, bcr=1.0, augment__kind="none"), chunk()
    seen = watched(method)
    method.loss_G(x)
    method.loss_D(x)
    of = {phase: labels_for(x.draws.sub(phase), COUNTS) for phase in ("G", "D")}
    assert not torch.equal(of["G"], of["D"]) and 8 < of["G"][:, 2].sum() < 32
    expected = {"G": [of["G"], of["D"]], "G_ema": [of["G"]], "D": [of["G"], of["D"], x.labels, of["D"], x.labels]}
    for name, labels in expected.items():
        assert len(seen[name]) == len(labels)
        assert all(torch.equal(a, b) for a, b in zip(seen[name], labels)), name


def test_fakes_can_take_the_labels_of_the_real_images(tmp_path: Path) -> None:
    method, x = built(tmp_path, fake_labels="real"), chunk()
    seen = watched(method)
    method.loss_G(x)
    method.loss_D(x)
    assert all(torch.equal(c, x.labels) for calls in seen.values() for c in calls)


def test_both_kinds_of_labels_meet_their_own_images_in_one_pass(tmp_path: Path) -> None:
    method, x = built(tmp_path, d_passes="together"), chunk()
    seen = watched(method)
    method.loss_D(x)
    assert torch.equal(seen["D"][0], torch.cat([labels_for(x.draws.sub("D"), COUNTS), x.labels]))


def test_path_lengths_are_those_of_drawn_classes(tmp_path: Path) -> None:
    method, x = built(tmp_path, path_length__weight=2.0, path_length__shrink=2), chunk()
    seen = watched(method)
    assert method.path_lengths(x).shape == (16,)
    assert seen["G"][0].shape == (16, 3) and not torch.equal(seen["G"][0], x.labels[:16])


ADA: dict[str, Any] = {"augment": {"kind": "ada", "p": 0.5, "interval": 4, "target": 0.6, "speed_img": 10_000}}


def r_t(steps: list[dict[str, float]]) -> float:
    """The published statistic: the mean of all signs reported since p last moved, pass by pass."""
    signs = [sign for means in steps for name in ("D/real_sign", "D/r1_sign") if (sign := means.get(name)) is not None]
    return sum(signs) / len(signs)


@pytest.mark.parametrize("r1_sign", [1.0, -1.0])
def test_ada_counts_the_signs_of_the_r1_pass_like_those_of_a_step(tmp_path: Path, r1_sign: float) -> None:
    """Four steps of 0.6 -+ 0.05 and one R1 pass of +-1: without the pass the mean is on the other side of 0.6."""
    method = built(tmp_path, r1__gamma=1.0, r1__every=4, **ADA)
    each = 0.6 - 0.05 * r1_sign
    steps = [{"D/real_sign": each} | ({"D/r1_sign": r1_sign} if step == 0 else {}) for step in range(4)]
    assert (r_t(steps) > 0.6) == (r1_sign > 0)
    for step, means in enumerate(steps):
        method.control(step, means)
    assert method.p == pytest.approx(0.5 + r1_sign * 16 * 4 / 10_000)


def test_the_r1_pass_reports_the_mean_sign_of_its_logits(tmp_path: Path) -> None:
    method, x = built(tmp_path, r1__gamma=1.0, r1__every=4, **ADA), chunk()
    seen: list[Tensor] = []
    method.D.module.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    _, terms = method.loss_penalty(x)
    assert not terms["D/r1_sign"].requires_grad
    assert terms["D/r1_sign"].item() == pytest.approx(seen[0].sign().mean().item())
    assert method.steering == ("D/real_sign", "D/r1_sign")


def apart(method: Any) -> None:
    """A student begins as its own average: part them."""
    method.G_ema.module.mapping.fc0.weight.data.mul_(1.5)


def test_lazy_distillation_has_the_weight_of_its_interval_once_in_it_and_none_otherwise(tmp_path: Path) -> None:
    method = built(tmp_path, sd__alpha=0.5, sd__every=4)
    apart(method)
    weights = []
    for step in range(5):
        seen = watched(method)
        loss, terms = method.loss_G(chunk(step))
        assert ("G/sd" in terms) == bool(seen["G_ema"]) == (step % 4 == 0)
        weights.append(((loss - terms["G/adv"]) / terms["G/sd"]).item() if "G/sd" in terms else 0.0)
        assert step % 4 == 0 or torch.equal(loss, terms["G/adv"])
    assert weights == pytest.approx([2.0, 0, 0, 0, 2.0], rel=1e-3)  # alpha on average


def test_a_share_of_a_ghost_is_distilled_as_it_is_among_all(tmp_path: Path) -> None:
    distances = {}
    for share in (1.0, 0.5, 0.01):
        method = built(tmp_path, sd__alpha=1.0, sd__share=share, sd__augment=True, style_mixing=0.9)
        apart(method)
        distance, found = method.distance, []
        method.distance = lambda x, y, d=distance, f=found: f.append(d(x, y)) or f[-1]
        terms = method.loss_G(chunk())[1]
        distances[share] = found[0].detach().unflatten(0, (8, -1))
        assert torch.equal(terms["G/sd"], found[0].mean())
    assert distances[1.0].shape == (8, 4) and distances[1.0].std() > 0
    # latents, noise, styles and T are those that the samples have anyway, so the mean over many draws is the same
    torch.testing.assert_close(distances[0.5], distances[1.0][:, :2])
    torch.testing.assert_close(distances[0.01], distances[1.0][:, :1])


def test_the_teacher_can_have_arithmetic_of_its_own(tmp_path: Path) -> None:
    found = {}
    for outer in (False, True):
        for precision in (None, "fp32", "bf16"):
            method = built(tmp_path, sd__alpha=1.0, sd__teacher_precision=precision)
            apart(method)
            dtypes, inner = [], method.G_ema.module.synthesis.forward
            method.G_ema.module.synthesis.forward = lambda *a, d=dtypes, f=inner, **k: (
                d.append(torch.is_autocast_enabled("cpu")) or f(*a, **k)
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=outer):
                terms = method.loss_G(chunk())[1]
            found[outer, precision] = terms["G/sd"].item()
            assert set(dtypes) == {outer if precision is None else precision == "bf16"}
    assert found[False, None] == found[False, "fp32"] != found[False, "bf16"]
    assert found[False, "bf16"] == pytest.approx(found[False, "fp32"], rel=0.1)
    assert found[True, None] == found[True, "bf16"] != found[True, "fp32"]


def test_the_distance_can_be_given_images_as_the_authors_code_gives_them(tmp_path: Path) -> None:
    x, y = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    wanted = {"plain": (x - y).abs(), "doubled": 2 * (x - y).abs(), "imagenet": (x - y).abs() / (2 * std)}
    for images, distance in wanted.items():
        found = built(tmp_path, sd__images=images).distance(x, y)
        torch.testing.assert_close(found, distance.mean((1, 2, 3)))
