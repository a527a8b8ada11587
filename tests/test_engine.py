"""One step per phase, no leak between players, one average: without these a GAN trains wrongly and silently."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from sdtrain.config.options import Optimizer
from sdtrain.config.schedule import Schedule, value_at
from sdtrain.contracts import Chunk, Phase, Stage
from sdtrain.engine.ddp import Ddp, DdpNet
from sdtrain.engine.ema import ema_beta, freeze, update_ema
from sdtrain.engine.heap import keep_freed_memory
from sdtrain.engine.net import LocalNet
from sdtrain.engine.player import make_optimizer
from sdtrain.engine.sums import SumPlayer, owned
from sdtrain.models.ghost import GhostBatchNorm2d, SpectralConv2d, set_ghost_batch
from sdtrain.rng import Draws

CPU = torch.device("cpu")


class Small(nn.Module):
    """A convolution with spectral norm, batch norm per ghost, and a mean: every kind of state a GAN has here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = SpectralConv2d(3, 4, 3, padding=1), GhostBatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def game(exact: bool, clip_norm: float = 0.0) -> tuple[Ddp, dict[str, DdpNet]]:
    torch.manual_seed(0)
    adam = Optimizer(lr=1e-3, clip_norm=clip_norm)
    engine = Ddp(CPU, {"G": adam, "D": adam}, exact=exact)
    nets = {name: engine.net(Small().train()) for name in ("G", "D")}
    for net in nets.values():
        set_ghost_batch(net.module, 2)
    engine.begin(Stage(name="main", end_img=100, players={"G": ("G",), "D": ("D",)}), 0, nets, {})
    return engine, nets


def chunks(at_once: int, num_ghosts: int = 4) -> list[Chunk]:
    images = torch.randn(num_ghosts * 2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    made = []
    for first in range(0, num_ghosts, at_once):
        draws = Draws(seed=0, step=0, ghosts=tuple(range(first, first + at_once)), ghost_batch=2)
        real = images[first * 2 : (first + at_once) * 2]
        made.append(Chunk(step=0, seen_img=0, real=real, labels=None, draws=draws))
    return made


def phase(nets: dict[str, DdpNet], player: str = "G") -> Phase:
    def loss(x: Chunk) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        fake = nets["G"](x.real)[:, :3]
        terms = {"a": fake.square().mean(), "b": nets["D"](fake).cos().mean(), "c": fake.abs().mean()}
        return terms["a"] + 2 * terms["b"] + terms["c"], terms

    return Phase(name=player, player=player, loss=loss)


def parameters(net: DdpNet) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.module.parameters()]


def test_invariant_5_a_phase_of_three_terms_is_one_step_of_one_player():
    for exact in (True, False):
        engine, nets = game(exact)
        before = {name: parameters(net) for name, net in nets.items()}
        engine.run(phase(nets), chunks(1))
        steps = {float(state["step"]) for state in engine.players["G"].optimizer.state.values()}
        assert steps == {1.0}
        assert not engine.players["D"].optimizer.state
        assert all(p.grad is None for net in nets.values() for p in net.module.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before["D"], parameters(nets["D"])))
        assert any(not torch.equal(a, b) for a, b in zip(before["G"], parameters(nets["G"])))
        assert all(p.requires_grad for net in nets.values() for p in net.module.parameters())


def test_the_other_player_asks_for_no_gradient_while_one_trains():
    engine, nets = game(True)
    seen = []
    inner = phase(nets).loss

    def spying(x: Chunk):
        seen.append([p.requires_grad for p in nets["D"].module.parameters()])
        return inner(x)

    engine.run(Phase(name="G", player="G", loss=spying), chunks(2))
    assert seen and not any(flag for flags in seen for flag in flags)


def test_chunks_of_any_size_give_one_step_and_one_advance_of_pass_state():
    results = []
    for at_once, exact in ((4, False), (2, False), (1, False), (1, True)):
        engine, nets = game(exact)
        engine.run(phase(nets), chunks(at_once))
        results.append({f"{n}.{k}": v for n, net in nets.items() for k, v in net.module.state_dict().items()})
    assert results[0]["D.norm.num_batches_tracked"] == 1
    for other in results[1:]:
        for key, value in results[0].items():
            # Adam turns the rounding of a gradient of size eps into a share of a step of 1e-3
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-4 if "bias" in key else 1e-6)


def test_the_average_follows_the_schedule_of_the_official_code():
    # 64 images a step, half-life 20000 images: beta = 0.5 ** (64 / 20000); with ramp-up 0.05 the first step copies
    assert ema_beta(20_000, None, 0, 64) == 0.5 ** (64 / 20_000)
    assert ema_beta(20_000, 0.05, 0, 64) == 0.0
    assert ema_beta(20_000, 0.05, 64_000, 64) == 0.5 ** (64 / 3_200)
    assert ema_beta(20_000, 0.05, 10**9, 64) == 0.5 ** (64 / 20_000)


def test_eq_1_parameters_are_averaged_and_buffers_copied():
    net, ema = Small(), freeze(Small())
    wanted = [0.9 * e + 0.1 * p for e, p in zip(ema.parameters(), net.parameters())]
    net.norm.running_mean.fill_(3.0)
    update_ema(ema, net, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ema.parameters(), wanted))
    assert torch.equal(ema.norm.running_mean, net.norm.running_mean)


def test_a_frozen_network_stays_in_eval_inside_a_training_parent():
    parent = nn.ModuleDict({"teacher": freeze(Small()), "student": Small()})
    parent.train()
    assert not parent["teacher"].training and not parent["teacher"].norm.training and parent["student"].training
    assert not any(p.requires_grad for p in parent["teacher"].parameters())


def test_a_copy_of_a_frozen_network_is_on_its_own():
    net = freeze(Small())
    made = copy.deepcopy(net)
    assert made.train() is made and not made.training and made.eval() is made


def test_a_schedule_is_a_function_of_images_seen():
    steps = Schedule(points=(("0", 1.0), ("100", 0.5), ("80%", 0.25)), curve="steps")
    assert [value_at(steps, img, (0, 1000)) for img in (0, 99, 100, 799, 800, 5000)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    line = Schedule(points=(("100", 1.0), ("1ki", 0.0)))
    assert [value_at(line, img) for img in (0, 100, 550, 1000, 2000)] == [1, 1, 0.5, 0, 0]
    cosine = Schedule(points=(("0", 2.0), ("1000", 0.0)), curve="cosine")
    assert [value_at(cosine, img) for img in (0, 500, 1000)] == [2, 1, 0]
    assert value_at(cosine, 250) == 2 - (0.5 - 0.5 * math.cos(math.pi / 4)) * 2
    assert value_at(0.3, 77) == 0.3


def test_adam_of_a_lazy_penalty_follows_its_interval_and_a_schedule_the_clock():
    lr = Schedule(points=(("0", 1.0), ("100", 0.5)))
    found = {}
    for rescale in ("none", "betas", "all"):
        engine = Ddp(CPU, {"D": Optimizer(lr=lr, betas=(0.0, 0.99), rescale=rescale)})
        stage = Stage(name="main", end_img=1000, players={"D": ("D",)})
        engine.begin(stage, 0, {"D": engine.net(Small())}, {"D": 16})
        engine.players["D"].set_clock(50)
        group = engine.players["D"].optimizer.param_groups[0]
        found[rescale] = (group["lr"], group["betas"][1])
    slow = 0.99 ** (16 / 17)
    assert found == {"none": (0.75, 0.99), "betas": (0.75, slow), "all": (0.75 * (16 / 17), slow)}


def test_a_clipped_gradient_has_the_norm_asked_for_and_an_unclipped_one_its_own():
    norms = []
    for clip in (0.0, 1e-3):
        engine, nets = game(True, clip)
        player = engine.players["G"]
        player.step = lambda p=player: norms.append(torch.stack(torch._foreach_norm(p.gradients())).norm())
        engine.run(phase(nets), chunks(1))
    assert norms[0] > 1e-2
    torch.testing.assert_close(norms[1], torch.tensor(1e-3), rtol=1e-3, atol=0.0)


def test_gradients_that_autograd_hands_out_as_one_tensor_are_changed_one_by_one():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    found = torch.autograd.grad((a + b).square().sum(), [a, b])
    first, second = owned(found)
    first.mul_(2.0)
    assert torch.equal(second, torch.full((3,), 4.0)) and found[0].data_ptr() == found[1].data_ptr()


def test_the_gradient_of_a_single_ghost_is_itself_and_that_of_several_a_float64_mean():
    means = []
    for num in (1, 3):
        net = nn.Linear(4, 1)
        net.weight.data.fill_(0.1)
        player = SumPlayer([LocalNet(net)], Optimizer(lr=0.1, betas=(0.0, 0.9)), (0, 10), None)
        player.clear()
        xs = [torch.rand(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(num)]
        grads = []
        for x in xs:
            loss = (net(x) ** 3).mean()
            grads.append(torch.autograd.grad(loss, net.weight, retain_graph=True)[0])
            player.backward(loss, 1 / num)
        assert player.sums[0].dtype == (torch.float32 if num == 1 else torch.float64)
        player.finish(Phase(name="G", player="G", loss=lambda x: None), num)
        means.append((net.weight.grad, (sum(g.double() for g in grads) / num).float()))
    assert all(torch.equal(*pair) for pair in means)


def test_an_allocator_that_somebody_has_set_up_is_left_as_it_is():
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "2"})
    assert not keep_freed_memory({"LD_PRELOAD": "libjemalloc.so"})


def test_adam_moves_an_element_by_the_same_bits_wherever_it_lies():
    # engines that share parameters out cut them anywhere
    values = [torch.randn(1003, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    moved = []
    for cuts in ([1003], [3, 50, 950]):
        params = [nn.Parameter(part.clone()) for part in values[0].split(cuts)]
        optimizer = make_optimizer(params, 1e-3, (0.0, 0.99), Optimizer(lr=1e-3, betas=(0.0, 0.99)))
        for gradient in values[1:]:
            for p, part in zip(params, gradient.split(cuts)):
                p.grad = part.clone()
            optimizer.step()
        slots = [optimizer.state[p] for p in params]
        moved.append([*params, *(slot["exp_avg_sq"] for slot in slots), *(slot["exp_avg"] for slot in slots)])
    assert torch.equal(*(torch.cat([t.detach() for t in tensors]) for tensors in moved))


def test_adam_on_a_cpu_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7, 3, 3), (16,), (3,), ()]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = [make_optimizer(ours, 1e-3, (0.5, 0.99), Optimizer(eps=1e-6))]
    optimizers += [torch.optim.Adam(theirs, 1e-3, (0.5, 0.99), 1e-6, foreach=False)]
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=generator) if step != 2 or a.dim() else None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizers[0].state[a], optimizers[1].state[b], rtol=1e-6, atol=1e-8)
