"""Precision and overflow. Without these tests `precision: fp32` could quietly mean TF32 on a GPU, two switches of torch
could contradict each other and stop an evaluation, and a clamped gradient could carry a nan into a network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdtrain.engine.nonfinite import clamp_nonfinite
from sdtrain.precision import WORKSPACE, described, exact_sums, full_precision, set_precision


@pytest.fixture(autouse=True)
def switches_as_they_were() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    set_precision(tf32=False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("first", [True, False])
def test_float32_is_ieee_or_tf32_for_products_and_convolutions_as_told(first: bool) -> None:
    for tf32 in (first, not first, first):
        set_precision(tf32)
        told = described()
        name = "tf32" if tf32 else "ieee"
        assert [told[f"{w}.fp32_precision"] for w in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")] == [name] * 3
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == name


@pytest.mark.parametrize("tf32", [True, False])
def test_the_older_switches_say_the_same_and_a_region_without_tf32_can_be_entered(tf32: bool) -> None:
    set_precision(tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32 and torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_gradients_that_are_not_finite_become_0_or_1e5_and_are_counted() -> None:
    inf, nan = math.inf, math.nan
    given = [torch.tensor([[1.0, nan], [inf, -inf]]), torch.tensor(nan), torch.tensor([3e5, -2.0, 0.0])]
    expected = [torch.tensor([[1.0, 0.0], [1e5, -1e5]]), torch.tensor(0.0), torch.tensor([3e5, -2.0, 0.0])]
    places = [g.data_ptr() for g in given]
    count = clamp_nonfinite(given)
    assert count.shape == () and count.dtype == torch.int64 and count.item() == 4
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert [g.data_ptr() for g in given] == places
    assert clamp_nonfinite(given).item() == 0


def test_gradients_of_several_formats_and_layouts_are_clamped_and_none_is_fine() -> None:
    column = torch.full((4, 2), math.inf).t()  # not contiguous
    half = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    double = torch.tensor([math.nan, -math.inf], dtype=torch.float64)
    assert clamp_nonfinite([column, half, double]).item() == 8 + 1 + 2
    assert torch.equal(column, torch.full((2, 4), 1e5))
    assert half.tolist() == [65504.0, 1.0] and double.tolist() == [0.0, -1e5]
    assert clamp_nonfinite([]).item() == 0


def test_a_step_after_clamping_equals_the_step_of_the_published_rule() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 3), torch.randn(7)]
    grads = [torch.randn_like(w) for w in weights]
    grads[0][1, 2], grads[1][3], grads[1][5] = math.nan, math.inf, -math.inf
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    for a, b, grad in zip(ours, theirs, grads, strict=True):
        a.grad, b.grad = grad.clone(), grad.clone()
        for i in range(grad.numel()):  # element by element
            value = b.grad.view(-1)[i].item()
            b.grad.view(-1)[i] = 0.0 if math.isnan(value) else math.copysign(1e5, value) if math.isinf(value) else value
    clamp_nonfinite([p.grad for p in ours if p.grad is not None])
    for params in (ours, theirs):
        torch.optim.Adam(params, lr=0.1, betas=(0.0, 0.99)).step()
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("summation", "deterministic", "device", "exact"),
    [
        ("auto", False, "cpu", True),
        ("auto", False, "cuda", False),
        ("auto", True, "cuda", True),
        ("exact", False, "cuda", True),
        ("fast", True, "cpu", False),
    ],
)
def test_sums_are_exact_on_a_cpu_and_where_bits_repeat_unless_told(
    summation: str, deterministic: bool, device: str, exact: bool
) -> None:
    config: Any = SimpleNamespace(summation=summation, deterministic=deterministic)
    assert exact_sums(config, device) is exact


def test_deterministic_sets_what_bits_need_and_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE[0], raising=False)
    set_precision(tf32=False, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark and os.environ[WORKSPACE[0]] == WORKSPACE[1]
    assert described()["deterministic"] is True
    set_precision(tf32=False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.benchmark and described()["deterministic"] is False


def test_no_product_is_rounded_to_16_bits_in_a_region_of_full_precision() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision("cpu"), full_precision("meta"):
            assert (x @ x).dtype == torch.float32
