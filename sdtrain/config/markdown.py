"""configs/README.md: how configurations are written, and a table of every key, from the option classes themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from sdtrain.config import schema
from sdtrain.config.declare import ROLES
from sdtrain.config.find import MAX_CHAIN
from sdtrain.config.messages import IMAGE_EXAMPLES
from sdtrain.config.reference import Key, keys
from sdtrain.config.yaml_source import MAX_BYTES, MAX_DEPTH

INTRODUCTION = f"""\
# Configurations

Written by `sdtrain config --markdown > configs/README.md`; edit the option classes, not this file.
On the command line `sdtrain config KEY` shows one key, `sdtrain config SECTION` a section, and `--cfg NAME` the values
that a configuration gives them.

## How a configuration is written

* `--cfg` takes a path, or a name in `configs/` such as `sdgan_projected` or `sdakd/gcfsr_half`; `.yaml` is optional.
* `base: NAME` lays a file over another, key by key. It is found as `--cfg` finds one, but first beside the file itself;
  a section whose `kind` changes is replaced whole, and `name` is not inherited. At most {MAX_CHAIN} files in a chain.
* `--set key.path=value` overrides one key, as often as you like. The value is YAML.
* Unknown keys, keys given twice, tags and aliases are errors; all problems are reported at once, with their lines.
  A file has at most {MAX_BYTES // 1_000_000} MB and sections lie at most {MAX_DEPTH} deep.
* Only `true` and `false` are booleans, `1e-3` is a number, `010` and dates are text, `null` is nothing.

## Numbers with suffixes

| where | written | means |
|---|---|---|
| counts of images | `100000`, `1e5`, `100k`, `100ki`, `100kimg` | 100 000 images, the kimg of the papers |
| counts of images | `1.5M`, `1.5Mi`, `1.5Mimg` | 1 500 000 images |
| spans | `30 epochs`, `500 steps`, `64000 images`, `64k images` | what they say; a unit is needed |
| spans | `64ki`, `64kimg`, `1.4Mi`, `1.4Mimg` | images, by name |

All are powers of ten: 1k = 1ki = 1kimg = 1000, 1M = 1Mi = 1Mimg = 1 000 000. An interval of 0 means never.
"""
HEADER = "| key | type | default | unit | meaning | in |\n|---|---|---|---|---|---|"


def page() -> str:
    """The whole file."""
    return "\n".join([INTRODUCTION, *_tables(keys())]) + "\n"


def _tables(found: Sequence[Key]) -> Iterator[str]:
    """Keys that lie in no section, of all and of each method; then a table a section; then one a kind of model."""
    inside = {key.path.partition(".")[0] for key in found if "." in key.path}
    plain = [key for key in found if key.path not in inside and "." not in key.path]
    yield from _table("Keys of every configuration", "", [key for key in plain if not key.owners])
    for name in schema.methods():
        yield from _table(f"Keys of method {name}", "", [key for key in plain if f"method {name}" in key.owners])
    for top in sorted(inside - {"model"}):
        section = [key for key in found if key.path.partition(".")[0] == top]
        yield from _table(f"Section {top}", _meanings(section, top), [key for key in section if key.default])
    for role in ROLES:
        yield from _kinds(role, [key for key in found if key.path.startswith(f"model.{role}.")])


def _kinds(role: str, found: list[Key]) -> Iterator[str]:
    yield f"## Section model.{role}\n\n`kind` chooses the network; each kind has its own keys.\n"
    for owners, group in groupby((key for key in found if key.owners), key=lambda key: key.owners):
        yield from _table(f"model.{role}, kind {' or '.join(owner.split()[1] for owner in owners)}", "", list(group), 3)


def _meanings(section: list[Key], top: str) -> str:
    return "\n".join(
        f"`{key.path}`: {key.meaning}{f' ({_who(key)})' if key.owners else ''}\n" for key in section if not key.default
    )


def _table(title: str, text: str, found: list[Key], level: int = 2) -> Iterator[str]:
    if found:
        yield f"{'#' * level} {title}\n"
        yield from [text] if text else []
        yield "\n".join([HEADER, *map(_row, found), ""])


def _row(key: Key) -> str:
    kind = key.type.replace(IMAGE_EXAMPLES, "")
    cells = [f"`{key.path}`", kind, f"`{key.default}`", key.unit, key.meaning, _who(key)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _who(key: Key) -> str:
    return ", ".join(owner.split()[1] for owner in key.owners) or "all"
