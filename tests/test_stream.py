"""Without these, a restart repeats images, a worker changes the order, or one bad shard moves all samples behind it."""

from __future__ import annotations

import gc
import http.server
import io
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from test_pack import damage_byte, loose_tar, packed, png
from tiny import tiny_config, write_config

from sdtrain.config.load import load_config
from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.decoder import Decoder
from sdtrain.data.read.order import flipped, hashed, order, permutation, substitute
from sdtrain.data.read.patterns import expand
from sdtrain.data.read.pool import Pool, WorkerError, requests_of
from sdtrain.data.read.reader import iterate, planes_of, read_all, read_image
from sdtrain.data.read.stream import Batch, Stream
from sdtrain.errors import DataError
from sdtrain.trainer import Trainer

SIDE = 8
NUM = 40


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of one colour each (the number of the image), two classes, four shards."""
    source = tmp_path_factory.mktemp("source")
    for number in range(NUM):
        folder = source / ("even", "odd")[number >= NUM // 2]
        folder.mkdir(exist_ok=True)
        pixels = np.full((SIDE, SIDE, 3), number, np.uint8)
        pixels[:, 0] = 255  # the left column tells a mirrored image
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    out = tmp_path_factory.mktemp("shards") / "set"
    packed(source, out, "--resolution", str(SIDE), "--labels", "folder", "--shard-count", "4")
    return out


@pytest.fixture
def shards(clean: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(clean, tmp_path / "set"))


def batches(dataset: Dataset, num: int, **options: object) -> list[Batch]:
    settings = {"seed": 3, "batch_size": 8, "ghost_batch": 2, "ghosts": range(4), "workers": 0} | options
    with Stream(dataset, **settings) as stream:  # type: ignore[arg-type]
        return [next(stream) for _ in range(num)]


def colours(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 4].tolist()


def same(one: Batch, two: Batch) -> bool:
    labels = one.labels is two.labels is None or torch.equal(one.labels, two.labels)  # type: ignore[arg-type]
    return (
        one.step == two.step
        and torch.equal(one.images, two.images)
        and torch.equal(one.indices, two.indices)
        and labels
    )


def refusal(dataset: Dataset, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        batches(dataset, 50, **options)
    return str(caught.value)


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    first, second = order(7, np.arange(100), 100), order(7, np.arange(100, 200), 100)
    assert sorted(first) == sorted(second) == list(range(100)) and list(first) != list(second)


def test_the_order_is_frozen() -> None:
    assert order(0, np.arange(8), 10).tolist() == FROZEN_ORDER
    assert flipped(0, np.arange(16)).astype(int).tolist() == FROZEN_FLIPS
    assert [substitute(0, 5, attempt, 1000) for attempt in range(3)] == FROZEN_SUBSTITUTES


FROZEN_ORDER = [9, 8, 3, 5, 1, 6, 4, 0]
FROZEN_FLIPS = [1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1]
FROZEN_SUBSTITUTES = [818, 932, 539]


def test_a_position_has_the_same_sample_however_it_is_asked_for() -> None:
    together = order(1, np.arange(250), 100)
    assert [int(order(1, position, 100)) for position in range(250)] == together.tolist()
    assert order(1, np.array([10**12]), 100).shape == (1,)
    assert not permutation(1, 0, 100).flags.writeable


def test_half_of_the_positions_are_mirrored_and_hashes_are_uniform() -> None:
    assert abs(flipped(5, np.arange(100_000)).mean() - 0.5) < 0.01
    bits = hashed(5, "crop x", np.arange(100_000)) % np.uint64(10)
    assert np.abs(np.bincount(bits.astype(int)) / 100_000 - 0.1).max() < 0.01


def test_pixels_labels_and_indices_belong_together(clean: Path) -> None:
    for batch in batches(open_dataset(clean), 6):
        assert colours(batch) == batch.indices.tolist()
        assert batch.labels is not None and batch.labels.shape == (8, 2)
        assert batch.labels.argmax(1).tolist() == [int(i >= NUM // 2) for i in batch.indices]


def test_ghosts_of_any_rank_are_slices_of_the_global_batch(clean: Path) -> None:
    dataset = open_dataset(clean)
    for whole, first, rest in zip(
        batches(dataset, 8),
        batches(dataset, 8, ghosts=[0], workers=1),
        batches(dataset, 8, ghosts=[1, 2, 3], prefetch=3),
        strict=True,
    ):
        assert torch.equal(whole.images, torch.cat([first.images, rest.images]))
        assert torch.equal(whole.indices, torch.cat([first.indices, rest.indices]))


def test_workers_and_prefetch_change_nothing(clean: Path) -> None:
    dataset = open_dataset(clean)
    expected = batches(dataset, 12, xflip=True)
    for workers, prefetch in ((1, 1), (3, 5)):
        found = batches(dataset, 12, xflip=True, workers=workers, prefetch=prefetch)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_resuming_at_a_step_continues_the_sequence(clean: Path) -> None:
    dataset = open_dataset(clean)
    whole = batches(dataset, 15, xflip=True)
    assert all(same(a, b) for a, b in zip(batches(dataset, 5, xflip=True, start_step=10), whole[10:], strict=True))


def test_mirroring_follows_the_position(clean: Path) -> None:
    for batch in batches(open_dataset(clean), 6, xflip=True):
        mirrored = (batch.images[:, 0, 0, -1] == 255).numpy()
        assert (mirrored == flipped(3, batch.step * 8 + np.arange(8))).all()


def test_another_purpose_has_another_order(clean: Path) -> None:
    dataset = open_dataset(clean)
    assert not torch.equal(batches(dataset, 1)[0].indices, batches(dataset, 1, purpose="probe")[0].indices)


def test_batches_stay_valid_while_later_ones_are_read(clean: Path) -> None:
    kept = batches(open_dataset(clean), 12, workers=2)
    assert all(colours(batch) == batch.indices.tolist() for batch in kept)


def test_bad_samples_are_replaced_and_no_other_sample_moves(shards: Path) -> None:
    dataset = open_dataset(shards)
    expected = batches(dataset, 10)
    bad = [int(expected[0].indices[row]) for row in (3, 6)]
    for i in bad:
        damage_byte(Path(dataset.shards[dataset.index.shard[i]]), int(dataset.index.offset[i]) + 3)
    dataset = open_dataset(shards)  # one that knows no other content
    for workers in (0, 2):
        found = batches(dataset, 10, workers=workers, max_bad=0.1)
        for step, (batch, was) in enumerate(zip(found, expected, strict=True)):
            moved = (batch.indices != was.indices).nonzero().reshape(-1)
            assert set(was.indices[moved].tolist()) <= set(bad) and not set(bad) & set(batch.indices.tolist())
            assert colours(batch) == batch.indices.tolist()
            stand_ins = [substitute(3, step * 8 + int(row), 0, NUM) for row in moved]
            assert batch.indices[moved].tolist() == stand_ins


def test_bad_samples_are_located_and_resuming_chooses_the_same_substitutes(shards: Path) -> None:
    dataset = open_dataset(shards)
    Path(dataset.shards[1]).write_bytes(Path(dataset.shards[1]).read_bytes()[:5000])
    whole = batches(dataset, 12, max_bad=0.5)
    resumed = batches(dataset, 4, max_bad=0.5, start_step=8)
    assert all(same(a, b) for a, b in zip(resumed, whole[8:], strict=True))
    with Stream(dataset, seed=3, batch_size=8, ghost_batch=2, ghosts=range(4), workers=2, max_bad=0.5) as stream:
        for _ in range(5):
            next(stream)
        lost = stream.bad
    assert {shard for shard, _, _ in lost} == {"shard-000001.tar"} and 5 <= len(lost) <= 10
    assert all(reason.startswith("truncated tar: ") for _, _, reason in lost)


def test_too_many_bad_samples_stop_the_run_and_name_the_worst_shard(shards: Path) -> None:
    dataset = open_dataset(shards)
    os.truncate(dataset.shards[2], 0)
    message = refusal(dataset, max_bad=0.05)
    assert message.startswith(
        "3 of 40 samples are unreadable, data.max_bad allows 0.05; worst shards: shard-000002.tar (3); last: "
    )
    lacking = int(dataset.index.size[stream_bad(dataset)])
    reason = f"truncated tar: shard ends {lacking} bytes too early"
    assert message.endswith(f" in shard-000002.tar, {reason}; run: sdtrain verify {shards}")
    assert "1 of 40 samples are unreadable, data.max_bad allows 0" in refusal(dataset, max_bad=0.0)


def stream_bad(dataset: Dataset) -> int:
    """The third sample of the third shard that the order of seed 3 meets."""
    met = [int(i) for i in order(3, np.arange(NUM), NUM) if dataset.index.shard[i] == 2]
    return met[2]


def test_a_number_of_bad_samples_in_a_row_stops_the_run(shards: Path) -> None:
    dataset = open_dataset(shards)
    for shard in dataset.shards:
        os.truncate(shard, 0)
    message = refusal(dataset, max_bad=6)
    assert message.startswith("7 samples in a row are unreadable, max_bad allows 6; worst shards: ")


def test_a_missing_shard_is_reported_when_opening_and_replaced_when_reading(shards: Path) -> None:
    (shards / "shard-000003.tar").unlink()
    dataset = open_dataset(shards)
    assert dataset.damage == (("shard-000003.tar", "", "missing shard"),) and "1 damaged places" in dataset.describe()
    assert all(i < 30 for batch in batches(dataset, 5, max_bad=0.5) for i in batch.indices)


def test_a_killed_worker_is_named_and_nothing_hangs(clean: Path) -> None:
    with Stream(open_dataset(clean), seed=3, batch_size=8, ghost_batch=2, ghosts=range(4), workers=2) as stream:
        next(stream)
        pid = stream._pool.workers[1].pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            for _ in range(10):
                next(stream)
    hint = "the machine may be out of memory; lower data.workers or data.prefetch"
    assert str(caught.value) == f"decoding worker 1 (pid {pid}) was killed by SIGKILL; {hint}"


def test_a_stuck_worker_is_reported_within_the_limit(clean: Path) -> None:
    dataset = open_dataset(clean)
    pool = Pool(dataset, num_workers=1, num_slots=1, slot_bytes=3 * SIDE * SIDE, stuck_sec=0.3)
    os.kill(pool.workers[0].pid, signal.SIGSTOP)
    pool.submit(0, 0, requests_of(dataset, np.array([0]), SIDE))
    with pytest.raises(WorkerError) as caught:
        pool.wait(0)
    missing = f"The answer of decoding worker 0 (pid {pool.workers[0].pid}) is missing"
    told = f"no decoding process answered for 0.3 s; is the storage of the shards stuck? {missing}"
    assert str(caught.value) == told
    pool.close()


def test_stop_signals_are_left_to_the_trainer_and_closing_ends_the_processes(clean: Path) -> None:
    with Stream(open_dataset(clean), seed=3, batch_size=8, ghost_batch=2, ghosts=range(4), workers=2) as stream:
        next(stream)
        processes = list(stream._pool.workers)
        for process in processes:
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                process.send_signal(name)
        for _ in range(4):
            next(stream)
    assert [process.returncode for process in processes] == [0, 0]


def test_a_decoding_process_finds_the_package_from_any_folder(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, start = {}, subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *args, env, **how: given.update(env) or start(*args, env=env, **how))
    Pool(open_dataset(clean), num_workers=1, num_slots=1, slot_bytes=1).close()
    assert given["PYTHONPATH"].split(os.pathsep)[0] == str(REPO)


def test_dropping_a_stream_ends_its_processes(clean: Path) -> None:
    stream = Stream(open_dataset(clean), seed=3, batch_size=8, ghost_batch=2, ghosts=range(4), workers=1)
    next(stream)
    process = stream._pool.workers[0]
    del stream
    gc.collect()
    assert process.poll() == 0


def test_descriptors_are_bounded(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.data.read.decoder.OPEN_SHARDS", 2)
    dataset = open_dataset(clean)
    decoder = Decoder(dataset.shards, dataset.sha256, "", False)
    buffer = np.zeros(NUM * 3 * SIDE * SIDE, np.uint8)
    assert decoder.run(requests_of(dataset, np.arange(NUM), SIDE), buffer) == []
    assert len(decoder._open) == 2
    decoder.close()


def test_random_crops_are_decided_by_the_position(tmp_path: Path) -> None:
    loose_tar(tmp_path / "big.tar", [(f"{n}.png", png(n, 24 + n)) for n in range(8)])
    dataset = open_dataset(str(tmp_path / "big.tar"))
    assert dataset.resolution is None
    once, again = batches(dataset, 4, crop=16), batches(dataset, 4, crop=16, workers=2)
    assert all(same(a, b) for a, b in zip(once, again, strict=True)) and once[0].images.shape == (8, 3, 16, 16)
    image = read_image(dataset, int(once[0].indices[0]))
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    assert (windows == once[0].images[0]).all((1, 2, 3)).sum() == 1


def test_small_images_are_padded_by_reflection_only_when_asked(tmp_path: Path) -> None:
    loose_tar(tmp_path / "s.tar", [(f"{n}.png", png(n, 12)) for n in range(8)])
    dataset = open_dataset(str(tmp_path / "s.tar"))
    images = batches(dataset, 1, crop=16, pad=True)[0].images
    assert torch.equal(images[..., 12:16], images[..., 7:11].flip(-1))
    assert "smaller than the crop: 12x12, crop 16" in refusal(dataset, crop=16)


def test_pairs_are_cut_at_the_same_place(tmp_path: Path) -> None:
    members = []
    for number in range(8):
        hq = Image.open(io.BytesIO(png(number, 32)))
        lq = hq.resize((8, 8), Image.Resampling.BOX)
        hq = lq.resize((32, 32), Image.Resampling.NEAREST)
        members += [(f"{number}.png", raw(hq)), (f"{number}.lq.png", raw(lq))]
    loose_tar(tmp_path / "pairs.tar", members)
    dataset = open_dataset(str(tmp_path / "pairs.tar"))
    assert dataset.paired
    for batch in batches(dataset, 3, crop=16, paired=True, scale=4, xflip=True, workers=2):
        assert batch.lq is not None and batch.lq.shape == (8, 3, 4, 4)
        assert torch.equal(batch.images[..., ::4, ::4], batch.lq)


def raw(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_images_are_read_once_each_in_the_order_asked_for(clean: Path) -> None:
    dataset = open_dataset(clean)
    wanted = np.array([5, 39, 0, 17, 5])
    for workers in (0, 2):
        parts = list(iterate(dataset, wanted, batch_size=2, workers=workers))
        assert [len(images) for images, _ in parts] == [2, 2, 1]
        assert torch.cat([indices for _, indices in parts]).tolist() == wanted.tolist()
        assert torch.cat([images for images, _ in parts])[:, 0, 0, 4].tolist() == wanted.tolist()
    assert read_all(dataset)[:, 0, 0, 4].tolist() == list(range(NUM))


def test_evaluation_refuses_a_bad_sample_unless_it_is_told_to_note_it(shards: Path) -> None:
    dataset = open_dataset(shards)
    damage_byte(Path(dataset.shards[0]), int(dataset.index.offset[2]) + 3)
    with pytest.raises(DataError) as caught:
        read_all(dataset)
    assert str(caught.value) == (
        "sample 00000002-02 in shard-000000.tar cannot be read (not an image in a known format); "
        f"run: sdtrain verify {shards}"
    )
    noted: list[tuple[str, str, str]] = []
    seen = torch.cat([indices for _, indices in iterate(dataset, range(5), 2, workers=0, bad=noted)])
    assert seen.tolist() == [0, 1, 3, 4]
    assert noted == [("shard-000000.tar", "00000002-02", "not an image in a known format")]


def test_patterns_expand_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s-000000.tar", "s-000001.tar", "t-000000.tar"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert expand("s-{000000..000001}.tar") == ["s-000000.tar", "s-000001.tar"]
    assert expand("{t,s}-000000.tar") == ["t-000000.tar", "s-000000.tar"]
    assert expand("*-000000.tar") == ["s-000000.tar", "t-000000.tar"]
    assert expand("http://host/x-{08..10}.tar") == [f"http://host/x-{n}.tar" for n in ("08", "09", "10")]


def test_a_pattern_that_matches_nothing_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(f"{tmp_path}/none-{{000..002}}.tar")
    assert str(caught.value) == (
        f"no shard matches {tmp_path}/none-{{000..002}}.tar (looked from {os.getcwd()}); "
        "check the path, or make shards with: sdtrain pack"
    )
    with pytest.raises(DataError, match="^the list of data sources is empty"):
        open_dataset([])


def test_tars_without_a_usable_sample_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "foreign.tar").write_bytes(b"hello" * 400)
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / "foreign.tar"))
    path = tmp_path / "foreign.tar"
    assert str(caught.value) == f"{path} has no usable sample (foreign.tar: not a tar file); run: sdtrain verify {path}"


def test_damaged_tars_beside_good_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    loose_tar(tmp_path / "b.tar", [("1.png", png(1)), ("2.png", png(2))])
    whole = loose_tar(tmp_path / "c.tar", [("3.png", png(3)), ("4.png", png(4))]).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:2300])
    dataset = open_dataset(str(tmp_path / "*.tar"))
    assert dataset.num_samples == 3
    assert [(shard, reason.split(":")[0]) for shard, _, reason in dataset.damage] == [
        ("a.tar", "empty file (0 bytes)"),
        ("c.tar", "truncated tar"),
    ]


def test_data_that_cannot_serve_the_model_are_refused(clean: Path) -> None:
    dataset = open_dataset(clean)
    assert refusal(dataset, batch_size=48, ghosts=range(24)) == (
        f"{clean} has 40 samples, fewer than a batch of 48; lower batch_size"
    )
    assert refusal(dataset, resolution=16) == f"{clean} holds 8 px images, the model needs 16 px; pack at 16 px"
    assert "the model asks for 1; every image is converted to RGB" in refusal(dataset, channels=1)
    assert "lacks low-quality partners (KEY.lq.png)" in refusal(dataset, paired=True)


def test_mixed_sizes_need_a_crop(tmp_path: Path) -> None:
    loose_tar(tmp_path / "m.tar", [("1.png", png(1, 8)), ("2.png", png(2, 12))])
    dataset = open_dataset(str(tmp_path / "m.tar"))
    assert "holds images of mixed sizes; set a crop" in refusal(dataset, batch_size=2, ghosts=[0])
    with pytest.raises(DataError, match="mixed sizes, which do not stack"):
        read_all(dataset)


def test_an_image_of_another_size_inside_a_shard_is_quarantined(tmp_path: Path) -> None:
    loose_tar(tmp_path / "m.tar", [(f"{n}.png", png(n, 8)) for n in range(9)] + [("z.png", png(9, 12))])
    dataset = open_dataset(str(tmp_path / "m.tar"))
    with Stream(dataset, seed=0, batch_size=10, ghost_batch=10, ghosts=[0], workers=0, max_bad=0.2) as stream:
        next(stream)
        assert stream.bad == [("m.tar", "z", "wrong resolution: 12x12, not 8x8")]


def test_a_stale_or_damaged_index_is_refused(shards: Path) -> None:
    with open(shards / "shard-000000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match="the index is stale; run: sdtrain pack --reindex$"):
        open_dataset(shards)
    (shards / "index.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match="is not a usable index .*rebuild it with: sdtrain pack --reindex "):
        open_dataset(shards)


def test_an_index_with_a_pickle_inside_is_refused_unread(shards: Path, tmp_path: Path) -> None:
    np.savez(shards / "index.npz", shards=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="is not a usable index"):
        open_dataset(shards)


def test_the_index_of_foreign_tars_is_kept_unless_nothing_may_be_written(tmp_path: Path) -> None:
    loose_tar(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(3)])
    open_dataset(str(tmp_path / "a.tar"), keep_index=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    first = open_dataset(str(tmp_path / "a.tar"))
    assert len(list(tmp_path.glob(".index-*.npz"))) == 1
    assert open_dataset(str(tmp_path / "a.tar")).hash == first.hash


def test_several_sources_are_joined_in_the_order_given(clean: Path, tmp_path: Path) -> None:
    joined = open_dataset([str(clean), str(clean / "shard-000003.tar")])
    assert joined.num_samples == 50 and joined.resolution == 8
    assert read_all(joined, [0, 39, 40, 49])[:, 0, 0, 4].tolist() == [0, 39, 30, 39]
    assert joined.locate(49) == ("shard-000003.tar", "00000039-39")
    loose_tar(tmp_path / "plain.tar", [("1.png", png(1))])
    with pytest.raises(DataError, match="^sources disagree about their classes"):
        open_dataset([str(clean), str(tmp_path / "plain.tar")])


@pytest.fixture
def server(clean: Path):
    """The shards over http on this machine, with a count of the requests."""
    asked: Counter[str] = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[Path(self.path).name] += 1
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(clean)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/", asked
    httpd.shutdown()


def test_remote_shards_are_fetched_once_on_first_need(clean: Path, server: tuple, tmp_path: Path) -> None:
    url, asked = server
    dataset = open_dataset(url, cache=tmp_path / "cache")
    assert dataset.hash == open_dataset(clean).hash and set(asked) == {"index.npz", "manifest.json"}
    assert all(same(a, b) for a, b in zip(batches(dataset, 6, workers=2), batches(open_dataset(clean), 6), strict=True))
    assert asked["shard-000000.tar"] == asked["shard-000003.tar"] == 1
    names = {path.name for path in (tmp_path / "cache").rglob("*.tar*") if not path.name.startswith(".lock")}
    assert names == {f"shard-{n:06d}.tar" for n in range(4)}


def test_a_remote_shard_that_differs_from_the_manifest_is_not_used(shards: Path, clean: Path, tmp_path: Path) -> None:
    damage_byte(shards / "shard-000000.tar", 600)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    dataset = open_dataset(f"http://127.0.0.1:{httpd.server_port}/", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"shard-000000.tar has sha256 .* its manifest .*; pack or upload it again"):
        dataset.local_path(0)
    assert not list((tmp_path / "cache").rglob("shard-000000.tar"))
    httpd.shutdown()


def test_pipe_sources_are_read_through_the_cache(clean: Path, tmp_path: Path) -> None:
    urls = [f"pipe:cat {clean}/shard-00000{n}.tar" for n in range(2)]
    dataset = open_dataset(urls, cache=tmp_path / "cache", allow_pipe=True)
    assert read_all(dataset)[:, 0, 0, 4].tolist() == list(range(20))
    with pytest.raises(DataError, match="^fetching pipe:cat /nowhere.tar into .* failed"):
        open_dataset("pipe:cat /nowhere.tar", cache=tmp_path / "cache", allow_pipe=True)


def test_pixels_are_the_same_in_planes_and_as_decoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, 2 * 4 * 4 * 3 + 5, dtype=np.uint8)
    planes, decoded = (planes_of(pixels, 2, 4, as_decoded) for as_decoded in (False, True))
    assert planes.is_contiguous() and torch.equal(planes, decoded)
    assert np.array_equal(decoded.permute(0, 2, 3, 1).contiguous().flatten().numpy(), pixels[: 2 * 4 * 4 * 3])
    assert decoded.is_contiguous(memory_format=torch.channels_last)


def test_chunks_are_the_same_whichever_way_images_lie_in_memory(tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(tmp_path))
    trainer = Trainer(load_config(file, []), torch.device("cpu"), 32, num_samples=48)
    trainer.enter(trainer.method.stages[0])
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    chunks = [
        trainer.chunks(Batch(step=0, images=given, labels=None, indices=torch.arange(16)))
        for given in (images, images.contiguous(memory_format=torch.channels_last))
    ]
    for one, other in zip(*chunks, strict=True):
        assert torch.equal(one.real, other.real) and one.real.stride() == other.real.stride()
