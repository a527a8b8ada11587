"""Without this file a FID could drift from everyone else's, depend on the number of ranks, or compare unlike things."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from conftest import GOLDEN, REPO, run_python, run_ranks
from ranks_evaluate import evaluator, sample
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_prc import prc_features_to_metric

from sdtrain.commands import evaluate as command
from sdtrain.constants import IMAGENET_MEAN, IMAGENET_STD
from sdtrain.errors import ConfigError, DataError, WeightsError
from sdtrain.metrics import rfid
from sdtrain.metrics.evaluate import Evaluator, subset
from sdtrain.metrics.features import TAPS, Inception, clip, dinov2, inception, lite0, random_inception, resampled, vgg16
from sdtrain.metrics.fid import both_fids, fid_of_features, fid_of_sums
from sdtrain.metrics.images import batches, open_images
from sdtrain.metrics.kid import kid
from sdtrain.metrics.prc import precision_recall
from sdtrain.metrics.protocol import differences, fingerprint, require_same
from sdtrain.metrics.sums import FeatureSums
from sdtrain.metrics.variation import perceptual_variation

MANIFEST = json.loads((GOLDEN / "sdgan" / "manifest.json").read_text())
EXPECTED = MANIFEST["files"]["metrics.safetensors"]["expected"]


def pictures(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").to(torch.uint8)


def save(folder, images: torch.Tensor):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
    return folder


def sums(rows: torch.Tensor) -> FeatureSums:
    return FeatureSums(rows.shape[1]).add(rows)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "sdgan" / "metrics.safetensors")


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("data") / "real", pictures(14, seed=1))


@pytest.fixture(scope="module")
def calibrated() -> dict[str, torch.Tensor]:
    """A whole random Inception under torch-fidelity's names: what a weights file would hold."""
    net = random_inception(0, 2048, lambda: [pictures(6, 32)]).net
    head = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    return {**net.state_dict(), **head}


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory, calibrated):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(calibrated, path)
    return path


def test_fid_equals_the_reference_values_with_biased_and_unbiased_covariance(golden):
    real, fake = sums(golden["fid.real"]), sums(golden["fid.gen"])
    assert fid_of_sums(real, fake, ddof=0) == pytest.approx(EXPECTED["fid"], rel=1e-9)
    assert fid_of_sums(real, fake, ddof=1) == pytest.approx(EXPECTED["fid_with_unbiased_cov_for_comparison"], rel=1e-9)
    assert abs(fid_of_sums(real, real)) < 1e-9
    mean, cov = real.moments(0)
    torch.testing.assert_close(mean, golden["fid.mu_real"], atol=1e-7, rtol=0)
    torch.testing.assert_close(cov, golden["fid.cov_real"], atol=1e-6, rtol=0)


def test_fid_of_fewer_samples_than_dimensions_agrees_in_both_forms(golden):
    real, fake = golden["fid.real_rd"], golden["fid.gen_rd"]
    assert fid_of_features(real, fake, 0) == pytest.approx(EXPECTED["fid_rank_deficient"], rel=1e-4)
    assert fid_of_sums(sums(real), sums(fake), 0) == pytest.approx(EXPECTED["fid_rank_deficient"], rel=1e-4)
    many = golden["fid.real"]
    assert fid_of_features(many, golden["fid.gen"], 0) == pytest.approx(EXPECTED["fid"], rel=1e-9)


def test_sums_of_parts_merge_to_the_sums_of_the_whole_even_with_a_large_offset():
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) + 300
    parts = [sums(part) for part in rows.split([1, 399, 600])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    mean, cov = merged.moments(1)
    assert merged.count == 1000
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_exact_fractions_of_the_reference(golden, k, half):
    wanted = EXPECTED[f"pr_k{k}_{'half' if half else 'float32'}"]
    precision, recall = precision_recall(golden["pr.real"], golden["pr.gen"], k=k, half=half)
    assert (precision, recall) == pytest.approx((wanted["precision"], wanted["recall"]), abs=1e-6)


def test_collapsed_fakes_have_full_precision_and_no_recall():
    """Guards the order of the arguments: swapped, the two numbers change places."""
    real = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    fake = real[:1] + 1e-4 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0 and recall <= 0.01
    assert precision_recall(real, real) == (1.0, 1.0)


def test_precision_and_recall_equal_torch_fidelitys(golden):
    real, fake = golden["pr.real"], golden["pr.gen"]
    theirs = prc_features_to_metric(fake, real, prc_batch_size=64, verbose=False)
    assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_kernel_distance_is_the_mean_over_subsets_of_the_unbiased_estimate(golden):
    real, fake = golden["pr.real"][:150].double(), golden["pr.gen"][:150].double()
    size, width = min(len(real), len(fake)), real.shape[1]
    # of sets of one size a subset is the whole set in another order

    def mean_of_kernel(x: torch.Tensor, y: torch.Tensor, diagonal: bool) -> torch.Tensor:
        values = (x @ y.T / width + 1) ** 3
        return values.mean() if diagonal else (values.sum() - values.trace()) / (size * (size - 1))

    wanted = (
        mean_of_kernel(real, real, False) + mean_of_kernel(fake, fake, False) - 2 * mean_of_kernel(real, fake, True)
    )
    assert kid(real, fake, num_subsets=3) == pytest.approx((wanted.item(), 0), rel=1e-9, abs=1e-12)


def test_both_kinds_of_covariance_cost_one_root(golden):
    real, fake = sums(golden["fid.real"][:150]), sums(golden["fid.gen"])
    assert real.count != fake.count
    wanted = fid_of_sums(real, fake, 1), fid_of_sums(real, fake, 0)
    assert wanted[0] != wanted[1] and both_fids(real, fake) == pytest.approx(wanted, rel=1e-11)


def test_features_of_every_tap_are_those_of_torch_fidelitys_own_constructor(weights_file):
    images = pictures(2, 40, seed=3)
    taps = [str(tap) for tap in TAPS]
    theirs = FeatureExtractorInceptionV3("inception", taps, feature_extractor_weights_path=str(weights_file))
    for tap, wanted in zip(TAPS, theirs(images), strict=True):
        net = inception(str(weights_file), tap)
        assert torch.equal(net(images), wanted), tap
        assert net.width == tap and len(net.net.state_dict()) <= len(theirs.state_dict())


@pytest.mark.parametrize(
    ("tap", "n"), [(64, 12), pytest.param(2048, 24, marks=pytest.mark.slow)], ids=["64 features", "2048 features"]
)
def test_an_evaluation_equals_torch_fidelitys_own_from_files_to_numbers(tmp_path, weights_file, tap, n):
    real, fake = pictures(n, 32, seed=4), pictures(n + 3, 32, seed=5)
    judge = Evaluator(
        open_images(save(tmp_path / "real", real)),
        metrics=("fid", "kid", "pr"),
        num_fake=len(fake),
        tap=tap,
        batch_size=8,
        weights={"inception": str(weights_file)},
        workers=0,
    )
    values = judge.measure(lambda indices: fake[indices])[0]
    asked = {"feature_extractor_weights_path": str(weights_file), "kid_subset_size": n, "batch_size": 8}
    asked["feature_extractor"] = "inception-v3-compat"
    asked |= {f"feature_layer_{name}": str(tap) for name in ("fid", "kid", "prc")} | {"cuda": False, "cache": False}
    folders = [str(save(tmp_path / "fake", fake)), str(tmp_path / "real")]
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], fid=True, kid=True, prc=True, verbose=False, **asked
    )
    assert values["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert values["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert (values["precision"], values["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert values["fid_biased"] < values["fid"]


def test_vgg16_features_are_those_of_torch_fidelitys_own_constructor(tmp_path):
    made = vgg16("random").net.model.state_dict()
    rest = {"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)}
    torch.save({**made, **rest}, tmp_path / "vgg16.pth")
    theirs = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(tmp_path / "vgg16.pth"))
    images = pictures(2, 40, seed=3)
    assert torch.equal(vgg16(str(tmp_path / "vgg16.pth"))(images), theirs(images)[0])


@pytest.fixture(scope="module")
def clip_state() -> dict[str, torch.Tensor]:
    """A CLIP of our own size under OpenAI's names, with what its text side leaves in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CLIPVisual(12, 32, 2, 64, 16)
    text = {"text_projection": torch.zeros(5, 12), "ln_final.weight": torch.zeros(5), "logit_scale": torch.zeros(())}
    return {**net.state_dict(), **text}


@pytest.fixture(scope="module")
def dinov2_state() -> dict[str, torch.Tensor]:
    """The smallest DINOv2 under Meta's names, for images of 224 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=224)
    return {**net.state_dict(), "mask_token": torch.zeros(1, 384)}


def test_distances_in_clip_and_dinov2_features_need_files_and_no_network(
    tmp_path, real_folder, clip_state, dinov2_state, monkeypatch
):
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("a connection was opened"))
    files = {"clip": tmp_path / "clip.pth", "dinov2": tmp_path / "dinov2.pth"}
    torch.save(clip_state, files["clip"])
    torch.save(dinov2_state, files["dinov2"])
    weights = {name: str(path) for name, path in files.items()}
    judge = evaluator(str(real_folder), metrics=("fd_dinov2", "fd_clip", "kid_clip"), weights=weights)
    values, protocol = judge.measure(sample)
    assert values.keys() == {"fd_dinov2", "fd_clip", "kid_clip", "kid_clip_std"} and "features" not in protocol
    assert (protocol["dinov2"]["tap"], protocol["dinov2"]["resize"]) == ("vit-small-14", "tf1 224")
    assert (protocol["clip"]["tap"], protocol["clip"]["resize"]) == (12, "tf1 32")
    fake = torch.cat([clip(weights["clip"])(sample(list(range(11))[at : at + 4])) for at in range(0, 11, 4)])
    real = torch.cat([clip(weights["clip"])(images) for images in batches(open_images(real_folder), range(14), 4)])
    assert values["fd_clip"] == pytest.approx(fid_of_sums(sums(real), sums(fake)))
    assert values["kid_clip"] == kid(real, fake)[0]


def test_clip_and_dinov2_features_are_those_of_the_plain_networks(tmp_path, clip_state, dinov2_state):
    images = pictures(2, 40, seed=3)

    def prepared(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (side, side), align_corners=False)
        return (x / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    torch.save(clip_state, tmp_path / "clip.pth")
    plain = CLIPVisual(12, 32, 2, 64, 16)
    plain.load_state_dict({key: value for key, value in clip_state.items() if key.startswith("visual.")})
    own = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    # the file's own constructor rounds the weights to half precision, in which OpenAI publishes them
    found = clip(str(tmp_path / "clip.pth"))(images)
    torch.testing.assert_close(found, plain.visual(prepared(32, *own)), rtol=0, atol=3e-2)
    torch.save(dinov2_state, tmp_path / "dinov2.pth")
    net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=224).eval()
    net.load_state_dict({key: value for key, value in dinov2_state.items() if key != "mask_token"})
    wanted = net(prepared(224, IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(dinov2(str(tmp_path / "dinov2.pth"))(images), wanted, rtol=1e-4, atol=1e-4)


def test_the_features_of_lite0_know_a_cat_and_a_cup_of_espresso():
    """With the classifier that comes with them: names, scaling of the input and weights belong together."""
    from skimage import data

    from sdtrain.weights import load_weights

    net, state = lite0("package"), load_weights("lite0", "package")
    pictures = [torch.from_numpy(data.chelsea()[:, 75:375]), torch.from_numpy(data.coffee()[:, 100:500])]
    features = torch.cat([net(picture.permute(2, 0, 1)[None].contiguous()) for picture in pictures])
    assert features.shape == (2, 1280) and net.identity["resize"] == "tf1 224"
    classes = (features @ state["classifier.weight"].T + state["classifier.bias"]).softmax(1)
    assert classes[0, [281, 282, 285]].sum() > 0.6  # tabby, tiger cat, Egyptian cat
    assert classes[1, 967] > 0.6


def test_distances_in_lite0_features_are_those_of_its_rows(real_folder):
    judge = evaluator(str(real_folder), metrics=("fd_lite0", "kid_lite0"))
    values, protocol = judge.measure(sample)
    net = lite0("package")
    fake = torch.cat([net(sample(list(range(11))[at : at + 4])) for at in range(0, 11, 4)])
    real = torch.cat([net(images) for images in batches(open_images(real_folder), range(14), 4)])
    assert values["fd_lite0"] == pytest.approx(fid_of_sums(sums(real), sums(fake)))
    assert values["kid_lite0"] == kid(real, fake)[0] and protocol["lite0"]["tap"] == 1280


def test_position_embeddings_are_read_at_the_places_where_dinov2_reads_them():
    """Patch i of m lies at (i + 1/2) n / (m + 0.1) - 1/2, not at (i + 1/2) n / m - 1/2, which is up to 0.23 further.

    A ramp comes out of torch's cubic interpolation as a ramp within 0.05, but for its ends.
    """
    n, m = 37, 16
    ramp = torch.arange(n).float().expand(n, n)
    places = torch.cat([torch.full((1, 1, 2), 7.0), torch.stack([ramp, ramp.T], -1).reshape(1, n * n, 2)], 1)
    found = resampled(places, m)
    assert found.shape == (1, 1 + m * m, 2) and found[0, 0].tolist() == [7, 7]
    wanted = (torch.arange(m) + 0.5) * n / (m + 0.1) - 0.5
    grid = found[0, 1:].reshape(m, m, 2)
    for line in (grid[5, :, 0], grid[:, 5, 1]):
        torch.testing.assert_close(line[1:-1], wanted[1:-1], atol=0.06, rtol=0)
    assert torch.equal(resampled(found, m), found)


def test_files_of_other_networks_in_the_place_of_clip_and_dinov2_are_refused(tmp_path, clip_state, dinov2_state):
    torn = {key: value for key, value in clip_state.items() if "resblocks.1.ln_2" not in key}
    torch.save(torn, tmp_path / "clip.pth")
    with pytest.raises(WeightsError, match="given for clip do not fit together .*; give OpenAI's file"):
        clip(str(tmp_path / "clip.pth"))
    torch.save({"cls_token": torch.zeros(1, 1, 5)}, tmp_path / "dinov2.pth")
    with pytest.raises(WeightsError, match="are of no DINOv2; give dinov2_vitl14_pretrain.pth"):
        dinov2(str(tmp_path / "dinov2.pth"))
    torch.save({**dinov2_state, "norm.weight": torch.zeros(3)}, tmp_path / "dinov2.pth")
    with pytest.raises(WeightsError, match="dinov2 have no fitting tensor for norm.weight"):
        dinov2(str(tmp_path / "dinov2.pth"))
    with pytest.raises(WeightsError, match="clip weights .* have no random stand-in; give weights.clip"):
        clip("random")


def test_a_random_inception_is_alive_and_a_function_of_its_seed():
    images = pictures(6, 32, seed=6)
    first, again, other = (random_inception(seed, 64, lambda: [images])(images) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std(0).mean() > 0.01


@pytest.fixture(scope="module")
def one_rank(real_folder):
    return evaluator(str(real_folder)).measure(sample)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_metric_has_the_same_bits_on_any_number_of_ranks_and_one_failing_rank_stops_all(
    tmp_path, real_folder, one_rank, world
):
    script = str(REPO / "tests" / "ranks_evaluate.py")
    done = run_ranks(
        world, script, str(real_folder), str(world), str(tmp_path / "values"), env={"PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"values.{rank}").read_text()) for rank in range(world)]
    faults = [values.pop("fault") for values in found]
    assert found == [one_rank[0]] * world
    assert len(set(faults)) == 1 and faults[0].startswith("RankFailed: rank 1 (pid ")
    assert faults[0].endswith(": ZeroDivisionError: division by zero")


def test_a_result_states_seeds_spread_rule_counts_and_networks(one_rank, real_folder):
    values, protocol = one_rank
    assert values["rfid_seeds"] == [0, 1] and len(values["rfid_values"]) == 2
    assert values["rfid"] == pytest.approx(sum(values["rfid_values"]) / 2)
    assert values["rfid_std"] == pytest.approx(np.std(values["rfid_values"], ddof=1)) and values["rfid_std_ddof"] == 1
    assert values["rfid_rule"] == rfid.RULE_HASH == protocol["rfid"]["rule"]
    assert (protocol["num_fake"], protocol["num_real"], protocol["features"]["tap"]) == (11, 14, 64)
    assert protocol["real_hash"] == open_images(real_folder).hash
    json.dumps([values, protocol])


@pytest.mark.slow
def test_precision_and_recall_can_be_the_reference_codes_vgg16_features_and_half_precision(real_folder):
    asked = {"metrics": ("pr",), "pr_features": "vgg16", "weights": {"vgg16": "random"}}
    judges = [evaluator(str(real_folder), pr_precision=precision, **asked) for precision in ("fp32", "fp16")]
    for half, judge in enumerate(judges):
        values, protocol = judge.measure(sample)
        net = vgg16("random")
        fake = torch.cat([net(sample(list(range(11))[at : at + 4])) for at in range(0, 11, 4)])
        real = torch.cat([net(images) for images in batches(open_images(real_folder), range(14), 4)])
        wanted = precision_recall(real, fake, half=bool(half))
        assert (values["precision"], values["recall"]) == wanted and values.keys() == {"precision", "recall"}
        assert protocol["pr_features"]["extractor"] == "vgg16" and "features" not in protocol
        assert protocol["pr_precision"] == ("fp16" if half else "fp32")
    assert len({fingerprint(judge.protocol()) for judge in judges}) == 2


def test_real_statistics_are_read_once_and_then_come_from_the_cache(tmp_path, real_folder, one_rank, monkeypatch):
    settings = {"metrics": ("fid", "kid"), "cache": tmp_path / "cache"}
    first = evaluator(str(real_folder), **settings).measure(sample)[0]
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and files[0].name.startswith("real-")
    again = evaluator(str(real_folder), **settings)
    monkeypatch.setattr(again, "_read", lambda blocks: pytest.fail("the images were read again"))
    assert again.measure(sample)[0] == first
    assert first["fid"] == one_rank[0]["fid"]


def test_other_real_images_or_settings_never_share_a_cache_file(tmp_path, real_folder):
    others = save(tmp_path / "others", pictures(14, seed=9))
    asked = [
        evaluator(str(folder), metrics=("fid",), cache=tmp_path, **more)
        for folder, more in (
            (real_folder, {}),
            (others, {}),
            (real_folder, {"tap": 192}),
            (real_folder, {"num_real": 10}),
        )
    ]
    assert len({judge._cache_path() for judge in asked}) == 4


def test_protocols_that_differ_are_not_compared(one_rank):
    protocol = one_rank[1]
    other = {**protocol, "num_fake": 50, "split": "test"}
    assert differences(protocol, {**protocol, "split": "test"}) == []
    assert fingerprint(protocol) == fingerprint({**protocol, "split": "test"}) != fingerprint(other)
    with pytest.raises(ConfigError, match="measured in different ways .num_fake: 11 and 50., so their numbers do not"):
        require_same(protocol, other)


def test_a_subset_of_real_images_is_fixed_and_without_repeats():
    picked = subset(1000, 100)
    assert picked == subset(1000, 100) == sorted(set(picked)) and len(picked) == 100
    assert picked != list(range(100))
    assert subset(10, None) == subset(10, 50) == list(range(10))


def test_collapsed_samples_are_pointed_out(real_folder, caplog):
    grey = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        evaluator(str(real_folder), metrics=("fid",)).measure(lambda indices: grey.expand(len(indices), -1, -1, -1))
    assert "the generated images are all alike in features features" in caplog.text


def test_missing_inception_weights_name_place_and_command(real_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRAIN_WEIGHTS", str(tmp_path))
    judge = evaluator(str(real_folder), metrics=("fid",), extractor="inception")
    with pytest.raises(WeightsError, match="sdtrain fetch-weights inception"):
        judge.measure(sample)


def test_weights_of_another_network_are_refused(calibrated, tmp_path):
    torch.save({**calibrated, "Mixed_7c.branch_pool.bn.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="no fitting tensor for Mixed_7c.* give torch-fidelity's file weights-ince"):
        inception(str(tmp_path / "other.pth"), 2048)


def test_settings_that_cannot_work_are_refused(real_folder):
    with pytest.raises(ConfigError, match="The metrics .'is'. cannot be measured; choose from fid, rfid, kid, pr"):
        evaluator(str(real_folder), metrics=("is",))
    with pytest.raises(ConfigError, match="no tap of width 100"):
        Inception(100)


def test_shards_and_a_folder_of_the_same_images_have_the_same_fid(tmp_path, real_folder, one_rank):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in sorted(real_folder.iterdir()):
            tar.add(file, file.name)
    settings = {"metrics": ("fid",), "extractor": "random-inception", "tap": 64, "batch_size": 4, "workers": 0}
    judge = Evaluator(open_images(tmp_path), num_fake=11, **settings)
    assert judge.measure(sample)[0]["fid"] == one_rank[0]["fid"]


def test_a_folder_without_images_and_one_with_a_torn_image_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither shards nor images"):
        open_images(tmp_path / "empty")
    folder = save(tmp_path / "torn", pictures(3))
    file = folder / "0002.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match="0002.png cannot be read"):
        list(batches(open_images(folder), range(3), 2))


def test_images_of_unlike_size_are_refused(tmp_path):
    folder = save(tmp_path / "mixed", pictures(2))
    shutil.copy(save(tmp_path / "big", pictures(1, 24)) / "0000.png", folder / "9.png")
    with pytest.raises(
        DataError, match="9.png has 24 x 24 pixels, but images to evaluate must be square and of one size"
    ):
        list(batches(open_images(folder), range(3), 2))


@pytest.mark.parametrize(("mode", "key"), [("consecutive", "consecutive"), ("all_pairs", "all_pairs")])
def test_perceptual_variation_equals_the_reference_bookkeeping(golden, mode, key):
    images = [row.view(-1, 1) for row in golden["variation.values"]]
    for ddof, name in ((0, "std_over_latents_of_per_latent_mean"), (1, "std_over_latents_ddof1")):
        found = perceptual_variation(images, lambda x, y: (x - y).abs().flatten(), mode=mode, ddof=ddof, batch_size=3)
        assert found == pytest.approx((EXPECTED["variation"][key]["mean"], EXPECTED["variation"][key][name]), rel=1e-9)


def evaluate_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_prints_a_table_appends_a_row_and_compares_with_an_earlier_one(tmp_path, real_folder, capsys):
    fake = save(tmp_path / "fake", pictures(9, seed=7))
    words = [
        fake,
        "--real",
        real_folder,
        "--extractor",
        "random",
        "--tap",
        "64",
        "--device",
        "cpu",
        "--batch-size",
        "4",
    ]
    words += ["--cache", tmp_path / "cache", "--json", tmp_path / "rows.jsonl", "--workers", "0"]
    assert evaluate_command(*words, "--metrics", "fid,pr") == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    out = capsys.readouterr().out
    assert "9 generated, 14 real images" in out
    assert f"fid           {row['fid']:.4f}" in out and f"recall        {row['recall']:.4f}" in out
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert lines["fid"].endswith("random-inception 64, 9 generated, 14 real images")
    assert lines["recall"].endswith("random-inception 64 fp32, 9 generated, 14 real images")
    assert evaluate_command(*words, "--metrics", "fid,pr", "--against", tmp_path / "rows.jsonl") == 0
    assert f"{row['fid']:.4f} -> {row['fid']:.4f}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="num_fake: 9 and 8"):
        evaluate_command(*words, "--metrics", "fid,pr", "--num", "8", "--against", tmp_path / "rows.jsonl")


def test_the_command_refuses_what_cannot_work_in_one_sentence(tmp_path, real_folder, monkeypatch):
    monkeypatch.setenv("SDTRAIN_WEIGHTS", str(tmp_path))
    for words, message in {
        (str(real_folder), "--metrics", "fid,is"): "--metrics has is; choose from fid, rfid, kid, pr",
        (str(tmp_path / "nothing"),): "There is nothing at .*nothing; give a folder of images",
        (str(real_folder), "--extractor", "random"): "--real is missing: say which real images",
        (str(real_folder), "--inception", "random"): "is spelled --extractor random-inception",
        (str(real_folder), "--extractor", "random", "--real", str(real_folder), "--num", "99"): "--num 99 is more than",
        (str(real_folder), "--extractor", "random", "--against", str(tmp_path / "x")): "holds no evaluation",
    }.items():
        with pytest.raises(ConfigError, match=message):
            evaluate_command(*words)
    with pytest.raises(WeightsError, match="sdtrain fetch-weights inception"):
        evaluate_command(str(real_folder), "--real", str(real_folder))


def test_arguments_are_checked_without_torch():
    code = """
import argparse, sys
from sdtrain.commands import evaluate
parser = argparse.ArgumentParser()
evaluate.add_arguments(parser)
try:
    evaluate.run(parser.parse_args([".", "--metrics", "is"]))
except ValueError:
    assert "torch" not in sys.modules
    print("refused")
"""
    assert run_python("-c", code).stdout == "refused\n"
