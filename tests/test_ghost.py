"""Per-pass state: without these tests, batch-norm statistics and spectral vectors could depend on how many ranks or
chunks a global batch was cut into, or differ from the layers they replace, and no loss curve would show it at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdtrain.models.ghost import (
    GhostBatchNorm2d,
    OwnBatchNorm2d,
    Sigma,
    SpectralConv2d,
    SpectralConvTranspose2d,
    SpectralLinear,
    close_phase,
    next_chunk,
    open_phase,
    set_ghost_batch,
)
from sdtrain.rng import generator


def numbers(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator("test", name))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(SpectralConv2d(3, 4, 3, padding=1), GhostBatchNorm2d(4), nn.ReLU(), SpectralConv2d(4, 2, 3))
    set_ghost_batch(net, 2)
    return net.train()


def state_distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


def gradient_distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((x.grad - y.grad).abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_ghost_batch_norm_equals_one_batch_norm_a_device() -> None:
    x = numbers(8, 3, 4, 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm, devices = GhostBatchNorm2d(3), [nn.BatchNorm2d(3) for _ in range(4)]
    norm.ghost_batch = 2
    out = norm(ours)
    reference = torch.cat([device(chunk) for device, chunk in zip(devices, theirs.chunk(4), strict=True)])
    (out**3).sum().backward()
    (reference**3).sum().backward()
    assert torch.equal(out, reference)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), sum(getattr(d, name) for d in devices) / 4)
    assert norm.num_batches_tracked == 1


def test_own_batch_norms_are_one_module_a_ghost_however_ghosts_are_cut() -> None:
    torch.manual_seed(0)
    splits = [nn.BatchNorm2d(3) for _ in range(4)]
    for split in splits:
        nn.init.normal_(split.weight)
        nn.init.normal_(split.bias)
    whole, cut = OwnBatchNorm2d(3, 4), OwnBatchNorm2d(3, 4)
    whole.bns, cut.bns = (nn.ModuleList(copy.deepcopy(splits)) for _ in range(2))
    x = numbers(8, 3, 4, 4)
    wanted = torch.cat([split(part) for split, part in zip(splits, x.chunk(4), strict=True)])
    out = whole(x)
    open_phase(cut)
    for ghosts in ((2,), (0, 1), (3,)):  # in the order of ranks, not of ghosts
        next_chunk(cut, ghosts=ghosts)
        rows = torch.cat([x[2 * g : 2 * g + 2] for g in ghosts])
        made = cut(rows)
        assert torch.equal(made, torch.cat([wanted[2 * g : 2 * g + 2] for g in ghosts]))
        made.square().sum().backward()
    close_phase(cut)
    (wanted.square().sum() + out.square().sum()).backward()
    assert torch.equal(out, wanted)
    for own in (whole, cut):
        for i, split in enumerate(splits):
            ours = own.bns[i]
            torch.testing.assert_close(ours.state_dict(), split.state_dict())
            torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in split.parameters()])
    assert torch.equal(cut.eval()(x), splits[0].eval()(x))
    with pytest.raises(ValueError, match="9 samples, which is not a multiple of its 4 ghosts"):
        whole.train()(numbers(9, 3, 4, 4))


def test_a_batch_with_a_ragged_last_ghost_is_refused() -> None:
    norm = GhostBatchNorm2d(3)
    norm.ghost_batch = 3
    with pytest.raises(ValueError, match="8 samples, which is not a multiple of the ghost batch 3"):
        norm(numbers(8, 3, 4, 4))


def test_gradients_and_state_do_not_depend_on_the_number_of_chunks() -> None:
    x = numbers(8, 3, 6, 6)
    nets = {}
    for chunks in (1, 2, 4):
        net = nets[chunks] = small_net()
        open_phase(net)
        for chunk in x.chunk(chunks):
            next_chunk(net)
            (net(chunk).square().sum() + net(2 * chunk).sum()).backward()  # two passes, as fake and real
        close_phase(net)
    for chunks in (2, 4):
        assert state_distance(nets[1], nets[chunks]) < 1e-6
        assert gradient_distance(nets[1], nets[chunks]) < 1e-4
    assert nets[4][1].num_batches_tracked == 2


def test_a_phase_of_two_passes_leaves_the_state_of_two_official_forwards() -> None:
    x, plain, phased = numbers(2, 3, 6, 6), small_net(), small_net()
    for factor in (1, 2):
        plain(factor * x)
    open_phase(phased)
    next_chunk(phased)
    outs = [phased(factor * x) for factor in (1, 2)]
    before = copy.deepcopy(phased[0].weight_u)
    close_phase(phased)
    assert len(outs) == 2
    assert not torch.equal(before, phased[0].weight_u)  # nothing moves before the phase ends
    assert state_distance(plain, phased) < 1e-7


def test_two_ranks_end_a_phase_with_the_state_of_one() -> None:
    x, alone = numbers(8, 3, 6, 6), small_net()
    ranks = [small_net(), small_net()]
    for net, samples in ((alone, x), (ranks[0], x[:4]), (ranks[1], x[4:])):
        open_phase(net)
        next_chunk(net)
        net(samples)
    other: list[Tensor] = []
    close_phase(ranks[1], sum_over_ranks=lambda sums: other.extend(t.clone() for t in sums))
    close_phase(ranks[0], sum_over_ranks=lambda sums: [t.add_(o) for t, o in zip(sums, other, strict=True)])
    close_phase(alone)
    assert len(other) == 3  # mean, variance and count of the one batch norm; spectral vectors need no sum
    assert state_distance(alone, ranks[0]) < 1e-6


def test_a_skipped_phase_leaves_no_trace() -> None:
    net, untouched = small_net(), small_net()
    open_phase(net)
    next_chunk(net)
    net(numbers(4, 3, 6, 6))
    close_phase(net, apply=False)
    assert state_distance(net, untouched) == 0
    net(numbers(4, 3, 6, 6))
    assert state_distance(net, untouched) > 0  # outside a phase a forward advances at once


def test_eval_does_not_advance_state() -> None:
    net, untouched = small_net().eval(), small_net()
    net(numbers(3, 3, 6, 6))
    assert state_distance(net, untouched) == 0


SPECTRAL = {
    "conv": (lambda: SpectralConv2d(3, 5, 3, padding=1), lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 6)),
    "few places": (lambda: SpectralConv2d(16, 5, 3, stride=2), lambda: nn.Conv2d(16, 5, 3, stride=2), (2, 16, 5, 5)),
    "no bias": (lambda: SpectralConv2d(16, 5, 1, bias=False), lambda: nn.Conv2d(16, 5, 1, bias=False), (2, 16, 2, 2)),
    "wide": (lambda: SpectralConvTranspose2d(6, 5, 4, 2, 1), lambda: nn.ConvTranspose2d(6, 5, 4, 2, 1), (2, 6, 4, 4)),
    "transposed": (lambda: SpectralConvTranspose2d(6, 5, 4), lambda: nn.ConvTranspose2d(6, 5, 4), (2, 6, 1, 1)),
    "linear": (lambda: SpectralLinear(7, 5), lambda: nn.Linear(7, 5), (2, 7)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_layers_equal_the_old_torch_utility(kind: str) -> None:
    ours, reference, shape = SPECTRAL[kind][0](), SPECTRAL[kind][1](), SPECTRAL[kind][2]
    reference = nn.utils.spectral_norm(reference)
    missing = ours.load_state_dict(reference.state_dict())
    assert not missing.missing_keys
    x = numbers(*shape)
    for mode in (True, True, False):
        a, b = ours.train(mode)(x), reference.train(mode)(x)
        torch.testing.assert_close(a, b)
        for net, out in ((ours, a), (reference, b)):
            net.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(ours.weight_orig.grad, reference.weight_orig.grad, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.weight_u, reference.weight_u)
    torch.testing.assert_close(ours.weight_v, reference.weight_v)


def test_spectral_vectors_stay_exact_under_autocast() -> None:
    plain, cast = SpectralConv2d(16, 16, 3), SpectralConv2d(16, 16, 3)
    cast.load_state_dict(plain.state_dict())
    x = numbers(2, 16, 6, 6)
    plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert cast(x).dtype == torch.bfloat16
    assert torch.equal(plain.weight_u, cast.weight_u)
    assert torch.equal(plain.weight_v, cast.weight_v)


def test_spectral_norm_has_second_derivatives() -> None:
    torch.manual_seed(0)
    layer = SpectralConv2d(8, 2, 3, padding=1).double().eval()  # few places and many weights: the result is scaled
    x = numbers(1, 8, 2, 2).double().requires_grad_(True)

    def penalty(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # sigma as the layer has it, of a weight that may be any
        u, v = layer.weight_u, layer.weight_v
        sigma = Sigma.apply(weight, u.view(-1, 1, 1, 1), v.view(1, 8, 3, 3), (weight.flatten(1) @ v).detach())
        return nn.functional.conv2d(x, weight, padding=1).square().sum() / sigma**2

    weight = layer.weight_orig.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(penalty, (weight, x)) and torch.autograd.gradgradcheck(penalty, (weight, x))


def test_an_average_reads_its_weights_for_spectral_norm_once_a_phase() -> None:
    layer = SpectralConv2d(3, 5, 3).eval()
    counted: list[int] = []
    times_v = layer._times_v
    layer._times_v = lambda v: counted.append(1) or times_v(v)  # type: ignore[method-assign, func-returns-value]
    open_phase(layer)
    first = layer(numbers(2, 3, 6, 6))
    assert torch.equal(layer(numbers(2, 3, 6, 6)), first) and len(counted) == 1
    close_phase(layer)
    with torch.no_grad():
        layer.weight_orig[0] *= 2  # an optimizer or the average has moved it
    open_phase(layer)
    assert not torch.equal(layer(numbers(2, 3, 6, 6)), first) and len(counted) == 2
    close_phase(layer)
