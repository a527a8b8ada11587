"""Files that every rank needs and the main rank reads: at most one of thousands hashes or loads what all share.

Without other ranks each of these is a plain call. All are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sdtrain.engine.ranks import by_main, tensors_from_main
from sdtrain.weights import load_weights, sha256_of, weights_digest

if TYPE_CHECKING:
    from sdtrain.interop.network import Network

Read = Callable[[], Mapping[str, Tensor] | None]


def read_by_main(read: Read) -> dict[str, Tensor] | None:
    """What `read` gives on the main rank, [...] on the CPU by name. A `UserError` of it is raised on all ranks."""
    held: list[Mapping[str, Tensor] | None] = []
    by_main(lambda: held.append(read()))
    return tensors_from_main(held[0] if held else None)


def shared_weights(name: str, source: str) -> dict[str, Tensor] | None:
    """`load_weights` of a frozen network: [...] on the CPU by name. Raises `WeightsError` on all ranks."""
    return read_by_main(lambda: load_weights(name, source))


def shared_digest(name: str, source: str) -> str:
    """`weights_digest`."""
    return by_main(lambda: weights_digest(name, source))


def shared_network(load: Callable[[], Network], file: Path) -> tuple[Network, str]:
    """A network of a file, and the file's sha256. Raises `WeightsError` on all ranks."""
    held: list[Network] = []

    def read() -> tuple[Network, str]:
        held.append(load())
        return replace(held[0], state={}), sha256_of(file)

    described, digest = by_main(read)
    state = tensors_from_main(held[0].state if held else None)
    assert state is not None
    return replace(described, state=state), digest
