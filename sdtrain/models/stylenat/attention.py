"""Neighbourhood attention with dilation and relative position bias, in plain PyTorch.

Every query attends to the k x k keys around it inside its own dilation class; at a border the window is shifted, never
padded (Hassani et al. 2023, "Neighborhood Attention Transformer"; Hassani and Shi 2022 for dilation). Per axis, with
class g = i mod d, position j = i // d and class length Lg = ceil((L - g) / d):

    window start  s = clamp(j - (k - 1) / 2, 0, Lg - k)
    keys          (s + t) d + g        for t = 0 .. k - 1
    bias row      (s + t - j) + k - 1  of a (2k - 1)^2 table per head

`neighborhood_attention` cuts each class into tiles of queries, gathers for a tile the block of keys its windows touch,
and runs one masked `scaled_dot_product_attention` per distinct mask. Tiles that see the same mask (nearly all of them)
share it, so memory grows with L * (tile + k)^2 and not with L * L. `full_mask_attention` says the same thing naively.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdtrain.errors import ConfigError

TILE = 8
HOST = torch.device("cpu")
MASKED = -1


def window_start(j: int, kernel: int, length: int) -> int:
    """First key of query j in a class of `length` positions."""
    return min(max(j - (kernel - 1) // 2, 0), length - kernel)


def check_window(length: int, kernel: int, dilation: int) -> None:
    """Raise ConfigError unless a window of `kernel` keys fits into the shortest dilation class of an axis."""
    if kernel % 2 == 0 or kernel < 1:
        raise ConfigError(f"neighbourhood attention has kernel {kernel}, but a window has a centre: use an odd kernel")
    if kernel * dilation > length:
        message = f"kernel {kernel} with dilation {dilation} spans {kernel * dilation} positions"
        raise ConfigError(f"{message}, but this level has only {length}: use a smaller kernel or dilation there")


class Pairs(NamedTuple):
    """Query-key pairs of an axis, [T, K] each."""

    bias: Tensor  # bias row, 0 outside the window
    first: Tensor  # where that row begins in a flattened table
    outside: Tensor


@dataclass(frozen=True)
class AxisPlan:
    """How one axis is cut: tiles ordered by mask pattern, so that tiles with one pattern are neighbours."""

    queries: Tensor  # [tiles, T] positions on the axis
    keys: Tensor  # [tiles, K] positions on the axis
    patterns: tuple[Pairs, ...]
    spans: tuple[tuple[int, int], ...]  # tiles of each pattern, as a range
    place: Tensor  # [L] where position i lies in queries.flatten()


@dataclass(frozen=True)
class _Tile:
    queries: list[int]
    keys: list[int]
    pattern: tuple[tuple[int, ...], ...]


def _cut_tile(start: int, size: int, num_keys: int, kernel: int, length: int, dilation: int, residue: int) -> _Tile:
    """The tile of `size` queries from class position `start`; positions beyond the class repeat its last one."""
    rows = [min(start + t, length - 1) for t in range(size)]
    first = max(0, min(window_start(rows[0], kernel, length), length - num_keys))
    cols = [first + t for t in range(num_keys)]
    pattern = []
    for j in rows:
        s = window_start(j, kernel, length)
        pattern.append(tuple(p - j + kernel - 1 if s <= p < s + kernel else MASKED for p in cols))
    keys = [min(p, length - 1) * dilation + residue for p in cols]
    return _Tile([j * dilation + residue for j in rows], keys, tuple(pattern))


def _cut_axis(length: int, kernel: int, dilation: int, tile: int) -> list[_Tile]:
    longest = -(-length // dilation)
    size = min(tile, longest)
    num_keys = min(size + kernel - 1, longest)
    tiles = []
    for residue in range(dilation):
        class_length = -(-(length - residue) // dilation)
        starts = [min(s, max(class_length - size, 0)) for s in range(0, class_length, size)]
        tiles += [_cut_tile(s, size, num_keys, kernel, class_length, dilation, residue) for s in starts]
    return tiles


@lru_cache(maxsize=256)
def axis_plan(length: int, kernel: int, dilation: int, tile: int = TILE, device: torch.device = HOST) -> AxisPlan:
    """Cut an axis of `length` positions, with tensors on `device`; raises ConfigError when the window does not fit."""
    check_window(length, kernel, dilation)
    tiles = _cut_axis(length, kernel, dilation, tile)
    patterns = list(dict.fromkeys(t.pattern for t in tiles))
    tiles.sort(key=lambda t: patterns.index(t.pattern))
    ids = [patterns.index(t.pattern) for t in tiles]
    spans = tuple((ids.index(p), ids.index(p) + ids.count(p)) for p in range(len(patterns)))
    queries = torch.tensor([t.queries for t in tiles])
    place = torch.empty(length, dtype=torch.int64)
    place[queries.flatten()] = torch.arange(queries.numel())
    keys = torch.tensor([t.keys for t in tiles])
    tables = tuple(_pairs(torch.tensor(p), kernel, device) for p in patterns)
    return AxisPlan(queries.to(device), keys.to(device), tables, spans, place.to(device))


def _pairs(rows: Tensor, kernel: int, device: torch.device) -> Pairs:
    """Of bias rows [T, K], MASKED outside."""
    bias = rows.clamp(min=0)
    return Pairs(*(t.to(device) for t in (bias, bias * (2 * kernel - 1), rows == MASKED)))


def _take(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x [N, H, W, C] at tiles of rows [ty, A] and columns [tx, B] -> [N, ty, A, tx, B, C]."""
    n, _, width, channels = x.shape
    picked = x.reshape(n, -1, width * channels).index_select(1, rows.flatten())
    picked = picked.view(n * rows.numel(), width, channels).index_select(1, cols.flatten())
    return picked.view(n, *rows.shape, *cols.shape, channels)


def _as_batch(tiles: Tensor, heads: int) -> Tensor:
    """[N, ty, A, tx, B, heads * D] -> [N * ty * tx, heads, A * B, D]."""
    n, ty, a, tx, b, channels = tiles.shape
    split = tiles.reshape(n, ty, a, tx, b, heads, channels // heads).permute(0, 1, 3, 5, 2, 4, 6)
    return split.reshape(n * ty * tx, heads, a * b, channels // heads)


def _from_batch(out: Tensor, n: int, ty: int, tx: int, a: int, b: int) -> Tensor:
    """The inverse of `_as_batch`."""
    heads, dim = out.shape[1], out.shape[3]
    return out.view(n, ty, tx, heads, a, b, dim).permute(0, 1, 4, 2, 5, 3, 6).reshape(n, ty, a, tx, b, heads * dim)


def pair_bias(rpb: Tensor, rows: Pairs, cols: Pairs) -> Tensor:
    """Bias of every query-key pair, -inf outside the window.

    rpb [heads, 2k - 1, 2k - 1]; rows of [A, P], cols of [B, Q] -> [heads, A * B, P * Q].
    """
    index = rows.first[:, None, :, None] + cols.bias[None, :, None, :]
    outside = rows.outside[:, None, :, None] | cols.outside[None, :, None, :]
    pairs = rpb.flatten(1).index_select(1, index.flatten()).masked_fill(outside.flatten(), float("-inf"))
    return pairs.view(len(rpb), index.shape[0] * index.shape[1], -1)


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dilation: int, tile: int = TILE) -> Tensor:
    """softmax(q k^T + bias over the window) v, tile by tile.

    q, k, v and the result [N, H, W, heads * D], q already scaled; rpb [heads, 2 kernel - 1, 2 kernel - 1].
    Differentiable once. Raises ConfigError when kernel * dilation exceeds H or W.
    """
    return _Recomputed.apply(q, k, v, rpb, dilation, tile)


class _Recomputed(torch.autograd.Function):
    """Backward cuts the tiles again: they overlap, so keeping them takes several times the memory of q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, rpb, dilation, tile):
        """q, k, v [N, H, W, heads * D], rpb [heads, 2 kernel - 1, 2 kernel - 1] -> [N, H, W, heads * D]."""
        ctx.save_for_backward(q, k, v, rpb)
        ctx.cut = dilation, tile
        return _tiled_attention(q, k, v, rpb, dilation, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        """slope [N, H, W, heads * D] -> slopes to q, k, v and rpb, in their shapes."""
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = _tiled_attention(*inputs, *ctx.cut)
        return *torch.autograd.grad(out, inputs, slope), None, None


def _tiled_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dilation: int, tile: int) -> Tensor:
    n, height, width, _ = q.shape
    heads, kernel = len(rpb), (rpb.shape[-1] + 1) // 2
    ys, xs = (axis_plan(side, kernel, dilation, tile, q.device) for side in (height, width))
    tiles_q, tiles_k, tiles_v = _take(q, ys.queries, xs.queries), _take(k, ys.keys, xs.keys), _take(v, ys.keys, xs.keys)
    bands = []
    for row_pattern, (y0, y1) in zip(ys.patterns, ys.spans):
        band = []
        for col_pattern, (x0, x1) in zip(xs.patterns, xs.spans):
            some = [_as_batch(t[:, y0:y1, :, x0:x1], heads) for t in (tiles_q, tiles_k, tiles_v)]
            bias = pair_bias(rpb, row_pattern, col_pattern).to(q.dtype)
            out = F.scaled_dot_product_attention(some[0], some[1], some[2], attn_mask=bias, scale=1.0)
            band.append(_from_batch(out, n, y1 - y0, x1 - x0, len(row_pattern.bias), len(col_pattern.bias)))
        bands.append(torch.cat(band, 3))
    merged = torch.cat(bands, 1).reshape(n, ys.queries.numel(), xs.queries.numel(), -1)
    return merged.index_select(1, ys.place).index_select(2, xs.place)


@lru_cache(maxsize=16)
def _axis_pairs(length: int, kernel: int, dilation: int, device: torch.device) -> Pairs:
    """Every pair of an axis of L = `length` positions, [L, L]."""
    check_window(length, kernel, dilation)
    pairs = torch.full((length, length), MASKED)
    for i in range(length):
        g, j = i % dilation, i // dilation
        s = window_start(j, kernel, -(-(length - g) // dilation))
        for t in range(kernel):
            pairs[i, (s + t) * dilation + g] = s + t - j + kernel - 1
    return _pairs(pairs, kernel, device)


def full_mask_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dilation: int) -> Tensor:
    """`neighborhood_attention` as one attention of all pixels to all pixels with a mask: L x L memory.

    q, k, v and the result [N, H, W, heads * D], q already scaled; rpb [heads, 2 kernel - 1, 2 kernel - 1].
    Raises ConfigError when kernel * dilation exceeds H or W.
    """
    n, height, width, channels = q.shape
    heads, kernel = len(rpb), (rpb.shape[-1] + 1) // 2
    ys, xs = (_axis_pairs(side, kernel, dilation, rpb.device) for side in (height, width))
    bias = pair_bias(rpb, ys, xs).to(q.dtype)
    q, k, v = (t.reshape(n, height * width, heads, -1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return out.transpose(1, 2).reshape(n, height, width, channels)


def natten_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dilation: int) -> Tensor:
    """The same through natten's kernels (0.15 to 0.17, the last with a relative position bias), made for CUDA.

    q, k, v and the result [N, H, W, heads * D], q already scaled; rpb [heads, 2 kernel - 1, 2 kernel - 1].
    Raises ConfigError when natten is missing or too new.
    """
    try:
        from natten.functional import na2d_av, na2d_qk
    except ImportError as error:
        raise ConfigError(
            "attention 'natten' needs natten 0.15 to 0.17 (later releases have no relative position bias): "
            "install one, or set the generator's attention to 'portable'"
        ) from error
    n, height, width, channels = q.shape
    kernel = (rpb.shape[-1] + 1) // 2
    q, k, v = (t.reshape(n, height, width, len(rpb), -1).permute(0, 3, 1, 2, 4).contiguous() for t in (q, k, v))
    scores = na2d_qk(q, k, kernel, dilation, rpb=rpb.to(q.dtype))
    out = na2d_av(scores.softmax(-1), v, kernel, dilation)
    return out.permute(0, 2, 3, 1, 4).reshape(n, height, width, channels)


BACKENDS = {"portable": neighborhood_attention, "full_mask": full_mask_attention, "natten": natten_attention}
