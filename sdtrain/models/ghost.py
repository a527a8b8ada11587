"""State that advances once per pass of the global batch, and the layers that have such state.

Official code advances spectral-norm vectors, batch-norm statistics and w_avg at every forward call. Here a pass over
the global batch may be cut into chunks and spread over ranks, so advancing is split in two: every forward writes what
it saw into a ledger (one entry a pass), and the end of the phase, when ranks have summed their entries, applies them.
Outside a phase (`open_phase` not called) a train-mode forward advances at once, exactly like the official layers.

    open_phase(G, D)
    for chunk in chunks:
        next_chunk(G, D)          # the n-th forward of every chunk belongs to pass n
        ... forward, backward ...
    close_phase(G, D, sum_over_ranks=...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.precision import full_precision

SumOverRanks = Callable[[list[Tensor]], None]
Move = tuple[Tensor, Tensor | None, float]  # a buffer, what it goes to (None: one more than it is), and how far


class Advancing(nn.Module):
    """A layer with pass state. Subclasses call `_enter` for the entry of the current pass and implement `_moves`."""

    _ledger: list[list[Tensor]] | None = None
    _pass: int = 0
    _again: bool = False  # a block computes again what it has not kept: nothing new is seen
    _settled: Tensor | None = None  # what is worked out once a phase
    _ghosts: Sequence[int] | None = None  # of the global batch, that the chunk holds; None = all

    def _enter(self) -> list[Tensor] | None:
        """The ledger entry of the pass this forward belongs to (empty for its first chunk), None outside a phase."""
        if self._ledger is None:
            return None
        if self._pass == len(self._ledger):
            self._ledger.append([])
        entry = self._ledger[self._pass]
        self._pass += 1
        return entry

    def _record(self, seen: list[Tensor]) -> None:
        """Add what a forward saw to the ledger (in float64, so that the order of chunks and ranks leaves no trace)."""
        if self._again:
            return
        entry = self._enter()
        if entry is None:
            self._advance(seen)
        elif entry:
            torch._foreach_add_(entry, [tensor.double() for tensor in seen])
        else:
            entry.extend(tensor.double() for tensor in seen)

    def _sums(self) -> list[Tensor]:
        """The ledger's tensors that ranks must add up before `_advance`."""
        return [tensor for entry in self._ledger or [] for tensor in entry]

    def _advance(self, entry: list[Tensor]) -> None:
        move(self._moves(entry))

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        """What becomes of the buffers after a pass that has left `entry`, [...] each."""
        raise NotImplementedError  # abstract


@torch.no_grad()
def move(moves: Iterable[Move]) -> None:
    """Buffers [...] towards what they go to, with one call for all that go as far."""
    by_weight: dict[float, list[tuple[Tensor, Tensor]]] = {}
    counts = []
    for buffer, aim, weight in moves:
        if aim is None:
            counts.append(buffer)
        else:
            by_weight.setdefault(weight, []).append((buffer, aim))
    for weight, pairs in by_weight.items():
        buffers, aims = map(list, zip(*pairs))
        if weight == 1:
            torch._foreach_copy_(buffers, aims)
        else:
            torch._foreach_lerp_(buffers, aims, weight)
    if counts:
        torch._foreach_add_(counts, 1)


Nets = nn.Module | Sequence[Advancing]


def advancing_layers(*nets: Nets) -> Iterator[Advancing]:
    """Those of networks; of a list of them, its members: whoever opens many phases looks for them once."""
    for net in nets:
        found = net.modules() if isinstance(net, nn.Module) else net
        yield from (layer for layer in found if isinstance(layer, Advancing))


def open_phase(*nets: Nets) -> None:
    for layer in advancing_layers(*nets):
        layer._ledger, layer._pass, layer._settled = [], 0, None


def next_chunk(*nets: Nets, ghosts: Sequence[int] | None = None) -> None:
    """`ghosts`: those of the global batch that the chunk holds; None = all."""
    for layer in advancing_layers(*nets):
        layer._pass, layer._ghosts = 0, ghosts


def close_phase(*nets: Nets, sum_over_ranks: SumOverRanks | None = None, apply: bool = True) -> None:
    """Add the ledgers up over ranks and advance the layers, pass by pass. `apply=False` forgets a skipped phase."""
    layers = list(advancing_layers(*nets))
    if apply and sum_over_ranks is not None:
        sum_over_ranks([tensor for layer in layers for tensor in layer._sums()])
    ledgers = [layer._ledger or [] for layer in layers]
    for layer in layers:
        layer._ledger, layer._pass, layer._settled, layer._ghosts = None, 0, None, None
    for entries in zip_longest(*ledgers) if apply else []:
        pairs = zip(layers, entries, strict=True)
        move(step for layer, entry in pairs if entry is not None for step in layer._moves(entry))


def normalise_ghosts(
    x: Tensor, ghost_batch: int | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Batch norm of [N, C, H, W] with the statistics of each ghost, and [sum of means, sum of variances, ghosts].

    The variances are the unbiased ones that running statistics follow. Raises ValueError when N is not a multiple of
    `ghost_batch`; None takes the whole input as one ghost.
    """
    if len(x) % (ghost_batch or len(x)):
        raise ValueError(f"batch norm got {len(x)} samples, which is not a multiple of the ghost batch {ghost_batch}")
    ghosts = x.split(ghost_batch or len(x))
    # momentum 1 makes the kernel hand back the statistics it has used
    stats = torch.zeros(len(ghosts), 2, x.shape[1], device=x.device)
    out = [F.batch_norm(g, s[0], s[1], weight, bias, True, 1.0, eps) for g, s in zip(ghosts, stats, strict=True)]
    mean, var = stats.sum(0)
    return out[0] if len(out) == 1 else torch.cat(out), [mean, var, stats.new_full((1,), float(len(ghosts)))]


def towards_means(entry: list[Tensor], mean: Tensor, var: Tensor, momentum: float) -> list[Move]:
    """Running statistics [C] towards those of a pass, an `entry` of what `normalise_ghosts` has seen."""
    *totals, count = entry
    return [(own, (total / count).to(own), momentum) for own, total in zip((mean, var), totals, strict=True)]


class GhostBatchNorm2d(Advancing, nn.BatchNorm2d):
    """Batch norm with statistics per ghost of `ghost_batch` consecutive samples and one shared affine transform.

    Equals `nn.BatchNorm2d` on as many devices as there are ghosts (Hoffer et al. 2017; the official 8-GPU behaviour of
    ProjectedGAN). `ghost_batch=None` takes the whole input as one ghost. The running statistics move once per pass, by
    the mean over all ghosts of the global batch, so they are the same on every rank.
    """

    ghost_batch: int | None = None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, H, W]; raises ValueError in training unless N is a multiple of `ghost_batch`."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        out, seen = normalise_ghosts(x, self.ghost_batch, self.weight, self.bias, self.eps)
        self._record(seen)
        return out

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        return [
            *towards_means(entry, self.running_mean, self.running_var, self.momentum),
            (self.num_batches_tracked, None, 1),
        ]


class OwnBatchNorm2d(Advancing):
    """A batch norm for each ghost of the global batch, with an affine transform and running statistics of its own.

    So the authors of SD-GAN have it (`gbn_splits` in their fork of ProjectedGAN, specs/projected_gan.md section 2):
    unlike on as many devices, which share the transform. In evaluation the first stands for all. Official names.
    """

    def __init__(self, num_channels: int, num_ghosts: int) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(num_channels) for _ in range(num_ghosts))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, H, W]; raises ValueError in training unless N is a multiple of the ghosts in it."""
        norms: list[Any] = list(self.bns)
        eps = norms[0].eps
        if not self.training:
            first = norms[0]
            return F.batch_norm(x, first.running_mean, first.running_var, first.weight, first.bias, False, 0.0, eps)
        here = range(len(norms)) if self._ghosts is None else self._ghosts
        if len(x) % len(here):
            raise ValueError(f"batch norm got {len(x)} samples, which is not a multiple of its {len(here)} ghosts")
        # all are in the graph: a data-parallel reducer waits for every gradient
        weights, biases = (torch.stack([getattr(norm, name) for norm in norms]).unbind() for name in ("weight", "bias"))
        seen = torch.zeros(len(norms), 2, x.shape[1], device=x.device)
        parts = zip(here, x.split(len(x) // len(here)), strict=True)
        out = [F.batch_norm(p, seen[g, 0], seen[g, 1], weights[g], biases[g], True, 1.0, eps) for g, p in parts]
        self._record([seen])
        return out[0] if len(out) == 1 else torch.cat(out)

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        moves: list[Move] = []
        for norm, (mean, var) in zip(self.bns, entry[0], strict=True):
            own: Any = norm
            moves += [(own.running_mean, mean.to(own.running_mean), own.momentum)]
            moves += [(own.running_var, var.to(own.running_var), own.momentum), (own.num_batches_tracked, None, 1)]
        return moves


def set_ghost_batch(net: nn.Module, ghost_batch: int) -> None:
    """Tell every layer of `net` whose result depends on batch composition how many samples a ghost has."""
    for layer in net.modules():
        if hasattr(layer, "ghost_batch"):
            layer.ghost_batch = ghost_batch  # type: ignore[assignment]


class Sigma(torch.autograd.Function):
    """u^T W v where W v is known already. Its gradient by W is u v^T, whatever W is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, Wv: Tensor) -> Tensor:
        """`weight` [...], u and v of shapes that broadcast to its own, W v [rows] like u -> scalar."""
        ctx.save_for_backward(u, v)
        return torch.dot(u.flatten(), Wv)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        u, v = ctx.saved_tensors
        return (gradient * u) * v, None, None, None


class SpectralNorm(Advancing):
    """Spectral normalisation under the names of the old torch utility: weight_orig, weight_u, weight_v.

    One power iteration per training pass, none in eval; u and v are constants of the graph. The iteration depends on
    the weight alone, so later chunks of a pass reuse the vectors of the first and nothing needs summing over ranks.
    W itself is read by the two products of the iteration and by the convolution, and by nothing else where dividing
    the result by sigma is less work than dividing the weights.
    """

    out_dim = 0  # ConvTranspose counts its outputs along dimension 1
    weight_orig: nn.Parameter
    weight_u: Tensor
    weight_v: Tensor

    def _init_spectral(self, weight: Tensor) -> None:
        self.weight_orig = nn.Parameter(weight)
        rows = weight.shape[self.out_dim]
        self.register_buffer("weight_u", F.normalize(torch.randn(rows), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(weight.numel() // rows), dim=0, eps=1e-12))

    def _times_u(self, u: Tensor) -> Tensor:
        """W^T u [columns]; the matrix of a transposed convolution is not copied into place for it."""
        weight = self.weight_orig.detach()
        if self.out_dim == 0:
            return weight.flatten(1).t() @ u
        return torch.matmul(u, weight.flatten(2)).flatten()

    def _times_v(self, v: Tensor) -> Tensor:
        """W v [rows]."""
        weight = self.weight_orig.detach()
        if self.out_dim == 0:
            return weight.flatten(1) @ v
        return torch.bmm(weight.flatten(2), v.view(len(weight), -1, 1)).sum(0).flatten()

    def _vectors(self) -> list[Tensor]:
        """u, v and W v of this pass."""
        if not self.training:
            return [self.weight_u, self.weight_v, self._still()]
        entry = self._enter()
        if entry is None:
            found = self._iterate(self.weight_u)
            self._advance(found)
            return found
        if not entry:
            done = self._ledger[self._pass - 2][0] if self._ledger and self._pass > 1 else self.weight_u
            entry.extend(self._iterate(done))
        return entry

    @torch.no_grad()
    def _still(self) -> Tensor:
        """W v, once a phase: nothing moves the weights of a network inside one."""
        if self._ledger is None:
            return self._times_v(self.weight_v)
        if self._settled is None:
            self._settled = self._times_v(self.weight_v)
        return self._settled

    @torch.no_grad()
    def _iterate(self, u: Tensor) -> list[Tensor]:
        v = F.normalize(self._times_u(u), dim=0, eps=1e-12)
        Wv = self._times_v(v)
        return [F.normalize(Wv, dim=0, eps=1e-12), v, Wv]

    def _sums(self) -> list[Tensor]:
        return []

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        return [(self.weight_u, entry[0], 1), (self.weight_v, entry[1], 1)]

    def scale(self) -> Tensor:
        """1 / (u^T W v), a scalar; asking in train mode is one pass. Float32 under autocast: sigma is a long sum."""
        with full_precision(self.weight_orig.device):
            u, v, Wv = self._vectors()
            if not (torch.is_grad_enabled() and self.weight_orig.requires_grad):
                return torch.dot(u, Wv).reciprocal()
            shape = list(self.weight_orig.shape)
            rows, columns = [1] * len(shape), shape
            rows[self.out_dim], columns[self.out_dim] = shape[self.out_dim], 1
            sigma: Tensor = Sigma.apply(self.weight_orig, u.view(rows), v.view(columns), Wv)
            return sigma.reciprocal()

    @property
    def weight(self) -> Tensor:
        """W / (u^T W v); reading it in train mode is one pass."""
        return self.weight_orig * self.scale()

    def _scales_result(self, x: Tensor, places: int) -> bool:
        """Whether a result of so many `places` an image is scaled instead of W: float32, and fewer numbers."""
        low = torch.is_autocast_enabled(x.device.type) if x.device.type != "meta" else False
        return not low and x.dtype == self.weight_orig.dtype and TYPICAL_GHOST * places <= self.weight_orig[0].numel()


TYPICAL_GHOST = 4  # images; not those at hand, so that an image's numbers do not depend on its company


def scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [N, C, ...] times a scalar plus bias [C] or nothing."""
    return y * scale if bias is None else torch.addcmul(bias.view(-1, *[1] * (y.ndim - 2)), y, scale)


def settle_spectral_norms(net: nn.Module, iterations: int = 15) -> None:
    """Bring u and v of a fresh network close to the singular vectors.

    Official networks start from random u, v, whose u^T W v is far too small: harmless in training mode, where the first
    forward iterates, but an average in eval mode that teaches from the first step on would produce images of 1e13.
    """
    for layer in net.modules():
        if isinstance(layer, SpectralNorm):
            for _ in range(iterations):
                layer._advance(layer._iterate(layer.weight_u))


class SpectralConv2d(SpectralNorm):
    """`spectral_norm(nn.Conv2d(...))` with the same tensors and initial distribution."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        plain = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)
        self.bias = plain.bias
        self.stride, self.padding, self.groups = stride, padding, groups
        self._init_spectral(plain.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H', W'], sides as nn.Conv2d gives them."""
        if not self._scales_result(x, x[0, 0].numel() // self.stride**2):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        y = F.conv2d(x, self.weight_orig, None, self.stride, self.padding, groups=self.groups)
        return scaled(y, self.scale(), self.bias)


class SpectralConvTranspose2d(SpectralNorm):
    """`spectral_norm(nn.ConvTranspose2d(...))` with the same tensors and initial distribution."""

    out_dim = 1

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__()
        plain = nn.ConvTranspose2d(c_in, c_out, kernel, stride, padding, bias=bias)
        self.bias = plain.bias
        self.stride, self.padding = stride, padding
        self._init_spectral(plain.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H', W'], sides as nn.ConvTranspose2d gives them."""
        if x.shape[2:] != (1, 1) or self.padding or not self._scales_result(x, 1):
            return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding)
        # of a single place it is a matrix product, and several times faster as one
        y = (x.flatten(1) @ self.weight_orig.flatten(1)).unflatten(1, self.weight_orig.shape[1:])
        return scaled(y, self.scale(), self.bias)


class SpectralLinear(SpectralNorm):
    """`spectral_norm(nn.Linear(...))` with the same tensors and initial distribution."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__()
        plain = nn.Linear(c_in, c_out, bias=bias)
        self.bias = plain.bias
        self._init_spectral(plain.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in] -> [N, c_out]."""
        return F.linear(x, self.weight, self.bias)
