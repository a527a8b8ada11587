"""Fine-tuning: networks of a fresh run start from weights that exist.

Without these tests a fine-tuning run could silently start from random weights, lose its teacher at the first step, load
the initial weights again over a resumed run, or die with a traceback on a file of another network.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, REPO, shared_dir
from tiny import make_shards, tiny_config, write_config

from sdtrain.config.load import load_config
from sdtrain.errors import WeightsError
from sdtrain.main import main
from sdtrain.plan import check_data, check_initial, make_plan, render

TINY = {"kind": "stylegan2", "channel_base": 128, "channel_max": 8}
MODEL = {
    "generator": {**TINY, "z_dim": 8, "w_dim": 8, "mapping_layers": 2},
    "discriminator": {**TINY, "mbstd_group": 2},
}
STYLE = {"model": MODEL, "adversarial": "logistic", "batch_size": 4, "ghost_batch": 2, "log_img": 4, "total_img": 8}
STYLE |= {"save_img": 8, "sd__loss": "l1", "sd__augment": False, "augment__kind": "none"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", 12)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with ADA, to start from."""
    folder = tmp_path_factory.mktemp("runs")
    slow = {"rampup": None, "half_life_img": 100}  # so that G and its average differ after two steps
    config = tiny_config(shards, **{**STYLE, "augment": {"kind": "ada", "p": 0.25, "target": None}, "ema": slow})
    assert main(["--cfg", str(write_config(folder / "first.yaml", config)), "--out", str(folder / "first")]) == 0
    return folder / "first"


def written(shards: Path, folder: Path, **changes: Any) -> Path:
    start = {"ema__rampup": None} if any(key.startswith("init") for key in changes) else {}
    return write_config(folder / "next.yaml", tiny_config(shards, **copy.deepcopy({**STYLE, **start, **changes})))


def initial(path: Path) -> Any:
    config = load_config(path)
    return check_initial(config, check_data(config))


def tensors(run: Path, role: str, img: int = 8) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"img_{img:09d}" / f"{role}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_G_D_and_the_average_start_from_a_run_and_are_written_down(shards: Path, trained: Path, tmp_path: Path) -> None:
    still = {"optimizer__G__lr": 0.0, "optimizer__D__lr": 0.0}
    path = written(shards, tmp_path, init={"source": str(trained)}, **still)
    assert main(["--cfg", str(path), "--out", str(tmp_path / "run")]) == 0
    for role in ("G", "D"):  # with rate 0 parameters stay as they were loaded
        before, after = tensors(trained, role), tensors(tmp_path / "run", role)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved <= {"mapping.w_avg"}
    G, before, after = tensors(trained, "G"), tensors(trained, "G_ema"), tensors(tmp_path / "run", "G_ema")
    learned = [name for name in before if name != "mapping.w_avg"]  # buffers are copied from G
    kept, apart = (max((a[n] - before[n]).abs().max().item() for n in learned) for a in (after, G))
    assert apart > 1e-4 and kept < apart / 100  # two steps of a half-life of 20ki
    used = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][0]["weights"]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    for role in ("G", "G_ema", "D"):
        assert len(used[f"init.{role}"]["sha256"]) == 64 and plan["init"][role] == used[f"init.{role}"]
    assert "G_ema: " + str(trained) in render(make_plan(load_config(path)))


def test_a_resumed_run_never_looks_at_the_initial_weights_again(shards: Path, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes((trained / "checkpoints" / "img_000000008" / "G.safetensors").read_bytes())
    path = written(shards, tmp_path, init={"G": str(source), "G_ema": "fresh", "D": "fresh"})
    assert main(["--cfg", str(path), "--out", str(tmp_path / "run"), "--set", "total_img=4"]) == 0
    source.unlink()
    assert main(["--cfg", str(path), "--out", str(tmp_path / "run")]) == 0
    assert main(["--cfg", str(path), "--out", str(tmp_path / "other")]) == 2  # a fresh run needs the file


def test_roles_fall_back_and_can_be_told_apart(shards: Path, trained: Path, tmp_path: Path) -> None:
    last = trained / "checkpoints" / "img_000000008"
    found = initial(written(shards, tmp_path, init={"source": str(last), "D": "fresh"}))
    assert set(found.states) == {"G", "G_ema"} and found.described["D"] == {"source": "the seed"}
    only = tmp_path / "only" / "G_ema.safetensors"
    only.parent.mkdir()
    only.write_bytes((last / "G_ema.safetensors").read_bytes())
    found = initial(written(shards, tmp_path, init={"source": str(only.parent), "D": str(last)}))
    assert same(found.states["G"], tensors(trained, "G_ema")) and same(found.states["D"], tensors(trained, "D"))
    found = initial(written(shards, tmp_path, init={"source": str(last), "G_ema": "fresh"}))
    assert same(found.states["G_ema"], tensors(trained, "G"))


def test_p_of_ADA_is_reset_or_kept(shards: Path, trained: Path, tmp_path: Path) -> None:
    ada = {"augment__kind": "ada", "augment__p": 0.0, "augment__interval": 2}
    assert initial(written(shards, tmp_path, init={"source": str(trained)}, **ada)).ada_p is None
    assert initial(written(shards, tmp_path, init={"source": str(trained), "ada_p": "keep"}, **ada)).ada_p == 0.25


def test_an_official_snapshot_starts_a_run(tmp_path: Path) -> None:
    from sdtrain.interop.official import read_official

    snapshot = GOLDEN / "sdgan" / "sg2_snapshot.pkl"
    snapshot = snapshot if snapshot.is_file() else shared_dir("golden", "sdgan", "sg2_snapshot.pkl")
    held = read_official(snapshot).networks
    assert {"D", "G_ema"} <= set(held)
    shards = make_shards(tmp_path / "shards", 12)
    model = {
        name: {**held[role].options, "kind": "stylegan2"}
        for name, role in (("generator", "G_ema"), ("discriminator", "D"))
    }
    model = json.loads(json.dumps(model))
    path = written(
        shards, tmp_path, init={"source": str(snapshot)}, model=model, data__resolution=held["G_ema"].resolution
    )
    config = load_config(path)
    from sdtrain.finetune import read_initial

    found = read_initial(config, held["G_ema"].resolution, held["G_ema"].num_classes)
    assert found is not None and all(torch.equal(v, held["D"].state[n]) for n, v in found.states["D"].items())
    assert found.described["D"]["sha256"] == held["D"].source["sha256"]
    if held["G_ema"].num_classes:
        with pytest.raises(WeightsError, match="classes, and the data has no labels; label embeddings cannot"):
            read_initial(config, held["G_ema"].resolution, 0)


def test_a_projected_discriminator_keeps_its_random_projections_from_run_to_run(shards: Path, tmp_path: Path) -> None:
    def trained_D(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        short = {"batch_size": 8, "total_img": 8, "save_img": 8, "log_img": 8}
        path = write_config(tmp_path / f"{name}.yaml", tiny_config(shards, **short, **changes))
        assert main(["--cfg", str(path), "--out", str(tmp_path / name)]) == 0
        return tensors(tmp_path / name, "D")

    first = trained_D("first")
    other_seed: dict[str, Any] = {"seed": 5, "ema": {"rampup": None}}
    tuned = trained_D("tuned", init={"source": str(tmp_path / "first")}, **other_seed)
    fresh = trained_D("fresh", **other_seed)
    projections = {name for name in first if ".scratch." in name}
    assert len(projections) == 16 and not any(".pretrained." in name for name in first)
    assert all(torch.equal(first[name], tuned[name]) for name in projections)
    assert not any(torch.equal(first[name], fresh[name]) for name in projections)


def test_the_projections_of_an_official_snapshot_are_carried_and_its_feature_network_is_not(tmp_path: Path) -> None:
    from sdtrain.contracts import Method
    from sdtrain.engine.net import LocalNet
    from sdtrain.finetune import Initial, apply_initial
    from sdtrain.interop.network import Network
    from sdtrain.models.projected.networks import Discriminator, DiscriminatorOptions

    options = {"num_discs": 2, "interpolate_to": None, "projection_width": 8, "head_width": 8}
    torch.manual_seed(1)
    official = Discriminator(DiscriminatorOptions(**options), resolution=32)  # whole: official files hold everything
    state = {n: v + 1 if ".pretrained." in n and v.is_floating_point() else v for n, v in official.state_dict().items()}
    network = Network(kind="projected", player="Discriminator", role="D", state=state, options=options, resolution=32)
    assert network.misfits() == []
    torch.manual_seed(2)
    ours = Discriminator(DiscriminatorOptions(**options), resolution=32)
    own = {n: v.clone() for n, v in ours.state_dict().items() if ".pretrained." in n}
    apply_initial(Initial({"D": state}, {}), {"D": LocalNet(ours)}, Method())
    loaded = ours.state_dict()
    assert all(torch.equal(loaded[n], state[n]) for n in state if n not in own)
    assert all(torch.equal(loaded[n], value) for n, value in own.items())
    x = torch.randn(2, 3, 32, 32)
    official.feature_network.pretrained.load_state_dict(ours.feature_network.pretrained.state_dict())
    assert torch.equal(official.eval()(x), ours.eval()(x))  # the same features: the same verdict
    without = {n: v for n, v in state.items() if ".scratch." not in n and ".pretrained." not in n}
    lacking = Network(**{**vars(network), "state": without}).misfits()
    assert any("lacks feature_network.scratch" in text for text in lacking)


def test_weights_of_another_resolution_or_with_labels_are_told_apart(
    shards: Path, trained: Path, tmp_path: Path
) -> None:
    from sdtrain.finetune import read_initial

    config = load_config(written(shards, tmp_path, init={"source": str(trained)}))
    with pytest.raises(WeightsError, match=r"synthesis\.b32.* \(it was made for 32 px, the run has 16\)"):
        read_initial(config, 16, 0)
    with pytest.raises(WeightsError, match="trained with no labels, and the data has 10 classes; label embeddings"):
        read_initial(config, 32, 10)


WRONG = {
    "a file that is absent": ({"init": {"source": "nowhere.pkl"}}, r"init\.G: .*nowhere\.pkl"),
    "another width": (
        {"init": {"source": "RUN"}, "model__generator__channel_max": 4},
        r"init\.G: .* does not fit the configured network: it has synthesis\.b4\.\S+ \[8.*, the network \[4",
    ),
    "another kind": (
        {
            "init": {"source": "RUN"}, "model__generator": {"kind": "fastgan", "ngf": 2},
            "model__discriminator": {"kind": "projected"},
        },
        r"holds a network of kind stylegan2, where model\.generator\.kind is fastgan",
    ),
    "no discriminator": (
        {"init": {"source": "RUN/checkpoints/img_000000008/G.safetensors"}},
        r"init\.D: .*or set init\.D: fresh",
    ),
    "a ramp-up that would erase the average": (
        {"init": {"source": "RUN"}, "ema__rampup": 0.05},
        r"ema\.rampup 0\.05 makes the first step copy G over the G_ema",
    ),
    "p of a run without ADA to be kept": (
        {"init": {"source": "RUN", "ada_p": "keep"}},
        r"init\.ada_p: keep needs augment\.kind: ada",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_ends_with_one_sentence_before_training(
    mistake: str, shards: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = WRONG[mistake]
    changes = json.loads(json.dumps(changes).replace("RUN", str(trained)))
    path = written(shards, tmp_path, **changes)
    for more in ([], ["--plan"]):
        assert main(["--cfg", str(path), "--out", str(tmp_path / "run"), *more]) == 2
        said = capsys.readouterr().err
        assert re.search(expected, said), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("path", sorted((REPO / "configs" / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_fine_tuning_load_and_keep_the_average(path: Path) -> None:
    config = load_config(path)
    assert config.init.source and (config.ema.rampup is None or config.ema.decay is not None)
    if "sg2" in path.stem:
        assert config.augment.kind == "ada" and config.augment.speed_img == 100_000
    twin = path.with_name(path.stem.replace("_sd_l1", "").removesuffix("_sd") + ".yaml")
    if twin != path and twin.exists():
        from sdtrain.config.compare import differences, to_tree

        keys = {d.key for d in differences(to_tree(load_config(twin)), to_tree(config))}
        assert keys <= {"name", "sd.alpha", "sd.loss", "sd.augment"}
