"""Without this file a FID could drift from everyone else's, depend on the number of ranks, or compare unlike things."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPO, run_python, run_ranks
from ranks_evaluate import evaluator, sample
from safetensors.torch import load_file

from sdtrain.commands import evaluate as command
from sdtrain.errors import ConfigError, DataError, WeightsError
from sdtrain.metrics import rfid
from sdtrain.metrics.evaluate import Evaluator, subset
from sdtrain.metrics.features import VGG16Features, inception, random_inception, vgg16
from sdtrain.metrics.fid import fid_of_features, fid_of_sums
from sdtrain.metrics.images import batches, open_images
from sdtrain.metrics.inception import TAPS, Inception, resize_tf1
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


def test_precision_recall_and_kid_equal_torch_fidelity(golden):
    prc, kids = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("prc", "kid"))
    real, fake = golden["pr.real"], golden["pr.gen"]
    theirs = prc.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    more = {"kid_subsets": 5, "kid_subset_size": 100, "verbose": False, "rng_seed": 2020}
    found = kids.kid_features_to_metric(fake.double(), real.double(), **more)
    wanted = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    assert kid(real, fake, num_subsets=5, subset_size=100) == pytest.approx(wanted, rel=1e-9)


def test_the_resize_is_tensorflows_and_not_pytorchs():
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = pictures(2, 20).float()
    wanted = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, size=(31, 31), align_corners=False)
    torch.testing.assert_close(resize_tf1(x, 31), wanted, atol=1e-3, rtol=0)
    modern = torch.nn.functional.interpolate(x, (31, 31), mode="bilinear")
    assert (modern - wanted).abs().max() > 1


def torch_fidelity_features(weights_file, images: torch.Tensor, taps: list[str]) -> dict[str, torch.Tensor]:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("inception", taps, feature_extractor_weights_path=str(weights_file))
    with torch.no_grad():
        return theirs.convert_features_tuple_to_dict(theirs(images))


def torch_fidelity_fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    stats = [theirs.fid_features_to_statistics(rows.double()) for rows in (fake, real)]
    return theirs.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def test_features_of_every_tap_equal_torch_fidelity(weights_file):
    images = pictures(2, 40, seed=3)
    theirs = torch_fidelity_features(weights_file, images, [str(tap) for tap in TAPS])
    for tap in TAPS:
        ours = inception(str(weights_file), tap)(images)
        gap = (ours - theirs[str(tap)]).abs().max() / theirs[str(tap)].abs().max()
        assert gap < 1e-4, f"tap {tap}: {gap}"


@pytest.mark.parametrize(
    ("tap", "n"), [(64, 12), pytest.param(2048, 24, marks=pytest.mark.slow)], ids=["64 features", "2048 features"]
)
def test_fid_of_an_evaluation_equals_torch_fidelity_on_the_same_images(tmp_path, weights_file, tap, n):
    real, fake = pictures(n, 32, seed=4), pictures(n + 3, 32, seed=5)
    judge = Evaluator(
        open_images(save(tmp_path / "real", real)),
        num_fake=len(fake),
        tap=tap,
        batch_size=8,
        weights={"inception": str(weights_file)},
        workers=0,
    )
    values = judge.measure(lambda indices: fake[indices])[0]
    features = [torch_fidelity_features(weights_file, images, [str(tap)])[str(tap)] for images in (real, fake)]
    assert values["fid"] == pytest.approx(torch_fidelity_fid(*features), rel=1e-6 if tap == 64 else 1e-4)
    assert values["fid_biased"] < values["fid"]


def test_vgg16_features_equal_torch_fidelitys_network():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs = models.vgg16(weights=None).state_dict()
        ours = VGG16Features().state_dict()
    assert {key: ours[key].shape for key in ours} == {
        key: value.shape for key, value in theirs.items() if not key.startswith("classifier.6")
    }


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
    assert done.returncode == 0, done.stderr[-2000:]
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


def test_weights_of_another_network_are_refused(calibrated):
    state = {key: value for key, value in calibrated.items() if not key.startswith("Mixed_7c")}
    with pytest.raises(WeightsError, match="no fitting tensor Mixed_7c"):
        Inception(2048).load(state)


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
    assert f"fid         {row['fid']:.4f}" in out and f"recall      {row['recall']:.4f}" in out
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
