"""Checkpoints from strangers: without these tests a file could run code, fill the memory or end in a traceback.

Hostile files are written opcode by opcode, so that nothing here pickles objects either. An audit hook is the canary: it
sees every exec, compile, import, system call and subprocess of the interpreter while a hostile file is being read.
"""

from __future__ import annotations

import io
import os
import pickletools
import random
import struct
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from fuzz.mutate import zipped

from sdtrain.cli import main
from sdtrain.errors import WeightsError
from sdtrain.interop.official import plain
from sdtrain.interop.pickle_machine import Record
from sdtrain.interop.safe_pickle import Content, read_bytes, read_checkpoint, state_of
from sdtrain.interop.storages import MAGIC

SDGAN = GOLDEN / "sdgan"
WATCHED = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.putenv",
    "os.exec",
    "subprocess.Popen",
    "pickle.find_class",
    "socket",
)
seen: list[str] = []
armed = False


def _watch(event: str, arguments: tuple) -> None:
    if armed and event.startswith(WATCHED):
        seen.append(f"{event} {arguments[:1]}")


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def nothing_ran() -> Iterator[None]:
    """Fails the test if anything was executed while a file was read, or if a hostile file left its mark."""
    seen.clear()
    yield
    assert seen == []
    assert not {"SDTRAIN_PKL_PWNED", "SDTRAIN_PKL_SOURCE_EXECUTED"} & set(os.environ)


def read_content(data: bytes) -> Content:
    """Read hostile bytes with the canary armed."""
    global armed
    armed = True
    try:
        return read_bytes("hostile", data)
    finally:
        armed = False


def read(data: bytes) -> Any:
    return read_content(data).tree


def tensors_of(data: bytes) -> dict[str, torch.Tensor]:
    """The state dict of the module that hostile bytes describe, read with the canary armed."""
    content = read_content(data)
    assert isinstance(content.tree, Record)
    return state_of(content.budget, content.tree)


def refused(data: bytes) -> str:
    with pytest.raises(WeightsError) as caught:
        read(data)
    assert "nothing of the file was run" in str(caught.value)
    return str(caught.value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def known(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def legacy(body: bytes, keys: bytes = b"]", storages: bytes = b"") -> bytes:
    """A torch file of the time before zips whose object is `body`."""
    return b"".join(pickled(part) for part in (number(MAGIC), number(1001), b"}", body, keys)) + storages


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + known("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(held: bytes, offset: int, size: list[int], stride: list[int]) -> bytes:
    pairs = [b"(" + b"".join(number(n) for n in numbers) + b"t" for numbers in (size, stride)]
    ordered = call(known("collections", "OrderedDict"))
    return call(known("torch._utils", "_rebuild_tensor_v2"), held, number(offset), *pairs, b"\x89", ordered)


PAYLOAD = "import os; os.environ['SDTRAIN_PKL_PWNED']='1'"
FORBIDDEN = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "__import__"),
    ("__builtin__", "compile"),
    ("builtins", "getattr"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("importlib", "import_module"),
    ("runpy", "_run_code"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("pickle", "loads"),
    ("dill._dill", "_create_type"),
    ("subprocess", "Popen"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch.storage", "_load_from_bytes.__globals__"),
    ("torch_utils.persistence", "_src_to_module"),
    ("collections", "OrderedDict.fromkeys"),
    ("torch.nn.modules.linear", "Linear.__init__"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "scalar.__class__"),
    ("codecs", "decode"),
    ("antigravity", "fly"),
]


def read_good_files_first() -> None:
    """Imports of our own happen before the canary is armed."""
    for name in ("sg2_snapshot.pkl", "pg_snapshot.pkl", "snat_container_new.pt"):
        read_checkpoint(SDGAN / name)
    with pytest.raises(WeightsError):
        read_bytes("warm", zipped({"a/data.pkl": b"\x80"}))
    random.Random(0).sample(range(9), 2)


read_good_files_first()


@pytest.mark.parametrize("module, name", FORBIDDEN, ids=[f"{m}.{n}" for m, n in FORBIDDEN])
def test_an_unknown_global_is_refused_by_name_in_every_spelling(module, name):
    direct = call(known(module, name), text(PAYLOAD))
    stacked = text(module) + text(name) + b"\x93" + text(PAYLOAD) + b"\x85R"
    new_object = known(module, name) + text(PAYLOAD) + b"\x85\x81"
    with_keywords = known(module, name) + b")}\x92"
    old_instance = b"(" + text(PAYLOAD) + f"i{module}\n{name}\n".encode()
    old_object = b"(" + known(module, name) + text(PAYLOAD) + b"o"
    for body in (direct, stacked, new_object, with_keywords, old_instance, old_object):
        assert f"{module}.{name}" in refused(pickled(body))
        assert f"{module}.{name}" in refused(
            pickled(call(known("torch.storage", "_load_from_bytes"), blob(legacy(body))))
        )
        assert f"{module}.{name}" in refused(zipped({"a/data.pkl": pickled(body)}))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name, wanted", [
    ("evil_exec.pkl", "builtins.exec"),
    ("evil_putenv.pkl", "posix.putenv"),
    ("evil_nested_torch_blob.pkl", "__builtin__.exec"),
    ("evil_getattr.pkl", "builtins.getattr"),
])  # fmt: skip
def test_the_command_leaves_with_2_and_the_name_of_the_global(name, wanted, tmp_path, capsys):
    for arguments in (["--out", str(tmp_path / "x")], ["--inspect"]):
        assert main(["import", str(SDGAN / name), *arguments]) == 2
        message = capsys.readouterr().err
        assert wanted in message and "Traceback" not in message
    assert not (tmp_path / "x").exists()


def test_source_text_inside_a_snapshot_is_dropped_and_never_compiled():
    data = (SDGAN / "sg2_snapshot.pkl").read_bytes()
    assert b"SDTRAIN_PKL_SOURCE_EXECUTED" in data
    tree = read(data)
    assert isinstance(tree, dict) and "module_src" not in tree["G_ema"].attributes


def test_a_reduce_chain_on_allowed_names_builds_records_only():
    record = known("torch.nn.modules.linear", "Linear") + b")\x81"
    state = b"}(" + text("__class__") + text("os.system") + text("__reduce__") + text("x") + b"u"
    tree = read(pickled(record + state + b"b"))
    assert type(tree) is Record and type(tree).__reduce__ is object.__reduce__
    assert tree.attributes == {"__class__": "os.system", "__reduce__": "x"}
    assert "calls 'Record'" in refused(pickled(call(record, text("x"))))
    assert "calls 'dict'" in refused(pickled(call(b"}", text("x"))))
    assert "calls 'FloatStorage'" in refused(pickled(call(known("torch", "FloatStorage"), number(9))))


def test_a_hostile_pickle_behind_the_tensors_of_a_blob_is_refused():
    evil = call(known("os", "system"), text(PAYLOAD))
    body = call(known("torch.storage", "_load_from_bytes"), blob(legacy(b"}", keys=evil)))
    assert "os.system" in refused(pickled(body))


def test_blobs_do_not_nest():
    inner = call(known("torch.storage", "_load_from_bytes"), blob(legacy(b"}")))
    assert "torch.storage._load_from_bytes" in refused(
        pickled(call(known("torch.storage", "_load_from_bytes"), blob(legacy(inner))))
    )


@pytest.mark.parametrize("member", ["../../etc/passwd", "/etc/cron.d/x", "a/../../x", "a\\..\\x", "C:/x/y", "data.pkl"])
def test_a_zip_that_points_outside_is_refused(member):
    assert "points outside" in refused(zipped({"a/data.pkl": pickled(b"}"), member: b"x"}))


def test_zip_bombs_are_refused_before_they_unfold():
    bomb = zipped({"a/data.pkl": pickled(b"}"), "a/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    assert "compressed or encrypted" in refused(bomb)
    stored = zipped({"a/data.pkl": pickled(b"}"), "a/data/0": b"1234"})
    for at in (stored.rfind(b"PK\x01\x02", 0, stored.rfind(b"PK\x01\x02") + 4),):
        lying = stored[: at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + stored[at + 28 :]
        assert "larger than the file itself" in refused(lying)


def test_a_zip_with_two_roots_or_two_members_of_a_name_is_refused():
    assert "not a torch file" in refused(zipped({"a/data.pkl": pickled(b"}"), "b/x": b""}))
    assert "not a torch file" in refused(zipped({"a/readme": b"hello"}))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a/data.pkl", pickled(b"}"))
        archive.writestr("a/data.pkl", pickled(call(known("os", "system"), text("x"))))
    assert "twice" in refused(out.getvalue())


@pytest.mark.parametrize(
    "held, offset, size, stride",
    [(4, 0, [5], [1]), (4, 3, [2], [1]), (4, 0, [2, 2], [4, 1]), (4, 0, [1 << 40], [0]), (4, -1, [2], [1]),
     (4, 0, [2], [-1]), (4, 0, [-2], [1]), (4, 0, [2, 2], [1]), (0, 0, [1], [1])],
)  # fmt: skip
def test_a_tensor_outside_its_storage_is_refused(held, offset, size, stride):
    members = {"a/data.pkl": pickled(tensor(storage("0", held), offset, size, stride)), "a/data/0": bytes(4 * held)}
    assert "describes a tensor" in refused(zipped(members))


def test_tensors_of_both_containers_are_read():
    raw = struct.pack("<4f", 1, 2, 3, 4)
    body = tensor(storage("0", 4), 1, [3], [1])
    assert torch.equal(read(zipped({"a/data.pkl": pickled(body), "a/data/0": raw})), torch.tensor([2.0, 3.0, 4.0]))
    old = legacy(body, keys=b"](" + text("0") + b"e", storages=struct.pack("<q", 4) + raw)
    assert torch.equal(read(old), torch.tensor([2.0, 3.0, 4.0]))


def test_storages_that_lie_about_their_size_are_refused():
    assert "declares 8 numbers" in refused(
        zipped({"a/data.pkl": pickled(tensor(storage("0", 8), 0, [8], [1])), "a/data/0": bytes(16)})
    )
    huge = legacy(tensor(storage("0", 1 << 50), 0, [1], [1]), keys=b"](" + text("0") + b"e")
    assert "declares more data than it holds" in refused(huge)
    foreign = pickled(b"(" + text("module") + known("torch", "FloatStorage") + b"tQ")
    assert "not a tensor storage" in refused(zipped({"a/data.pkl": foreign}))


def test_a_small_file_cannot_describe_much_tensor_data():
    view = tensor(storage("0", 1 << 16), 0, [1 << 16], [1])
    many = pickled(b"](" + view + (b"q\x00" + view * 60) + b"e")
    assert "far more tensor data than it holds" in refused(zipped({"a/data.pkl": many, "a/data/0": bytes(4 << 16)}))


def test_shared_modules_that_multiply_are_refused_not_walked():
    def module(children: bytes) -> bytes:
        state = b"}(" + text("_modules") + b"}(" + children + b"u" + b"u"
        return known("torch.nn.modules.container", "Sequential") + b")\x81" + state + b"b"

    body = module(b"") + b"r" + struct.pack("<I", 0)
    for level in range(1, 40):
        twice = text("a") + b"j" + struct.pack("<I", level - 1) + text("b") + b"j" + struct.pack("<I", level - 1)
        body += b"0" + module(twice) + b"r" + struct.pack("<I", level)
    with pytest.raises(WeightsError, match="far more than a checkpoint of its size"):
        tensors_of(pickled(body))
    deep = module(b"") + b"r" + struct.pack("<I", 0)
    for _ in range(100):
        deep += b"0" + module(text("a") + b"j" + struct.pack("<I", 0)) + b"r" + struct.pack("<I", 0)
    with pytest.raises(WeightsError, match="nests modules too deeply"):
        tensors_of(pickled(deep))


def test_deep_and_endless_containers_neither_recurse_nor_hang():
    deep = read(pickled(b"]" * 100_000 + b"a" * 99_999))
    assert plain(deep)[0][0] is not None
    loop = read(pickled(b"]q\x00h\x00a"))
    assert isinstance(plain(loop), list)
    wide = read(pickled(b"]q\x00" + b"0](" + b"h\x00" * 100_000 + b"e"))
    assert len(str(plain(wide))) < 1_000_000


def test_keys_that_would_hash_deeply_are_refused():
    nested = b")" + b"\x85" * 100_000
    assert "a tuple as key" in refused(pickled(b"}" + nested + b"Ns"))
    assert "a tuple as key" in refused(pickled(b"\x8f(" + nested + b"\x90"))


def test_a_huge_integer_is_refused():
    assert "integer of" in refused(pickled(number(1 << 5000)))


@pytest.mark.parametrize(
    "body", [b"Pid\n", b"\x82\x01", b"\x97", b"\x96" + bytes(8), b"R", b"b", b"e", b"0", b"t", b"h\x07", b"Nb"]
)
def test_other_opcodes_and_empty_stacks_are_sentences(body):
    refused(pickled(body))


def test_memo_indexes_cost_no_memory():
    assert read(pickled(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff")) is None


def test_lengths_beyond_the_file_are_refused_without_memory():
    refused(b"\x80\x04B\xff\xff\xff\x7fabc")
    refused(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc")
    refused(b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00abc")


def test_big_endian_files_are_refused():
    assert "big-endian" in refused(zipped({"a/data.pkl": pickled(b"}"), "a/byteorder": b"big"}))


def test_numbers_of_both_numpy_generations_become_python_numbers():
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        dtype = call(known("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
        state = b"(" + number(3) + text("<") + b"NNN" + number(-1) + number(-1) + number(0) + b"t"
        body = call(known(module, "scalar"), dtype + state + b"b", blob(struct.pack("<d", 1.4142)))
        assert read(b"\x80\x03" + body + b".") == 1.4142


def test_sets_and_dictionaries_of_old_protocols_are_plain():
    letters = b"](" + text("a") + text("b") + b"e"
    assert read(b"\x80\x03" + call(known("builtins", "set"), letters) + b".") == {"a", "b"}
    pairs = b"](" + b"](" + text("k") + number(1) + b"e" + b"e"
    assert read(b"\x80\x02" + call(known("collections", "OrderedDict"), pairs) + b".") == {"k": 1}
    easy = known("dnnlib.util", "EasyDict") + b")\x81" + text("k") + number(2) + b"s"
    assert read(b"\x80\x03" + easy + b".") == {"k": 2}
    tensor_as_list = call(known("builtins", "set"), tensor(storage("0", 4), 0, [4], [1]))
    assert "in place of a list" in refused(zipped({"a/data.pkl": pickled(tensor_as_list), "a/data/0": bytes(16)}))


def test_a_tensorflow_pickle_is_told_how_to_convert():
    with pytest.raises(WeightsError, match="TensorFlow StyleGAN checkpoint .* convert it"):
        read(pickled(known("dnnlib.tflib.network", "Network") + b")\x81"))


@pytest.mark.parametrize(
    "name", ["sg2_snapshot.pkl", "pg_snapshot.pkl", "snat_container_new.pt", "snat_container_old.pt"]
)
def test_a_truncated_file_is_a_sentence_wherever_it_ends(name):
    data = (SDGAN / name).read_bytes()
    for end in [0, 1, 2, 10, *range(100, len(data) - 1, max(len(data) // 12, 1)), len(data) - 1]:
        with pytest.raises(WeightsError):
            read(data[:end])


def outcome(data: bytes) -> str:
    """read or refused; any other exception is the test's failure. The tensors of modules are gathered as well."""
    try:
        content = read_content(data)
        tree = content.tree if isinstance(content.tree, dict) else {}
        for value in tree.values():
            if isinstance(value, Record):
                state_of(content.budget, value)
    except WeightsError as error:
        assert "nothing of the file was run" in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("name", ["sg2_snapshot.pkl", "snat_container_new.pt"])
def test_damaged_bytes_are_read_or_refused_and_nothing_else(name):
    data, dice, found = bytearray((SDGAN / name).read_bytes()), random.Random(0), []
    for _ in range(60):
        at = dice.randrange(min(len(data), 4000))
        kept, data[at] = data[at], dice.randrange(256)
        found.append(outcome(bytes(data)))
        data[at] = kept
    assert found.count("refused") >= 10 and outcome(bytes(data)) == "read"


@pytest.mark.parametrize("name", ["sg2_snapshot.pkl", "r3_snapshot.pkl"])
def test_a_command_spliced_in_anywhere_is_refused_and_leaves_no_file(name, tmp_path):
    data = (next(GOLDEN.rglob(name))).read_bytes()
    canary, dice = tmp_path / "canary", random.Random(0)
    starts = [at for _, _, at in pickletools.genops(data)]
    for _ in range(40):
        at = dice.choice(starts)
        command = call(known(*dice.choice((("os", "system"), ("posix", "system")))), text(f"touch {canary}"))
        assert outcome(data[:at] + command + data[at:]) == "refused"
        assert not canary.exists()


def test_data_behind_the_end_and_other_files_are_refused(tmp_path):
    assert "data behind its end" in refused(pickled(b"}") + b"more")
    refused(b"not a checkpoint at all")
    refused(b"")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_checkpoint(tmp_path / "absent.pkl")
