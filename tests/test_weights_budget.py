"""Weights files that ask for much or contradict themselves: without these tests one could fill the memory or hang.

Hostile pickles are written opcode by opcode. What is too large is refused by the budget of the file's size, so a test
that hangs or dies for lack of memory has failed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fuzz.weights import golden, header_of, packed_int, packed_text, tiny_networks, with_header
from safetensors.torch import load, save

from sdtrain.commands.importing import import_file, inspected
from sdtrain.errors import WeightsError
from sdtrain.interop.architectures import NETWORKS, recognise
from sdtrain.interop.loading import load_network
from sdtrain.interop.official import read_official
from sdtrain.interop.pickle_machine import Record
from sdtrain.interop.safe_pickle import read_bytes, read_checkpoint
from sdtrain.weights import check_weights, load_weights

LIST = b"](" + b"".join(packed_int(i) for i in range(20_000)) + b"eq\x01"
TABLE = b"}(" + b"".join(packed_text(f"k{i}") + b"N" for i in range(20_000)) + b"uq\x01"
TEXT = packed_text("x" * 500_000) + b"q\x01"
MODULE = b"ctorch.nn.modules.container\nSequential\n"
SHARED = b")q\x01" + (b"0(" + b"h\x01" * 8 + b"tq\x01") * 30  # 8 ** 30 leaves to whoever walks it
ENCODE = b"c_codecs\nencode\nh\x01" + packed_text("latin1") + b"\x86R"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
SCALAR = b"cnumpy.core.multiarray\nscalar\n"


def pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


@pytest.mark.parametrize("body", [
    LIST + b"0](" + b"c__builtin__\nset\nh\x01\x85R" * 100 + b"e",
    TABLE + b"0](" + b"ccollections\nOrderedDict\nh\x01\x85R" * 100 + b"e",
    TABLE + b"0](" + (MODULE + b")\x81h\x01b") * 100 + b"e",
    TEXT + b"0](" + ENCODE * 200 + b"e",
    b"](" + b"\x8f" * 400_000 + b"e",
    MODULE + b"q\x010](" + b"h\x01)\x81" * 110_000 + b"e",
], ids=["sets of a list", "dictionaries of a dictionary", "states", "texts", "empty sets", "records"])  # fmt: skip
def test_values_that_multiply_end_at_the_budget_of_the_file(body):
    with pytest.raises(WeightsError, match="far more than a checkpoint of its size holds"):
        read_bytes("hostile", pickled(body))


@pytest.mark.parametrize("body", [
    SHARED + b"0" + TENSOR + b"(h\x01K\x00h\x01h\x01tR",
    SHARED + b"0" + SCALAR + b"cnumpy\ndtype\nh\x01\x85RC\x01a\x86R",
    SHARED + b"0}h\x01Ns",
    b"}(" + b"".join(packed_int(k * (2**61 - 1)) + b"N" for k in range(1, 90_000)) + b"u",
    b"I" + b"9" * 100_000 + b"\n",
    packed_text("\ud800"),
], ids=["shape", "type", "key", "keys that hash alike", "digits", "half a character"])  # fmt: skip
def test_values_that_are_slow_to_look_at_are_refused_unseen(body):
    with pytest.raises(WeightsError, match="nothing of the file was run") as caught:
        read_bytes("hostile", pickled(body))
    assert len(str(caught.value)) < 1000


def test_what_an_inspection_prints_has_no_control_characters_and_any_key_will_do(tmp_path):
    named = b"\x93".join((packed_text("torch.nn.modules.\x1b[2J") + packed_text("Linear"), b")\x81"))
    with pytest.raises(WeightsError, match="wants the global"):
        read_bytes("hostile", pickled(named))
    data = golden("sdgan/sg2_snapshot.pkl")
    assert data.endswith(b"u.")
    odd = packed_text("\x1b[2J") + b"N" + b"NN" + b"C\x01aN" + b"K\x05N"
    (tmp_path / "a.pkl").write_bytes(data[:-2] + odd + b"u.")
    shown = "\n".join(inspected(tmp_path / "a.pkl", {}))
    assert "\x1b" not in shown and "what        StyleGAN2-ADA snapshot" in shown
    assert len(list(import_file(tmp_path / "a.pkl", tmp_path / "out"))) == 3


def network(kind: str, player: str = "Generator") -> tuple[dict, bytes]:
    return next((card, data) for card, data in tiny_networks() if (card["kind"], card["player"]) == (kind, player))


def saved(folder: Path, card: dict | None, data: bytes) -> Path:
    if card is not None:
        (folder / "a.json").write_text(json.dumps(card))
    (folder / "a.safetensors").write_bytes(data)
    return folder / "a.safetensors"


@pytest.mark.parametrize("kind, options, fields, message", [
    ("rrdbnet", {"num_block": 10**9}, {}, "cannot have the num_block"),
    ("rrdbnet", {"num_block": 10**6}, {}, "far more layers than it has tensors"),
    ("srvgg", {"num_conv": 10**6}, {}, "far more layers than it has tensors"),
    ("stylegan2", {"mapping_layers": 10**8}, {}, "cannot have the mapping_layers"),
    ("stylegan2", {"z_dim": -1}, {}, "option z_dim"),
    ("stylegan2", {"z_dim": 2**62}, {}, "cannot have the z_dim"),
    ("stylegan2", {"z_dim": "8"}, {}, "option z_dim"),
    ("stylegan2", {"depth": 3}, {}, "option depth"),
    ("stylegan2", {}, {"resolution": 2**62}, "cannot have the resolution"),
    ("stylegan2", {}, {"resolution": "16"}, "resolution is a str"),
    ("stylegan2", {}, {"num_classes": 10**12}, "cannot have the num_classes"),
    ("stylegan2", {}, {"num_classes": -1}, "cannot be rebuilt"),
    ("stylegan2", {}, {"source": 5}, "source is a int"),
    ("stylegan2", {}, {"player": ["Generator"]}, "player is a list"),
    ("stylenat", {"dilations": [[2**40]] * 4}, {}, "cannot have the dilations"),
    ("r3gan", {"groups": [3, 3]}, {}, "cannot be rebuilt"),
])  # fmt: skip
def test_a_card_that_the_tensors_contradict_is_refused_before_anything_is_built(
    kind, options, fields, message, tmp_path
):
    card, data = network(kind)
    path = saved(tmp_path, {**card, "options": {**card["options"], **options}, **fields}, data)
    with pytest.raises(WeightsError, match=message):
        load_network(path).build()


@pytest.mark.parametrize("text", ["[" * 50_000, '{"kind": "srvgg", "source": ' + '{"a": ' * 500 + "1" + "}" * 501,
                                  " " * (2 << 20), '{"kind": ' + "9" * 5000 + "}", "\xff", "null", "{}"])  # fmt: skip
def test_a_card_that_is_deep_long_or_no_card_is_a_sentence(text, tmp_path):
    path = saved(tmp_path, None, network("srvgg")[1])
    (tmp_path / "a.json").write_text(text, encoding="latin1")
    with pytest.raises(WeightsError, match="does not describe a network"):
        load_network(path)


@pytest.mark.parametrize("kind, old, new", [
    ("rrdbnet", "body.0.rdb2", "body.999999999.rdb2"), ("srvgg", "body.1.", f"body.{'9' * 5000}."),
    ("stylenat", "layers.3.", "layers.999999999999."), ("stylegan2", "b16.", "b99999999999999999999."),
    ("r3gan", "MainLayers.1.", "MainLayers.888888888."), ("gcfsr", "condition_scale1.1.", "condition_scale1.77777777."),
    ("rrdbnet", "conv_hr", "x" * 100_000), ("rrdbnet", "conv_hr", "\x1b[2J"),
])  # fmt: skip
def test_numbers_and_names_of_tensors_that_no_network_has_are_refused(kind, old, new, tmp_path):
    header, data = header_of(network(kind)[1])
    header = {name.replace(old, new): entry for name, entry in header.items()}
    with pytest.raises(WeightsError) as caught:
        load_network(saved(tmp_path, None, with_header(json.dumps(header).encode(), data))).build()
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()


@pytest.mark.parametrize("mark", NETWORKS)
@pytest.mark.parametrize("shape", [[], [0], [1], [2, 3], [4, 4, 3, 3], [1, 0, 3, 3]])
def test_a_mark_without_its_network_is_one_sentence(mark, shape):
    with pytest.raises(WeightsError):
        recognise({mark: torch.ones(shape)}, None, {"file": "only.pth"}).build()


def test_tensors_of_other_numbers_than_a_network_takes_are_refused():
    card, data = network("rrdbnet")
    state = load(data)
    state["conv_hr.weight"] = state["conv_hr.weight"].to(torch.int64)
    with pytest.raises(WeightsError, match=r"has conv_hr.weight of torch.int64, the network of torch.float32"):
        recognise(state, None, {"file": "a.pth"}).build()


def test_a_table_of_places_that_leads_outside_is_refused():
    state = load(network("stylenat")[1])
    name = next(name for name in state if name.endswith("relative_position_index"))
    state[name] = state[name] + 10**6
    with pytest.raises(WeightsError, match="has other numbers in .*relative_position_index"):
        recognise(state, None, {"file": "a.pth"}).build()


def test_a_probability_of_several_numbers_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.pkl").write_bytes(golden("sdgan/sg2_snapshot.pkl"))
    content = read_checkpoint(tmp_path / "a.pkl")
    monkeypatch.setattr("sdtrain.interop.official.read_checkpoint", lambda path: content)
    pipe = content.tree["augment_pipe"]
    assert isinstance(pipe, Record)
    for p in (torch.ones(4), torch.tensor(-1.0), torch.tensor(float("nan"))):
        pipe.attributes["_buffers"] = {"p": p}
        with pytest.raises(WeightsError, match="ADA's p is no single probability"):
            read_official(tmp_path / "a.pkl")


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors"])
def test_pipes_devices_folders_and_holes_in_place_of_a_file_are_sentences(name, tmp_path):
    for kind in ("fifo", "folder", "device", "hole"):
        path = tmp_path / kind / name
        path.parent.mkdir()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)
        with pytest.raises(WeightsError):
            load_network(path)
        assert check_weights({"vgg16": str(path)})


TWO = {"a": torch.arange(4.0), "b": torch.arange(2.0)}


@pytest.mark.parametrize("change, message", [
    (lambda h: h["a"].update(data_offsets=["0", "16"]), "no complete safetensors file"),
    (lambda h: h["a"].update(data_offsets=[0, 2**70]), "none has"),
    (lambda h: h["b"].update(data_offsets=[8, 16]), "not where it should be"),
    (lambda h: h["a"].update(shape=[-4]), "none has"),
    (lambda h: h["a"].update(shape=[3]), "not as long as its shape"),
    (lambda h: h["a"].update(dtype="F64"), "not as long as its shape"),
    (lambda h: h["a"].update(dtype=["F32"]), "no complete safetensors file"),
    (lambda h: h["a"].pop("dtype"), "no complete safetensors file"),
    (lambda h: h.update(c=5), "no complete safetensors file"),
    (lambda h: h.pop("b"), "its tensors have 16 bytes, the file 24"),
])  # fmt: skip
def test_a_header_of_tensors_that_lies_is_refused(change, message, tmp_path):
    header, data = header_of(save(TWO))
    change(header)
    path = saved(tmp_path, None, with_header(json.dumps(header).encode(), data))
    with pytest.raises(WeightsError, match=message):
        load_network(path)
    assert "not a complete" in check_weights({"vgg16": str(path)})[0]


def test_a_header_that_is_long_deep_or_names_a_tensor_twice_is_refused(tmp_path):
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for header in (b"{" + entry + b"," + entry + b"}", b"[" * 100_000, b'{"__metadata__":{' + b" " * (5 << 20) + b"}}"):
        with pytest.raises(WeightsError, match="no complete safetensors file"):
            load_network(saved(tmp_path, None, with_header(header, bytes(4))))


def test_frozen_weights_that_contain_themselves_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickled(b"}q\x00(" + packed_text("params") + b"h\x00" + packed_text("pad" * 999) + b"Nu"))
    with pytest.raises(WeightsError):
        load_weights("vgg16", str(path))


def test_an_inspection_shows_a_long_text_shortened(tmp_path):
    args = b"](" + b"h\x01" * 5000 + b"e"
    body = b"}(" + packed_text("args") + TEXT + b"0" + args + packed_text("g") + b"}u"
    (tmp_path / "a.pt").write_bytes(pickled(body))
    assert len("\n".join(inspected(tmp_path / "a.pt", {}))) < 4_000_000
