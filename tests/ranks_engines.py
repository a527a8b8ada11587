"""Run by torchrun on two ranks: every engine against ddp on one small game, tensor by tensor; see test_engines.py."""

from __future__ import annotations

import gc
import importlib.util
import sys
from typing import Any

import torch
import torch.distributed as dist
from test_engine import CPU, Small, chunks, phase
from torch import nn

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Chunk, Phase, Stage
from sdtrain.engine import ranks
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.ema import freeze
from sdtrain.engine.fsdp import Fsdp, ShardedNet
from sdtrain.engine.phases import NonFinite, Sharing
from sdtrain.engine.zero import Zero
from sdtrain.exits import part
from sdtrain.models.ghost import set_ghost_batch
from sdtrain.models.recompute import recompute

STAGE = Stage(name="main", end_img=100, players={"G": ("G",), "D": ("D",)}, averages={"G_ema": "G"})
ENGINES: dict[str, tuple[type, Sharing]] = {
    "ddp": (Ddp, Sharing()),
    "fsdp2": (Fsdp, Sharing(name="fsdp2")),
    "fsdp2, teacher too": (Fsdp, Sharing(name="fsdp2", teacher=True)),
    "hsdp in pairs": (Fsdp, Sharing(name="hsdp", ranks=2)),
    "hsdp alone": (Fsdp, Sharing(name="hsdp", ranks=1)),
}
if importlib.util.find_spec("deepspeed"):
    ENGINES |= {f"zero{stage}": (Zero, Sharing(name=f"zero{stage}", stage=stage)) for stage in (1, 2)}
    ENGINES["zero2, offloaded"] = (Zero, Sharing(name="zero2", stage=2, offload=True))


class Styled(nn.Module):
    """A block that uses one of its inputs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.more = (nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        scale, shift, more = (layer(style)[:, :, None, None] for layer in (self.scale, self.shift, self.more))
        return x * (1 + 0.1 * scale) + 0.1 * shift + 0.1 * more.sin()


class Uneven(Small):
    """Beside `Small`: rows that two ranks cannot share equally, a single row, a scalar, and a style of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 3, 1)
        self.one, self.strength = nn.Parameter(torch.ones(1, 3, 1, 1)), nn.Parameter(torch.tensor(0.5))
        self.style, self.first, self.second = nn.Linear(3, 5), Styled(), Styled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        style = self.style(x.mean((2, 3)))
        mixed = self.mix(super().forward(x)) * self.one + self.strength
        return self.second(self.first(mixed, style), style)


BLOCKS = ("conv", "norm", "first", "second")


def game(name: str, exact: bool, clip: float = 0.0, again: bool = False, **more: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    kind, sharing = ENGINES[name]
    adam = Optimizer(lr=1e-3, clip_norm=clip)
    engine = kind(CPU, {"G": adam, "D": adam}, exact=exact, sharing=sharing, **more)
    modules = {n: recompute(Uneven().train(), BLOCKS if again else ()) for n in ("G", "D")}
    nets = {n: engine.net(module) for n, module in modules.items()}
    torch.manual_seed(1)
    nets["G_ema"] = engine.net(freeze(Uneven()), trained=False)
    for net in nets.values():
        set_ghost_batch(net.module, 2)
    engine.begin(STAGE, 0, nets, {})
    return engine, nets


def mine() -> list[Any]:
    return chunks(1)[dist.get_rank() * 2 :][:2]  # two ghosts of four


def everything(engine: Any, nets: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"{n}.{k}": v.clone() for n, net in nets.items() for k, v in net.state().items()}
    return found | {f"{n}/{k}": v.clone() for n, p in engine.players.items() for k, v in p.state().items()}


def one_step_of_one_player(engine: Any, nets: dict[str, Any], own: str, other: str) -> None:
    """A phase of three terms moves all of its player by one optimizer step, and nobody else asks for a gradient."""
    before, plain = everything(engine, nets), phase(nets, own)

    def loss(x: Chunk) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = plain.loss(x)
        assert all(p.requires_grad for p in engine.players[own].leaves)
        assert not any(p.requires_grad or p.grad is not None for p in nets[other].module.parameters())
        return found

    assert len(engine.run(Phase(name=own, player=own, loss=loss), mine())) == 4  # and their sum
    after = everything(engine, nets)
    moved = {k for k in after if k not in before or not torch.equal(after[k], before[k])}
    strange = {k for k in moved if not k.startswith((f"{own}.", f"{own}/"))}
    assert all("norm." in k or "weight_" in k for k in strange), strange  # pass state of whoever was called
    assert {f"{own}.{k}" for k in ("conv.weight_orig", "mix.weight", "one", "strength", "style.weight")} <= moved
    counts = {k: float(after[k]) - float(before.get(k, 0)) for k in after if k.endswith("/step")}
    assert {count for k, count in counts.items() if k.startswith(f"{own}/")} == {1.0}
    assert not any(count for k, count in counts.items() if k.startswith(f"{other}/"))
    assert all(p.grad is None for net in nets.values() for p in net.module.parameters())
    assert all(p.requires_grad for n in ("G", "D") for p in nets[n].module.parameters())


def played(name: str, exact: bool, clip: float, again: bool = False) -> dict[str, torch.Tensor]:
    """Three rounds of G and D; in the first, what must hold of every single phase is looked at."""
    engine, nets = game(name, exact, clip, again)
    one_step_of_one_player(engine, nets, "G", "D")
    one_step_of_one_player(engine, nets, "D", "G")
    for _ in range(2):
        engine.run(phase(nets), mine())
        engine.run(phase(nets, "D"), mine())
        nets["G_ema"].follow(nets["G"], 0.9)
    with nets["G_ema"].whole() as whole:
        assert not any(p.requires_grad for p in whole.parameters()) and not whole.training
        assert type(whole) is Uneven  # an FSDP module would talk to the other ranks
        images = whole(chunks(4)[0].real)
    result = everything(engine, nets) | {"images": images}
    reloaded(name, exact, clip, result)
    for player in engine.players.values():
        player.close()
    return result


def reloaded(name: str, exact: bool, clip: float, result: dict[str, torch.Tensor]) -> None:
    """Loading what was saved gives it back."""
    engine, nets = game(name, exact, clip)
    for n, net in nets.items():
        net.load({k.removeprefix(f"{n}."): v for k, v in result.items() if k.startswith(f"{n}.")}, n)
    for n, player in engine.players.items():
        player.load_state({k.removeprefix(f"{n}/"): v for k, v in result.items() if k.startswith(f"{n}/")})
    back = everything(engine, nets)
    assert all(torch.equal(back[k], result[k]) for k in back), [k for k in back if not torch.equal(back[k], result[k])]
    assert back.keys() | {"images"} == result.keys()
    for player in engine.players.values():
        player.close()


def sizes() -> None:
    """A sharded network holds about half of what it has, and says how much it has."""
    _, nets = game("fsdp2", True)
    net = nets["G"]
    assert isinstance(net, ShardedNet)
    held = torch.tensor([sum(p.numel() for p in net.parameters().values())])
    dist.all_reduce(held)
    whole = sum(p.numel() for p in Uneven().parameters())
    assert net.size() == net.size(trained=True) == whole and int(held) == whole + 1  # the scalar is on both


def poisoned(nets: dict[str, Any]) -> Phase:
    """A phase whose gradient is not finite in what one rank saw."""
    plain = phase(nets)

    def loss(x: Chunk) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found, terms = plain.loss(x)
        return found * (torch.nan if dist.get_rank() == 1 else 1.0), terms

    return Phase(name="G", player="G", loss=loss)


def nonfinite() -> None:
    """Nobody moves where a gradient is not finite, and the next phase is as if that one had not been there.

    Clamped, all engines repair and count the same elements.
    """
    counts = set()
    for name in ENGINES:
        engine, nets = game(name, True)
        before = everything(engine, nets)
        try:
            engine.run(poisoned(nets), mine())
            raise AssertionError(f"{name} took a step")
        except NonFinite:
            after = everything(engine, nets)
            assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), name
        fresh, its = game(name, True)
        for one, own in ((engine, nets), (fresh, its)):
            one.run(phase(own), mine())
        after, wanted = everything(engine, nets), everything(fresh, its)
        assert wanted.keys() == after.keys() and all(torch.equal(wanted[k], after[k]) for k in wanted), name
        clamping, nets = game(name, True, clamp=True)
        counts.add(int(clamping.run(poisoned(nets), mine())["G/clamped"]))
        for player in (*engine.players.values(), *fresh.players.values(), *clamping.players.values()):
            player.close()
    assert counts == {sum(p.numel() for p in Uneven().parameters())}, counts


def outlived() -> None:
    """Engines of a stage that is over may be collected at any time: the moments of the present one stay."""
    for name in ENGINES:
        engine, nets = game(name, True)
        earlier = list(engine.players.values())
        engine.begin(STAGE, 0, nets, {})
        engine.run(phase(nets), mine())
        before = everything(engine, nets)
        assert before["G/conv.weight_orig/exp_avg"].any() and earlier[0] is not engine.players["G"]
        earlier.clear()
        gc.collect()
        after = everything(engine, nets)
        assert all(torch.equal(before[k], after[k]) for k in before), name
        for player in engine.players.values():
            player.close()


def copies() -> None:
    """An average that has gone its own way on one rank is noticed by all."""
    for name in ("ddp", "fsdp2", "fsdp2, teacher too"):
        engine, nets = game(name, True)
        engine.check_copies(nets)
        if dist.get_rank() == 1:
            nets["G_ema"].copied()["strength"].data.add_(1e-6)
        try:
            engine.check_copies(nets)
            raise AssertionError("not noticed")
        except RuntimeError as problem:
            assert str(problem).startswith("ranks hold different copies of G_ema: strength"), problem


def two_backends() -> None:
    """A group as ranks with GPUs have, but for the GPUs: what lies on the host goes over gloo, under every engine."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group(ranks.BACKENDS["cuda"].replace("nccl", "fake"))
    assert ranks.backends() == "cpu:gloo,cuda:fake" and dist.get_world_size() == 2
    rows = torch.full((3,), float(dist.get_rank() + 1), dtype=torch.float64)  # as numbers for a histogram
    ranks.sum_over_ranks([rows])
    assert rows.tolist() == [3.0] * 3 and ranks.agree_max(dist.get_rank()) == 1
    assert ranks.gather_objects({"rank": dist.get_rank()}) == [{"rank": 0}, {"rank": 1}]
    ranks.barrier()
    wanted = played("ddp", True, 0.0)
    for name in list(ENGINES)[1:]:
        found = played(name, True, 0.0)
        assert all(torch.equal(found[k], v) for k, v in wanted.items()), name
    print("two backends served")


def main() -> None:
    ranks.start_ranks("cpu")
    assert dist.get_world_size() == 2
    sizes()
    copies()
    nonfinite()
    outlived()
    for exact, clip in ((True, 0.0), (True, 0.1), (False, 0.0)):
        wanted = played("ddp", exact, clip)
        for name, again in [*((name, False) for name in list(ENGINES)[1:]), *((name, True) for name in ENGINES)]:
            found = played(name, exact, clip, again)
            assert found.keys() == wanted.keys()
            apart = {k: float((found[k].double() - v.double()).abs().max()) for k, v in wanted.items()}
            if dist.get_rank() == 0:
                how = f"{'exact' if exact else 'fast'}, clip {clip}{', recomputing' if again else ''}"
                print(f"{name}, {how}: {max(apart.values()):.1e} from ddp")
            limit = 0.0 if exact else 1e-6
            assert max(apart.values()) <= limit, {k: a for k, a in apart.items() if a > limit}


if __name__ == "__main__":
    two_backends() if sys.argv[1:] else main()
    part(0)
