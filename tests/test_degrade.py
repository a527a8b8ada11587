"""Without these tests a low-quality image could differ from the published one, or from one rank layout to another.

They compare every stored degradation output, hold the chain and the pair pool to being functions of (seed, step,
ghost), and pin the sentences that refuse settings and images that cannot work.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, REPO
from torch import Tensor
from torch.nn import functional as F

from sdtrain.data.degrade import chain as degrade
from sdtrain.data.degrade.chain import Degradation, apply_chain, decide, fixed_lq
from sdtrain.data.degrade.check import pool_bytes, smallest_side
from sdtrain.data.degrade.jpeg import jpeg
from sdtrain.data.degrade.kernels import bessel_j1, filter2d, sharpen
from sdtrain.data.degrade.noise import DrawnSource, Noise, add_noise, eight_bit
from sdtrain.data.degrade.options import DegradationOptions
from sdtrain.data.degrade.pair_pool import PairPool, pool_for
from sdtrain.data.degrade.resize_matlab import (
    GCFSR_FACTORS,
    down_up,
    draw_factors,
    gcfsr_test_input,
    gcfsr_test_small,
    gcfsr_train_input,
    imresize,
)
from sdtrain.errors import ConfigError, DataError, RunError
from sdtrain.rng import Draws

SMALL = DegradationOptions(source_size=96, crop_size=64, pool_size=12)
FILES = json.loads((GOLDEN / "sdakd" / "manifest.json").read_text())["files"]
MINE = [n for n in FILES if n.startswith(("degradation_", "diffjpeg", "filter_usm", "noise", "imresize"))]


def smooth_images(num: int, size: int = 96, seed: int = 0) -> Tensor:
    """8-bit images with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(num, 3, size // k, size // k, generator=generator) for k in (4, 16)]
    return eight_bit(sum(F.interpolate(p, size=size, mode="bicubic") for p in parts).div(2).clamp(0, 1))


def draws(*ghosts: int, step: int = 0, ghost_batch: int = 2, seed: int = 5) -> Draws:
    return Draws(seed=seed, step=step, ghosts=ghosts, ghost_batch=ghost_batch)


@pytest.mark.parametrize("name", MINE)
def test_every_stored_output_is_met(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GOLDEN))
    lines = importlib.import_module("check").run(GOLDEN / "sdakd", [name])
    assert lines and [str(line) for line in lines if line.verdict != "ok"] == []


def test_filtering_equals_a_plain_convolution_at_odd_sizes_and_layouts() -> None:
    x, kernel = torch.rand(2, 3, 41, 30), torch.rand(2, 9, 9) / 81
    padded = F.pad(x, (4,) * 4, mode="reflect")
    plain = torch.cat([F.conv2d(padded[i : i + 1], kernel[i].expand(3, 1, 9, 9), groups=3) for i in range(2)])
    torch.testing.assert_close(filter2d(x, kernel), plain, atol=2e-6, rtol=0)
    assert torch.equal(filter2d(x.to(memory_format=torch.channels_last), kernel), filter2d(x, kernel))


def test_bessel_function_equals_its_power_series() -> None:
    z = torch.linspace(0.1, 8, 40, dtype=torch.float64)
    terms = [(-1) ** k / (math.factorial(k) * math.factorial(k + 1)) * (z / 2) ** (2 * k + 1) for k in range(40)]
    torch.testing.assert_close(bessel_j1(z), sum(terms), atol=1e-12, rtol=0)


def test_jpeg_leaves_the_quality_alone_and_high_quality_changes_least() -> None:
    x, quality = smooth_images(2, 40), torch.tensor([20.0, 90.0])
    kept = quality.clone()
    worse, better = (jpeg(x, quality) - x).abs().mean((1, 2, 3))
    assert torch.equal(quality, kept) and worse > 2 * better


def test_results_do_not_change_under_autocast() -> None:
    hq, d = smooth_images(2), draws(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lq = Degradation(SMALL)(hq, d)
    assert torch.equal(lq, Degradation(SMALL)(hq, d)) and lq.dtype == torch.float32


@pytest.mark.parametrize("who", ["ghost", "sample"])
@pytest.mark.parametrize("size", [96, 101])
def test_four_ghosts_at_once_equal_one_at_a_time_bit_for_bit(who: str, size: int) -> None:
    degradation = Degradation(replace(SMALL, decisions=who))
    hq = F.pad(smooth_images(8, 96), (0, size - 96, 0, size - 96), mode="reflect")
    for step in range(3):
        together = degradation.pair(hq, draws(4, 5, 6, 7, step=step))
        alone = [degradation.pair(hq[2 * i : 2 * i + 2], draws(4 + i, step=step)) for i in range(4)]
        for name in ("lq", "hq"):
            assert torch.equal(together[name], torch.cat([pair[name] for pair in alone]))


def test_decisions_of_a_ghost_are_repeatable_and_others_differ() -> None:
    one, again, other = (decide(SMALL, d) for d in (draws(3), draws(3), draws(4)))
    assert torch.equal(one.first.kernel, again.first.kernel) and one.first.scale == again.first.scale
    assert not torch.equal(one.first.kernel, other.first.kernel)
    assert not torch.equal(one.first.kernel, decide(SMALL, draws(3, step=1)).first.kernel)


def test_the_ambient_generator_is_neither_read_nor_moved() -> None:
    hq, ghosts = smooth_images(12), draws(*range(6))
    kinds = {decide(SMALL, unit).first.noise.kind for _, unit in Degradation(SMALL).units(ghosts)}
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), Degradation(SMALL)(hq, ghosts)
    assert torch.equal(before, torch.get_rng_state()) and kinds == {"gaussian", "poisson"}
    torch.manual_seed(2)
    assert torch.equal(first, Degradation(SMALL)(hq, ghosts))


def test_per_sample_decisions_differ_within_a_ghost_and_shared_ones_do_not() -> None:
    shared, own = (Degradation(replace(SMALL, decisions=who)) for who in ("ghost", "sample"))
    scales = [decide(SMALL, unit).first.scale for _, unit in own.units(draws(0, 1, ghost_batch=6))]
    assert len(scales) == 12 and len(set(scales)) > 6
    assert [rows for rows, _ in shared.units(draws(0, 1, ghost_batch=6))] == [slice(0, 6), slice(6, 12)]


@pytest.mark.parametrize("scale", [2, 4])
def test_low_quality_images_have_the_size_and_levels_of_8_bit_files(scale: int) -> None:
    for step in range(4):
        lq = Degradation(SMALL)(smooth_images(4, 100), draws(0, 1, step=step), scale)
        assert lq.shape == (4, 3, 100 // scale, 100 // scale) and torch.equal(eight_bit(lq), lq)


def test_pairs_show_the_same_window() -> None:
    mild = DegradationOptions(
        source_size=96,
        crop_size=64,
        sharpen=False,
        sinc_prob1=0,
        sinc_prob2=0,
        final_sinc_prob=0,
        sigma1=(0.2, 0.21),
        sigma2=(0.2, 0.21),
        resize_prob1=(0, 0, 1),
        resize_prob2=(0, 0, 1),
        noise_sigma1=(0, 0),
        noise_sigma2=(0, 0),
        poisson_scale1=(0, 0),
        poisson_scale2=(0, 0),
        jpeg_quality1=(95, 95),
        jpeg_quality2=(95, 95),
    )
    hq = smooth_images(2)
    windows = []
    for step in range(6):
        pair = Degradation(mild).pair(hq, draws(0, step=step))
        assert pair["hq"].shape == (2, 3, 64, 64) and pair["lq"].shape == (2, 3, 16, 16)
        error = (F.interpolate(pair["hq"], scale_factor=0.25, mode="area") - pair["lq"]).abs().mean()
        shifted = (F.interpolate(pair["hq"].roll(8, -1), scale_factor=0.25, mode="area") - pair["lq"]).abs().mean()
        assert error < 0.5 * shifted
        windows.append(pair["hq"])
    assert any(not torch.equal(windows[0], window) for window in windows[1:])


@pytest.mark.parametrize("sharpens", [True, False])
def test_kept_images_are_raw_or_sharpened_as_asked(sharpens: bool) -> None:
    hq, whole = smooth_images(2, 96), replace(SMALL, crop_size=96, sharpen=sharpens)
    assert torch.equal(Degradation(whole).pair(hq, draws(0))["hq"], hq)
    assert torch.equal(Degradation(whole).pair(hq, draws(0), sharpened=True)["sharp"], sharpen(hq))


def test_sharpening_off_degrades_the_raw_image() -> None:
    hq, raw = smooth_images(2), replace(SMALL, sharpen=False)
    assert torch.equal(Degradation(raw)(hq, draws(0)), apply_chain(hq, decide(raw, draws(0))))
    assert torch.equal(Degradation(SMALL)(hq, draws(0)), apply_chain(sharpen(hq), decide(SMALL, draws(0))))


def test_gray_noise_is_equal_in_all_channels_and_shared_by_gaussian_samples() -> None:
    x = torch.full((3, 3, 32, 32), 0.5)
    noise = Noise(
        kind="gaussian", level=torch.tensor([5.0, 10.0, 5.0]), gray=(True, True, False), source=DrawnSource(draws(0))
    )
    change = add_noise(x, noise) - x
    assert torch.equal(change[0, 0], change[0, 2]) and not torch.equal(change[2, 0], change[2, 2])
    torch.testing.assert_close(2 * change[0], change[1])
    poisson = replace(noise, kind="poisson", level=torch.ones(3))
    assert torch.equal(*(add_noise(x, poisson)[0, c] for c in (0, 1)))


def test_decisions_follow_the_published_distribution() -> None:
    o = DegradationOptions()
    seen = [decide(o, draws(g, ghost_batch=1)) for g in range(800)]
    tol = 4 * math.sqrt(0.25 / len(seen))

    def share(test) -> float:
        return sum(map(test, seen)) / len(seen)

    expected = {
        "up 1": (share(lambda d: d.first.scale > 1), 0.2),
        "down 1": (share(lambda d: d.first.scale < 1), 0.7),
        "keep 2": (share(lambda d: d.second.scale == 1), 0.3),
        "bicubic": (share(lambda d: d.first.mode == "bicubic"), 1 / 3),
        "gaussian 1": (share(lambda d: d.first.noise.kind == "gaussian"), 0.5),
        "gray 2": (share(lambda d: d.second.noise.gray[0]), 0.4),
        "second blur": (share(lambda d: d.second.kernel is not None), 0.8),
        "last identity": (share(lambda d: d.sinc[0, 10, 10] == 1), 0.2),
        "jpeg last": (share(lambda d: d.jpeg_last), 0.5),
        "widest kernel": (share(lambda d: bool(d.first.kernel[0, 10, 0] != 0)), 1 / 8),
    }
    off = {name: pair for name, pair in expected.items() if abs(pair[0] - pair[1]) > tol}
    assert off == {}
    quality = torch.cat([d.first.quality for d in seen])
    assert 30 <= quality.min() < 32 and 93 < quality.max() <= 95 and abs(quality.mean() - 62.5) < 2
    scales = torch.tensor([d.first.scale for d in seen])
    assert 0.15 <= scales.min() < 0.2 and 1.45 < scales.max() <= 1.5


def test_kernel_kinds_follow_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    o, kinds, betas = DegradationOptions(), Counter(), []

    def record(kind: Tensor, size: Tensor, sx: Tensor, sy: Tensor, theta: Tensor, beta: Tensor, canvas: int) -> Tensor:
        kinds.update(kind.tolist())
        betas.extend(beta[(kind == 2) | (kind == 3)].tolist())
        assert sx.min() >= 0.2 and sy.max() <= 3 and theta.abs().max() <= math.pi and set((size % 2).tolist()) == {1}
        return torch.zeros(len(kind), canvas, canvas)

    monkeypatch.setattr(degrade, "gaussian_kernels", record)
    degrade.draw_gaussian_kernels(o, draws(0, ghost_batch=8000), torch.full((8000,), 7), o.sigma1)
    for index, weight in enumerate(o.kind_prob):
        assert abs(kinds[index] / 8000 - weight) < 0.03
    assert abs(sum(b < 1 for b in betas) / len(betas) - 0.5) < 0.08 and 0.5 <= min(betas) and max(betas) <= 4


def test_small_images_are_mirrored_up_to_the_source_size() -> None:
    x = torch.arange(12.0).view(1, 3, 4)
    assert degrade.reflect_to(x, 6)[0, 0].tolist() == [0, 1, 2, 3, 2, 1]
    assert degrade.reflect_to(x, 9)[0, :, 0].tolist() == [0, 4, 8, 4, 0, 4, 8, 4, 0]
    assert degrade.source_crop(torch.rand(3, 20, 50), 32, torch.tensor([0.0, 0.99])).shape == (3, 32, 32)


def test_flips_happen_per_image_at_the_given_rate() -> None:
    x = torch.rand(400, 3, 2, 2)
    flipped = degrade.flip_images(x, draws(0, ghost_batch=400))
    same = (flipped == x).flatten(1).all(1)
    assert torch.equal(flipped[~same], x[~same].flip(-1)) and 150 < same.sum() < 250


def batch_of(step: int, num_ghosts: int, ghost_batch: int = 2) -> dict[str, Tensor]:
    """Pairs that carry their own number: step, ghost, place."""
    number = step * num_ghosts * ghost_batch + torch.arange(num_ghosts * ghost_batch)
    level = (number % 256).float().view(-1, 1, 1, 1) / 255
    return {"lq": level.expand(-1, 3, 2, 2).clone(), "hq": level.expand(-1, 3, 4, 4).clone()}


def run_pool(pool: PairPool, steps: range, ghosts: tuple[int, ...] = (0, 1)) -> list[dict[str, Tensor]]:
    out = []
    for step in steps:
        batch = batch_of(step, 2)
        rows = torch.cat([torch.arange(2) + 2 * g for g in ghosts])
        out.append(pool({k: v[rows] for k, v in batch.items()}, draws(*ghosts, step=step)))
    return out


def test_the_pool_is_the_published_queue() -> None:
    pool, size = PairPool(6, 2), 6
    queue: list[float] = []
    for step in range(20):
        batch = batch_of(step, 1)
        got = pool(batch, draws(0, step=step))
        new = batch["lq"][:, 0, 0, 0].tolist()
        if len(queue) < size:
            expected, queue = new, queue + new
        else:
            order = torch.randperm(size, generator=draws(0, step=step).generator("pair_pool", 0)).tolist()
            queue = [queue[i] for i in order]
            expected, queue = queue[:2], new + queue[2:]
        assert got["lq"][:, 0, 0, 0].tolist() == expected
        assert torch.equal(got["lq"][:, 0, 0, 0], got["hq"][:, 0, 0, 0])
    assert sorted(queue) == sorted(pool.state()[0]["lq"][:, 0, 0, 0].div(255).tolist())


def test_a_resumed_pool_continues_bit_for_bit_on_another_rank_layout() -> None:
    whole = run_pool(PairPool(6, 2), range(14))
    first = PairPool(6, 2)
    run_pool(first, range(8))
    saved = {ghost: {k: v.clone() for k, v in fields.items()} for ghost, fields in first.state().items()}
    for rank in (0, 1):
        resumed = PairPool(6, 2)
        resumed.load_state(saved, ghosts=[rank])
        assert list(resumed.state()) == [rank]
        for expected, got in zip(whole[8:], run_pool(resumed, range(8, 14), (rank,)), strict=True):
            for name in ("lq", "hq"):
                assert torch.equal(expected[name][2 * rank : 2 * rank + 2], got[name])


def test_pooled_pairs_come_back_unchanged_as_bytes_and_as_floats() -> None:
    levels = (torch.arange(256).float() / 255).view(2, 1, 8, 16)
    sharp = torch.rand(2, 1, 8, 16)
    pool = PairPool(2, 2, eight_bit=["lq"])
    pool({"lq": levels, "hq": sharp}, draws(0))
    out = pool({"lq": levels * 0, "hq": sharp * 0}, draws(0, step=1))
    order = draws(0, step=1).generator("pair_pool", 0)
    order = torch.randperm(2, generator=order)
    assert torch.equal(out["lq"], levels[order]) and torch.equal(out["hq"], sharp[order])
    assert pool.state()[0]["lq"].dtype == torch.uint8 and pool.state()[0]["hq"].dtype == torch.float32


def test_bytes_are_refused_for_images_between_the_levels() -> None:
    with pytest.raises(ValueError, match="not k / 255: store it as float"):
        PairPool(2, 2)({"lq": torch.full((2, 3, 2, 2), 0.5)}, draws(0))


def test_the_pool_follows_the_options() -> None:
    assert pool_for(replace(SMALL, pool_size=0), 2) is None
    assert pool_for(DegradationOptions(), 12).size == 180


@pytest.mark.parametrize("sharpened", [False, True])
def test_the_planned_pool_memory_is_what_the_pool_takes(sharpened: bool) -> None:
    pool = pool_for(SMALL, 2)
    pair = Degradation(SMALL).pair(smooth_images(2), draws(0), sharpened=sharpened)
    pool(pair, draws(0))
    assert sum(pool.state()[0][name].nbytes for name in pair) == pool_bytes(SMALL, 4, sharpened)


@pytest.mark.parametrize(("size", "text"), [(181, "use 180 or 192"), (5, "use 12"), (-3, "not a multiple")])
def test_a_pool_that_ghosts_do_not_fill_evenly_is_refused(size: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PairPool(size, 12)


def test_a_pool_of_another_size_is_refused_on_resume() -> None:
    pool = PairPool(6, 2)
    run_pool(pool, range(4))
    with pytest.raises(RunError, match="ghost 0 holds 6 pairs, this run's 8: resume with the same pool_size"):
        PairPool(8, 2).load_state(pool.state())


def naive_imresize_rows(x: Tensor, factor: int) -> Tensor:
    """Shrink the rows of [H, W] by `factor`, one output pixel after the other."""
    rows = []
    for i in range(1, math.ceil(len(x) / factor) + 1):
        centre = i * factor + 0.5 * (1 - factor)
        total, weights = torch.zeros(x.shape[1], dtype=torch.float64), 0.0
        for j in range(math.floor(centre - 2 * factor) - 1, math.ceil(centre + 2 * factor) + 2):
            d = abs(centre - j) / factor
            w = 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d <= 2 else 0.0
            inside = j if 1 <= j <= len(x) else (1 - j if j < 1 else 2 * len(x) + 1 - j)
            total, weights = total + w * x[inside - 1].double(), weights + w
        rows.append(total / weights)
    return torch.stack(rows)


def test_matrix_resizing_equals_the_naive_sum_also_for_sizes_off_the_factor() -> None:
    x = torch.rand(37, 20)
    naive = naive_imresize_rows(naive_imresize_rows(x, 4).t(), 4).t()
    torch.testing.assert_close(imresize(x, 1 / 4).double(), naive, atol=1e-6, rtol=0)
    assert imresize(x, 1 / 4).shape == (10, 5) and down_up(x, 4).shape == (37, 20)


def test_training_rounds_once_and_testing_twice() -> None:
    hq = smooth_images(3, 64)
    once = gcfsr_train_input(hq, [4, 8, 4])
    assert torch.equal(once[1], eight_bit(down_up(hq[1], 8))) and torch.equal(once[2], eight_bit(down_up(hq[2], 4)))
    small = gcfsr_test_small(hq, 8)
    twice = gcfsr_test_input(small, 8)
    assert small.shape == (3, 3, 8, 8) and torch.equal(eight_bit(small), small) and torch.equal(eight_bit(twice), twice)
    assert 0 < (twice - gcfsr_train_input(hq, [8] * 3)).abs().max() < 3 / 255


def test_factors_follow_the_published_list() -> None:
    factors = Counter(draw_factors(draws(0, ghost_batch=5000), GCFSR_FACTORS[1024]))
    for factor, share in ((64, 0.4), (32, 0.2), (16, 0.2), (8, 0.1), (4, 0.1)):
        assert abs(factors[factor] / 5000 - share) < 0.03
    both = draw_factors(draws(0, 1), GCFSR_FACTORS[512])
    assert both == draw_factors(draws(0), GCFSR_FACTORS[512]) + draw_factors(draws(1), GCFSR_FACTORS[512])


@pytest.mark.parametrize("factor", [2, 128])
def test_factors_outside_the_condition_range_are_refused(factor: int) -> None:
    with pytest.raises(ConfigError, match=rf"down-scaling factor {factor} is outside \[4, 64\]"):
        gcfsr_train_input(torch.rand(1, 3, 64, 64), [factor])
    with pytest.raises(ConfigError, match="list of down-scaling factors is empty"):
        draw_factors(draws(0), [])


def test_a_validation_image_is_degraded_by_its_name_alone() -> None:
    hq = smooth_images(1, 96)[0]
    lq = fixed_lq(hq, "a.png", 7)
    assert lq.shape == (3, 24, 24) and torch.equal(lq, fixed_lq(hq, "a.png", 7))
    assert not torch.equal(lq, fixed_lq(hq, "b.png", 7)) and not torch.equal(lq, fixed_lq(hq, "a.png", 8))
    bicubic = fixed_lq(hq, "a.png", 7, kind="bicubic")
    assert torch.equal(bicubic, eight_bit(imresize(hq, 1 / 4)))


def test_validation_images_off_the_scale_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="'a.png' is 97 x 96 pixels: cut it to multiples of the scale 4"):
        fixed_lq(torch.rand(3, 97, 96), "a.png", 0)
    with pytest.raises(ConfigError, match="'nearest' is unknown: use 'second_order' or 'bicubic'"):
        fixed_lq(torch.rand(3, 96, 96), "a.png", 0, kind="nearest")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"jpeg_quality1": (30, 100)}, r"jpeg_quality1 = \[30, 100\] must rise and lie inside \(0, 100\)"),
        ({"sigma2": (0, 1)}, r"sigma2 = \[0, 1\] must rise and lie above 0 pixels"),
        ({"resize_range1": (0.5, 0.9)}, r"resize_range1 = \[0.5, 0.9\] must be a down factor"),
        ({"beta_plateau": (2, 1)}, r"beta_plateau = \[2, 1\] must reach from"),
        ({"kind_prob": (1, 0)}, r"kind_prob = \[1, 0\] must be 6 weights"),
        ({"gray_prob1": 1.5}, "gray_prob1 = 1.5 is not a probability"),
        ({"kernel_size": (7, 20)}, r"kernel_size = \[7, 20\] must be two odd numbers"),
        ({"crop_size": 512}, "crop_size = 512 must be positive and no larger than source_size = 400"),
        ({"decisions": "batch"}, "decisions = 'batch' must be 'ghost' or 'sample'"),
        ({"pool_size": -1}, "pool_size = -1 must be 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Degradation(replace(DegradationOptions(), **change))


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match="sigma1.*flip_prob"):
        Degradation(DegradationOptions(sigma1=(3, 1), flip_prob=2))


def test_images_that_filters_cannot_reflect_are_refused_and_one_larger_works() -> None:
    least = smallest_side(SMALL, 4)
    with pytest.raises(DataError, match=f"images of {least - 4} pixels are too small for this degradation at x4"):
        Degradation(SMALL)(torch.rand(2, 3, least - 4, 200), draws(0))
    always_blurs = decide(replace(SMALL, second_blur_prob=1), draws(0))
    smallest = replace(always_blurs, first=replace(always_blurs.first, scale=SMALL.resize_range1[0]))
    assert apply_chain(torch.rand(2, 3, least, least), smallest).shape[-1] == least // 4
    with pytest.raises(RuntimeError, match="[Pp]adding"):
        apply_chain(torch.rand(2, 3, least - 4, least - 4), smallest)


def test_crops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="images of 96 pixels are smaller than crop_size = 128"):
        Degradation(replace(SMALL, source_size=128, crop_size=128)).pair(smooth_images(2), draws(0))
    with pytest.raises(ConfigError, match="crop_size = 66 must be a multiple of the scale 4"):
        Degradation(replace(SMALL, crop_size=66)).pair(smooth_images(2), draws(0))
    with pytest.raises(DataError, match=r"it needs \[4, 3, H, W\]"):
        Degradation(SMALL)(smooth_images(2), draws(0, 1))


def test_settings_can_be_checked_without_torch() -> None:
    code = "import sys, sdtrain.data.degrade.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
