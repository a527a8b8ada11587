"""Damage to bytes and to trees of plain values, by a seed."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

NAMES = (
    *("", " ", ".", "..", "../../canary", "/dev/zero", "/dev/stdin", "a/b", "x" * 260, "a\nb\nc", "nul\0here"),
    *("$(touch canary)", "`touch canary`", "; touch canary #", "pipe:touch canary", "pipe:touch canary|", "-o", "~"),
    *("<script>evil()</script>", "a|b", "$x^2$", r"\input{evil}", r"\write18{touch canary}", "%s%n{0.__class__}"),
    *("http://10.255.255.1/x.tar", "s3://bucket/x", "gs://bucket/x`touch canary`", "file:///etc/passwd", "&amp;"),
    *("\x1b[2J", "\u202egnp", "\u00b2", "\u0663", "\ud800", "\u00e9\u6f22", "{", "[", "*", "?", "{0..999999999}"),
    *("1e400", "0x10", "1_000", "True", "null", "nan", "img_99999999999999999999", "%", "100%", "-1%"),
    *("__class__", "os.system", "sdgan/../..", "con", "a" * 5_000),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**18, 10**400, 10**9, 10**6, 65_537),
    *(0.5, -0.5, 1e-320, 1e308, -1e308, 1e100, float("nan"), float("inf"), -float("inf"), 0.1, -0.0, True, False, None),
)
ALPHABET = b"\x00\xff\xed\xa0\x80{}[]:,\"'\\&*!|>%@`#\n\t -0129eE.+/ab\xef\xbb\xbf"


def damaged(chance: Random, data: bytes) -> bytes:
    """A few random edits: bytes changed, cut out, doubled, put in, moved, or the end cut off."""
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) + 1)
        end = min(at + chance.choice((1, 1, 4, 40, 400)), len(data))
        edit = chance.randrange(7)
        if edit == 0:
            data = data[:at] + bytes(chance.choice(ALPHABET) for _ in range(end - at)) + data[end:]
        elif edit == 1:
            data = data[:at] + data[end:]
        elif edit == 2:
            data = data[:at] + data[at:end] * chance.choice((2, 3, 1000)) + data[end:]
        elif edit == 3:
            data = data[:at] + chance.choice(NAMES).encode(errors="surrogatepass") + data[at:]
        elif edit == 4:
            data = data[:at] + repr(chance.choice(NUMBERS)).encode() + data[end:]
        elif edit == 5:
            data = data[:at]
        else:
            other = chance.randrange(len(data) + 1)
            data = data[:at] + data[other : other + 100] + data[at:]
        data = data[:4_000_000]
    return data


def odd(chance: Random) -> Any:
    """A value that nobody expects."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 7:
        return chance.choice(NAMES)
    if kind == 7:
        return chance.choice(([], {}, [[]], [{}], {"": None}, [None], [1, 2, 3, 4], {"kind": "x"}, [[0, 1], [0, 1]]))
    if kind == 8:
        value: Any = chance.choice((0, "x", []))
        for _ in range(chance.choice((3, 40, 100))):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value
    return chance.choice(([0] * 20_000, {str(i): i for i in range(5_000)}, ["x" * 100] * 500))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below the top."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in inner:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def changed(chance: Random, tree: Any, edits: Sequence[int] = (1, 1, 2, 4)) -> Any:
    """The tree with some values replaced, left out, renamed, doubled or wrapped."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice(edits)):
        found = places(tree)
        if not found or chance.random() < 0.02:
            return odd(chance)
        *outer, last = chance.choice(found)
        holder = tree
        for key in outer:
            holder = holder[key]
        edit = chance.randrange(8)
        if edit < 4:
            holder[last] = odd(chance)
        elif edit == 4:
            del holder[last]
        elif edit == 5 and isinstance(holder, dict):
            holder[chance.choice((*NAMES, *map(str, places(tree)[0]), "kind", "base"))] = holder[last]
        elif edit == 6:
            holder[last] = chance.choice(([holder[last]], {"a": holder[last]}, str(holder[last])))
        else:
            holder[last] = next_to(chance, holder[last])
    return tree


def next_to(chance: Random, value: Any) -> Any:
    """A value of the same type that is nearly right."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return chance.choice((-value, value + 1, value * 10**6, value // 3, value - 1, str(value)))
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(NAMES) + value[at:]
    return value * 2 if isinstance(value, list) else {**value, "extra": 1}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with these members, in this order."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()
