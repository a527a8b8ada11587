"""Weights files as a stranger might send them: official pickles and zips, safetensors headers, cards, tensor names.

Every input is a small change of a file that loads, so that it gets past the first check and reaches the later ones.
"""

from __future__ import annotations

import io
import json
import pickletools
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fuzz.harness import Inputs
from fuzz.mutate import zipped

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PICKLES = ("sdgan/sg2_snapshot.pkl", "r3gan/r3_snapshot.pkl", "r3gan/r3_snapshot_legacy.pkl", "sdgan/pg_snapshot.pkl")
ZIPS = (
    "sdakd/RRDBNet_x2_nf8_params_and_ema.pth",
    "sdakd/GCFSR_32_narrow32_params_and_ema.pth",
    "sdakd/UNetD_nf4_params.pth",
    "sdakd/ESRGAN_oldarch_x4_nf8.pth",
    "sdgan/snat_container_new.pt",
    "sdgan/snat_container_old.pt",
)
NUMBERS = (-1, 0, 1, 3, 1 << 15, 10**6, 10**8, 10**9, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 10**30)
TEXTS = ("", "G", "D", "p", "weight", "x" * 5000, "\ud800", "\x1b[2J", "../../x", "0", "-1", "1e9", "_parameters")
OPCODES = (b"N", b"]", b"}", b")", b"(", b"t", b"u", b"e", b"a", b"s", b"b", b"R", b"Q", b"0", b"1", b"2", b"\x81",
           b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"h\x00", b"h\x05",
           b"G" + b"\x7f" * 8, b"I-1\n", b"P0\n", b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b".")  # fmt: skip
DEEP = "__deep__"
Bytes = Callable[[Random, bytes], bytes]


def packed_int(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def packed_text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


@cache
def opcodes(data: bytes) -> list[tuple[str, Any, int, int]]:
    """(name, argument, start, end) of each opcode of a pickle."""
    found = [(opcode.name, arg, at or 0) for opcode, arg, at in pickletools.genops(data)]
    ends = [at for _, _, at in found[1:]] + [len(data)]
    return [(*entry, end) for entry, end in zip(found, ends)]


def flip(dice: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def cut(dice: Random, data: bytes) -> bytes:
    return data[: dice.randrange(len(data))]


def splice(dice: Random, data: bytes) -> bytes:
    start, at = dice.randrange(len(data)), dice.randrange(len(data))
    return data[:at] + data[start : start + dice.choice((1, 10, 100, 1000))] + data[at + dice.choice((0, 1, 100)) :]


def change_number(dice: Random, data: bytes) -> bytes:
    """One integer of the pickle becomes an extreme one."""
    _, _, start, end = dice.choice([op for op in opcodes(data) if type(op[1]) is int and "INT" in op[0]])
    return data[:start] + packed_int(dice.choice(NUMBERS)) + data[end:]


def change_text(dice: Random, data: bytes) -> bytes:
    """One text becomes another one: of the file, so that a tensor or an argument is lost or doubled, or an odd one."""
    texts = [op for op in opcodes(data) if "UNICODE" in op[0]]
    _, _, start, end = dice.choice(texts)
    other = dice.choice((dice.choice(texts)[1], dice.choice(TEXTS)))
    return data[:start] + packed_text(other) + data[end:]


def change_kind(dice: Random, data: bytes) -> bytes:
    """One value becomes a value of another type."""
    kinds = ("BININT", "BINUNICODE", "BINFLOAT", "SHORT_BIN", "LONG1", "BINBYTES")
    _, _, start, end = dice.choice([op for op in opcodes(data) if op[0].startswith(kinds)])
    other = (b"N", b"]", b"}", b")", b"\x88", packed_int(7), packed_text("x"), b"]q\x00", b"C\x02ab", b"G" + bytes(8))
    return data[:start] + dice.choice(other) + data[end:]


def insert(dice: Random, data: bytes) -> bytes:
    at = dice.choice(opcodes(data))[2]
    return data[:at] + b"".join(dice.choices(OPCODES, k=dice.randint(1, 3))) + data[at:]


def remove(dice: Random, data: bytes) -> bytes:
    found = opcodes(data)
    first = dice.randrange(len(found) - 1)
    last = min(first + dice.choice((1, 1, 2, 5, 50)), len(found) - 1)
    return data[: found[first][2]] + data[found[last][2] :]


ON_PICKLES: tuple[Bytes, ...] = (
    flip, cut, splice, change_number, change_number, change_text, change_text, change_kind, insert, remove
)  # fmt: skip


@cache
def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def a_pickle(dice: Random, folder: Path) -> Path:
    data = golden(dice.choices(PICKLES, (6, 4, 4, 1))[0])
    return written(folder / "a.pkl", dice.choice(ON_PICKLES)(dice, data))


def bombs(dice: Random) -> bytes:
    """A small pickle of allowed names that asks for much: copies, shared values, depth, wide keys, many members."""
    wide, many = 10 ** dice.randint(2, 5), 10 ** dice.randint(2, 5)
    mark, as_set, ordered = b"(", b"c__builtin__\nset\n", b"ccollections\nOrderedDict\n"
    record = b"ctorch.nn.modules.container\nSequential\n"
    leaf, level = b")q\x01", b"0" + b"(" + b"h\x01" * 8 + b"tq\x01"
    laughs = leaf + level * dice.randint(5, 40)
    big_list = b"](" + b"".join(packed_int(i) for i in range(wide // 10)) + b"eq\x01"
    big_text = packed_text("x" * wide) + b"q\x01"
    return dice.choice((
        big_list + b"0](" + (as_set + b"h\x01\x85R") * (many // 10) + b"e",
        big_text + b"0](" + (b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R") * (many // 10) + b"e",
        b"](" + dice.choice((b"\x8f", b"}", b"]", record + b")\x81")) * many + b"e",
        laughs + b"0" + b"cnumpy\ndtype\nh\x01\x85R" + b"q\x02cnumpy.core.multiarray\nscalar\nh\x02C\x01a\x86R",
        laughs + b"0" + b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01K\x00h\x01h\x01tR",
        b"]" * wide + b"a" * (wide - 1),
        b"}(" + packed_text("G") + record + b")\x81}(" + packed_text("_modules") + laughs + b"ubu",
        b"}(" + packed_text("G") + record + b")\x81}(" + packed_text("_modules") + b"}(" + packed_text("n" * wide)
        + record + b")\x81}(" + packed_text("_buffers") + big_list + b"ubuubu",
        b"}(" + packed_text("args") + big_text + b"0](" + b"h\x01" * many + b"eu",
        b"I" + b"9" * wide + b"\n",
        ordered + b"](" + (b"](" + packed_int(wide) + big_text + b"e") * 3 + b"e\x85R",
        mark * many + b"t" * many,
    ))  # fmt: skip


def a_bomb(dice: Random, folder: Path) -> Path:
    data = b"\x80\x04" + bombs(dice) + b"."
    if dice.random() < 0.5:
        return written(folder / "a.pkl", data)
    return written(folder / "a.pth", zipped({"a/data.pkl": data}))


@cache
def members(name: str) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(golden(name))) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def a_zip(dice: Random, folder: Path) -> Path:
    """A torch zip whose pickle, members or directory are changed."""
    name = dice.choice(ZIPS)
    held = dict(members(name))
    inner = next(member for member in held if member.endswith("data.pkl"))
    what = dice.randrange(4)
    if what < 2:
        held[inner] = dice.choice(ON_PICKLES)(dice, held[inner])
    elif what == 2:
        chosen = dice.choice(list(held))
        other = dice.choice((None, held[dice.choice(list(held))], b"", held[chosen][:-1], held[chosen] + b"\0"))
        held[chosen if other is not None else chosen + dice.choice(TEXTS).replace("\ud800", "e")] = other or b""
    data = zipped(held, dice.choices((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), (9, 1))[0])
    return written(folder / Path(name).name, bent_directory(dice, data) if what == 3 else data)


def bent_directory(dice: Random, data: bytes) -> bytes:
    """Two or four bytes of a local header, a directory record or the end record become an extreme number."""
    signature = dice.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x05\x06"))
    places = [at for at in range(len(data)) if data.startswith(signature, at)] if len(data) < 9999 else None
    at = dice.choice(places) if places else data.rfind(signature)
    at += dice.randrange(4, 46 if signature != b"PK\x05\x06" else 22)
    value = dice.choice(
        (b"\xff\xff\xff\xff", bytes(4), b"\xff\xff", b"\0\0\0\x80", dice.randbytes(4), dice.randbytes(1))
    )
    return data[:at] + value + data[at + len(value) :]


@cache
def tiny_networks() -> list[tuple[dict[str, Any], bytes]]:
    """(card, safetensors) of a small network of each kind whose file has its own reader of shapes."""
    import torch
    from safetensors.torch import save

    from sdtrain.interop.network import Network

    stylenat = {"style_dim": 16, "mlp_layers": 2, "channel_max": 32, "min_heads": 2, "kernels": [[3]] * 4,
                "dilations": [[1], [1], [1, 2], [1, 4]]}  # fmt: skip
    rows: list[tuple[str, str, dict[str, Any], int | None]] = [
        ("stylegan2", "Generator", {"z_dim": 8, "w_dim": 12, "mapping_layers": 3, "channel_base": 256,
                                    "channel_max": 16}, 16),
        ("stylegan2", "Discriminator", {"channel_base": 256, "channel_max": 16}, 16),
        ("fastgan", "Generator", {"z_dim": 8, "ngf": 4}, 32),
        ("stylenat", "Generator", stylenat, 32),
        ("stylenat", "Discriminator", {"channel_max": 16}, 32),
        ("r3gan", "Generator", {"widths": [8, 8], "groups": [2, 2], "blocks": [1, 1], "z_dim": 4}, 8),
        ("rrdbnet", "Generator", {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}, None),
        ("srvgg", "Generator", {"num_feat": 8, "num_conv": 2}, None),
        ("gcfsr", "Generator", {"num_style_feat": 16, "narrow": 1 / 32}, 32),
        ("gcfsr", "Discriminator", {"narrow": 1 / 32}, 32),
        ("unet_sn", "Discriminator", {"num_feat": 4}, None),
    ]  # fmt: skip
    made = []
    for kind, player, options, resolution in rows:
        torch.manual_seed(0)
        role = "D" if player == "Discriminator" else "G_ema"
        empty = Network(kind=kind, player=player, role=role, state={}, options=options, resolution=resolution)  # type: ignore[arg-type]
        with warnings.catch_warnings(action="ignore"):
            state = {name: value.contiguous() for name, value in empty.fresh().state_dict().items()}
        made.append((empty.card, save(state)))
    return made


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below the root of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in ((*path, key), *nodes(part, (*path, key)))]


def bent_json(dice: Random, value: Any) -> str:
    """JSON text of `value` with one node replaced, removed, doubled or nested without end."""
    value = json.loads(json.dumps(value))
    path = dice.choice(nodes(value))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    others = (*NUMBERS, *NUMBERS, *TEXTS, 0.5, -0.0, 1e308, float("nan"), float("inf"), None, True, False, [], {}, DEEP,
              [1] * 4, [[0]], {"a": 1}, [2**62, 0], "9" * 5000)  # fmt: skip
    what = dice.randrange(8)
    if what == 0:
        del owner[path[-1]]
    elif what == 1 and isinstance(owner, dict):
        owner[dice.choice((*TEXTS, "resolution", "num_classes", "note", "player"))] = dice.choice(others)
    else:
        owner[path[-1]] = dice.choice(others)
    text = json.dumps(value)
    if what == 2 and isinstance(owner, dict):
        text = text.replace("{", f'{{"{path[-1]}": {dice.choice(NUMBERS)}, ', 1)
    return text.replace(json.dumps(DEEP), dice.choice(("[" * 50_000, "[" * 50_000 + "]" * 50_000, "1" * 5000)))


def a_card(dice: Random, folder: Path) -> Path:
    """Tensors that fit, with a card that lies."""
    card, tensors = dice.choice(tiny_networks())
    text = bent_json(dice, card).encode()
    (folder / "a.json").write_bytes(flip(dice, text) if dice.random() < 0.1 else text)
    return written(folder / "a.safetensors", tensors)


def header_of(tensors: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", tensors[:8])
    return json.loads(tensors[8 : 8 + length]), tensors[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def a_header(dice: Random, folder: Path) -> Path:
    """A safetensors file whose header is another JSON, no JSON, or of another length."""
    card, tensors = dice.choice(tiny_networks())
    (folder / "a.json").write_text(json.dumps(card))
    header, data = header_of(tensors)
    text = bent_json(dice, header).encode()
    what = dice.randrange(6)
    if what == 0:
        return written(folder / "a.safetensors", with_header(text, data, dice.choice((0, 1, 2**31, 2**62, 2**64 - 1))))
    if what == 1:
        return written(folder / "a.safetensors", with_header(flip(dice, text), data))
    if what == 2:
        return written(folder / "a.safetensors", cut(dice, tensors))
    return written(folder / "a.safetensors", with_header(text, data))


def a_state(dice: Random, folder: Path) -> Path:
    """A state dict without a card: names with other numbers, tensors that are gone or have other shapes or types."""
    import torch
    from safetensors.torch import load, save

    state = load(dice.choice(tiny_networks())[1])
    shapes = ([], [0], [1], [7], [1] * 6, [0, 3], [2, 2], [1, 0, 3, 3], [4096, 1], [1 << 20])
    for _ in range(dice.randint(1, 3)):
        name = dice.choice(list(state))
        value = state.pop(name)
        what = dice.randrange(5)
        if what == 0:
            numbered = [i for i, letter in enumerate(name) if letter.isdigit()] or [len(name)]
            at = dice.choice(numbered)
            name = name[:at] + str(dice.choice((*NUMBERS, "", "x", "9" * 5000, "\u0663"))) + name[at + 1 :]
            state[name] = value
        elif what == 1:
            state[name] = torch.zeros(dice.choice(shapes))
        elif what == 2:
            state[name] = value.to(dice.choice((torch.int64, torch.bool, torch.float16, torch.float64)))
        elif what == 3:
            state[name] = value.flatten()[: dice.randrange(9)]
        else:
            state.update({n: v for n, v in ((name + dice.choice(TEXTS[:6]), value),)})
    if dice.random() < 0.5:
        return written(folder / "a.safetensors", save({k: v.contiguous() for k, v in state.items()}))
    torch.save(dice.choice(({"params": state}, state, {"state_dicts": {"g_ema": state}})), folder / "a.pth")
    return folder / "a.pth"


def a_frozen_network(dice: Random, folder: Path) -> Path:
    """Weights of a frozen network given by path, in one of the three containers, damaged."""
    import torch
    from safetensors.torch import save

    state = {"features.26.weight": torch.arange(600.0), "features.26.bias": torch.ones(3)}
    form = dice.randrange(3)
    if form == 2:
        header, data = header_of(save(state))
        return written(folder / "a.safetensors", with_header(bent_json(dice, header).encode(), data))
    out = io.BytesIO()
    torch.save(dice.choice((state, {"params": state})), out, _use_new_zipfile_serialization=form == 0)
    data = out.getvalue()
    damage = dice.choice((flip, cut, splice, bent_directory if form == 0 else flip))
    return written(folder / "a.pth", damage(dice, data))


def inspect_import_and_build(path: Path) -> None:
    """What `sdtrain import`, with and without --inspect, and every command that takes an official file do."""
    from sdtrain.commands.importing import import_file, inspected
    from sdtrain.interop.loading import load_network

    "\n".join(inspected(path, {})).encode()
    try:
        "\n".join(import_file(path, path.parent / "out")).encode()
        load_network(path).build()
    finally:
        shutil.rmtree(path.parent / "out", ignore_errors=True)


def load_and_build(path: Path) -> None:
    """What `sdtrain sample`, `export` and `upscale` do with a network before they use it."""
    from sdtrain.interop.architectures import require, title
    from sdtrain.interop.loading import load_network

    network = load_network(path)
    title(network).encode()
    require(path, network, player=network.player)
    json.dumps(network.card)
    network.build()


def load_frozen(path: Path) -> None:
    """What a run does with weights of a frozen network: the plan's cheap check, then the reading."""
    from sdtrain.weights import check_weights, load_weights

    check_weights({"vgg16": str(path)})
    load_weights("vgg16", str(path))


# the first network that is built imports much of torch
CLASSES: dict[str, Inputs] = {
    "official pickles": Inputs(a_pickle, inspect_import_and_build, seconds=30),
    "pickles that ask for much": Inputs(a_bomb, inspect_import_and_build, seconds=30),
    "official zips": Inputs(a_zip, inspect_import_and_build, seconds=30),
    "safetensors headers": Inputs(a_header, load_and_build),
    "cards of networks": Inputs(a_card, load_and_build),
    "names and shapes of tensors": Inputs(a_state, load_and_build),
    "frozen networks by path": Inputs(a_frozen_network, load_frozen),
}
