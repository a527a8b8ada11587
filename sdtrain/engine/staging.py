"""Copies of tensors in host memory, laid out as .safetensors files: what a save writes while training goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import Tensors

# the format's names; in a file wider types come first, so that every tensor is aligned
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Staged:
    """A file in memory."""

    header: bytes
    data: Tensor
    """[bytes] uint8."""

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All of the file, in order."""
        yield self.header
        content: memoryview = self.data.numpy().data
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]


class Staging:
    """Keeps its memory from save to save: the first touch of fresh pages costs more than the copy into them."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"  # copies from the device run at full speed and without a detour
        self.buffers: dict[str, Tensor] = {}

    def take(self, files: Mapping[str, Tensors]) -> dict[str, Staged]:
        """Copies of {file: {name: [...]}}; what was taken before is overwritten."""
        staged = {name: self._copy(name, tensors) for name, tensors in files.items()}
        if self.pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, name: str, tensors: Tensors) -> Staged:
        rank = {dtype: place for place, dtype in enumerate(DTYPES)}
        order = sorted(tensors, key=lambda key: (rank[tensors[key].dtype], key))
        described, rooms, end = {}, [], 0
        for key in order:
            t, begin = tensors[key], end
            end += t.nbytes
            where = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
            described[key] = where
            rooms.append((begin, end))
        data = self._buffer(name, end)
        for key, (begin, end) in zip(order, rooms, strict=True):
            t = tensors[key].detach()
            data[begin:end].view(t.dtype).view(t.shape).copy_(t, non_blocking=self.pinned)
        return Staged(_header(described), data)

    def _buffer(self, name: str, size: int) -> Tensor:
        """[size] uint8."""
        if len(self.buffers.get(name, ())) < size:
            self.buffers.pop(name, None)  # before the larger one is taken
            self.buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return self.buffers[name][:size] if size else torch.empty(0, dtype=torch.uint8)


def _header(described: Mapping[str, object]) -> bytes:
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
