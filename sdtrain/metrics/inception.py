"""The 2015-12-05 TensorFlow Inception that FID is defined by, as a table of branches.

Tensor names are those of torch-fidelity's `inception-v3-compat` file, and so are the features (a test compares them):
TF1 bilinear resize to 299 px, (x - 128) / 128, average pools that do not count their padding, and a maximum pool in the
last block. Written out here so that an evaluation imports neither torchvision nor a loader that unpickles code, and so
that a small tap costs only the layers before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.precision import full_precision
from sdtrain.rng import generator

SIDE = 299
TAPS = (64, 192, 768, 2048)
BN_EPS = 1e-3

# a step of a branch: (name, channels, kernel, stride), a pool, or ("split", step, step) whose outputs are joined
AVG, MAX, MAX_HALF = "avg", "max", "max/2"


def block_a(pool: int) -> list[list[Any]]:
    return [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        [AVG, ("branch_pool", pool, 1, 1)],
    ]


def block_b() -> list[list[Any]]:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        [MAX_HALF],
    ]


def block_c(width: int) -> list[list[Any]]:
    flat, tall = (1, 7), (7, 1)
    return [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, flat, 1), ("branch7x7_3", 192, tall, 1)],
        [
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, tall, 1),
            ("branch7x7dbl_3", width, flat, 1),
            ("branch7x7dbl_4", width, tall, 1),
            ("branch7x7dbl_5", 192, flat, 1),
        ],
        [AVG, ("branch_pool", 192, 1, 1)],
    ]


def block_d() -> list[list[Any]]:
    return [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [MAX_HALF],
    ]


def block_e(pool: str) -> list[list[Any]]:
    def fork(name: str, number: int) -> tuple[Any, ...]:
        return ("split", (f"{name}_{number}a", 384, (1, 3), 1), (f"{name}_{number}b", 384, (3, 1), 1))

    return [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), fork("branch3x3", 2)],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1), fork("branch3x3dbl", 3)],
        [pool, ("branch_pool", 192, 1, 1)],
    ]


# name, then (channels, kernel, stride, padding) of a convolution, branches of a block, a pool, or the width of a tap
STEM: list[tuple[str, Any]] = [
    ("Conv2d_1a_3x3", (32, 3, 2, 0)),
    ("Conv2d_2a_3x3", (32, 3, 1, 0)),
    ("Conv2d_2b_3x3", (64, 3, 1, 1)),
    ("MaxPool_1", MAX_HALF),
    ("tap", 64),
    ("Conv2d_3b_1x1", (80, 1, 1, 0)),
    ("Conv2d_4a_3x3", (192, 3, 1, 0)),
    ("MaxPool_2", MAX_HALF),
    ("tap", 192),
]
BODY: list[tuple[str, Any]] = [
    ("Mixed_5b", block_a(32)),
    ("Mixed_5c", block_a(64)),
    ("Mixed_5d", block_a(64)),
    ("Mixed_6a", block_b()),
    ("Mixed_6b", block_c(128)),
    ("Mixed_6c", block_c(160)),
    ("Mixed_6d", block_c(160)),
    ("Mixed_6e", block_c(192)),
    ("tap", 768),
    ("Mixed_7a", block_d()),
    ("Mixed_7b", block_e(AVG)),
    ("Mixed_7c", block_e(MAX)),
    ("tap", 2048),
]


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Any, stride: int, padding: Any):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, h, w], 0 or more."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def pooled(kind: str, x: Tensor) -> Tensor:
    """[N, C, H, W] through one of the three pools."""
    if kind == AVG:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 1, 1) if kind == MAX else F.max_pool2d(x, 3, 2)


class Mixed(nn.Module):
    """Parallel branches, joined along the channels."""

    def __init__(self, c_in: int, branches: list[list[Any]]):
        super().__init__()
        self.branches = branches
        self.width = sum(self._grow(c_in, branch) for branch in branches)

    def _grow(self, c_in: int, branch: list[Any]) -> int:
        for step in branch:
            if isinstance(step, str):
                continue
            convs = step[1:] if step[0] == "split" else (step,)
            for name, c_out, kernel, stride in convs:
                kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
                padding = (0, 0) if stride == 2 else (kernel[0] // 2, kernel[1] // 2)
                self.add_module(name, ConvNormRelu(c_in, c_out, kernel, stride, padding))
            c_in = sum(conv[1] for conv in convs)
        return c_in

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, width, h, w]."""
        return torch.cat([self._walk(x, branch) for branch in self.branches], 1)

    def _walk(self, x: Tensor, branch: list[Any]) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = pooled(step, x)
            elif step[0] == "split":
                x = torch.cat([self.get_submodule(part[0])(x) for part in step[1:]], 1)
            else:
                x = self.get_submodule(step[0])(x)
        return x


class Inception(nn.Module):
    """uint8 images -> features of one tap. Frozen and in eval; holds only the layers the tap needs."""

    def __init__(self, tap: int = 2048):
        super().__init__()
        if tap not in TAPS:
            raise ConfigError(f"Inception has no tap of width {tap}; the taps are {', '.join(map(str, TAPS))}.")
        self.tap = tap
        self.plan: list[tuple[str, Any]] = []
        width = 3
        for name, what in STEM + BODY:
            if name == "tap":
                if what == tap:
                    break
                continue
            self.plan.append((name, what))
            width = self._add(name, what, width)
        self.requires_grad_(False).eval()

    def _add(self, name: str, what: Any, c_in: int) -> int:
        if isinstance(what, str):
            return c_in
        if isinstance(what, tuple):
            self.add_module(name, ConvNormRelu(c_in, *what))
            return what[0]
        block = Mixed(c_in, what)
        self.add_module(name, block)
        return block.width

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] uint8, any size -> [N, tap] float32."""
        with full_precision(images.device):
            x = (resize_tf1(images.float(), SIDE) - 128) / 128
            for name, what in self.plan:
                x = pooled(what, x) if isinstance(what, str) else self.get_submodule(name)(x)
            return x.mean((2, 3))

    def load(self, state: dict[str, Tensor]) -> Inception:
        """Take this network's tensors [...] out of a whole file. Raises WeightsError when one does not fit."""
        wanted = self.state_dict()
        optional = ("num_batches_tracked",)
        for key, tensor in wanted.items():
            if not key.endswith(optional) and (key not in state or state[key].shape != tensor.shape):
                raise WeightsError(
                    f"The Inception weights have no fitting tensor {key}; FID needs torch-fidelity's file "
                    "weights-inception-2015-12-05-6726825d.pth (`sdtrain fetch-weights inception`)."
                )
        self.load_state_dict({key: state.get(key, tensor) for key, tensor in wanted.items()})
        return self


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """[N, C, H, W] float -> [N, C, side, side], bilinear as TensorFlow 1 without aligned corners.

    Output pixel i samples input position i * size / side.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        low = at.long()
        share = (at - low).view(-1, 1) if dim == 2 else at - low
        first = images.index_select(dim, low)
        images = first + (images.index_select(dim, (low + 1).clamp(max=size - 1)) - first) * share
    return images


def randomise(net: Inception, seed: int) -> None:
    """Kaiming-normal convolutions (fan in), batch norms of gain 1 and bias 0: a function of `seed` and the names.

    PyTorch's default initialisation is dead in this network (features of 1e-8). The batch-norm statistics must be set
    by `calibrate` afterwards.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, std, generator=generator("random inception", seed, name))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    net.requires_grad_(False)


@torch.no_grad()
def calibrate(net: Inception, batches: list[Tensor]) -> None:
    """Set the batch-norm statistics to their plain average over `batches`, uint8 [n, 3, H, W] each, in one pass."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for images in batches:
        net(images)
    for norm in norms:
        norm.eval()
