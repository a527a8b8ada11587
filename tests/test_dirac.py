"""The paper's theory and the training code must tell one story. Without this file Eq. (3)-(6) could be written with a
wrong sign, or `SDGAN` could train something else than what the convergence proof is about.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPO
from PIL import Image

from sdtrain import main
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.methods.dirac import method as dirac
from sdtrain.tasks import simulation

ROWS = json.loads((GOLDEN / "sdgan" / "dirac_gan.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random_rates(number: int, seed: int = 0) -> list[dirac.Rates]:
    """Step sizes over two decades, beta from 0.9 to 0.9999, alpha from 0.01 to 4, every fourth time 0."""
    numbers = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(numbers.uniform(math.log(low), math.log(high))))

    def one(i: int) -> dirac.Rates:
        etas = {"eta_G": between(0.002, 0.2), "eta_D": between(0.002, 0.2), "eta_phi": between(1e-4, 0.1)}
        return dirac.Rates(**etas, alpha=0.0 if i % 4 == 0 else between(0.01, 4))

    return [one(i) for i in range(number)]


def configured(rates: dirac.Rates, steps: int, updates: str):
    values = {
        "optimizer.G.lr": rates.eta_G,
        "optimizer.D.lr": rates.eta_D,
        "ema.decay": 1 - rates.eta_phi,
        "simulation.alpha": rates.alpha,
        "simulation.updates": updates,
        "total_img": steps,
        "model.generator.start": 0.8,
        "model.discriminator.start": -0.5,
    }
    return load_config("dirac", [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"alpha {row['alpha']} c {row['c']}")
def test_theory_equals_the_golden_numbers(row):
    rates = dirac.Rates(**{name: row[name] for name in ("eta_G", "eta_D", "eta_phi", "alpha", "c")})
    values = torch.linalg.eigvals(dirac.jacobian(rates))
    expected = torch.tensor([complex(*pair) for pair in row["eig"]], dtype=torch.complex128)
    assert (values[:, None] - expected).abs().min(1).values.max() < 1e-8
    assert dirac.characteristic_polynomial(rates) == pytest.approx(row["charpoly"], rel=1e-12)
    assert dirac.routh_hurwitz_margin(rates) == pytest.approx(row["discriminant_condition_ii"], rel=1e-9)
    assert dirac.is_stable(rates) == (row["max_real"] < -1e-12)


def test_the_jacobian_is_the_derivative_of_the_vector_field():
    for rates in random_rates(5):
        at = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
        derivative = torch.autograd.functional.jacobian(lambda s, r=rates: torch.stack(dirac.vector_field(r, *s)), at)
        torch.testing.assert_close(dirac.jacobian(rates), derivative)


def test_the_polynomial_has_the_eigenvalues_as_roots():
    for rates in random_rates(40):
        values = torch.linalg.eigvals(dirac.jacobian(rates)).numpy()
        scale = np.abs(values).max()
        residual = np.polyval(dirac.characteristic_polynomial(rates), values)
        assert np.abs(residual).max() < 1e-9 * scale**3


def test_routh_hurwitz_and_the_eigenvalues_give_one_verdict():
    """The margin is a2 a1 - a3 a0, whatever the constants; the verdict is alpha > 0."""
    for rates in random_rates(400):
        a3, a2, a1, a0 = dirac.characteristic_polynomial(rates)
        assert dirac.routh_hurwitz_margin(rates) == pytest.approx(a2 * a1 - a3 * a0, abs=1e-12 * a2 * a1)
        assert dirac.is_stable(rates) == (rates.alpha > 0)
        # relative to the fastest mode: tiny alphas leave real parts near rounding
        values = torch.linalg.eigvals(dirac.jacobian(rates))
        assert bool(values.real.max() < -1e-13 * values.abs().max()) == (rates.alpha > 0)


def test_eigenvalues_of_small_steps_are_those_of_the_continuous_system():
    for rates in random_rates(20, seed=1):
        slow = dirac.Rates(**{k: v * 1e-5 if k.startswith("eta") else v for k, v in asdict(rates).items()})
        for updates in ("alternating", "simultaneous"):
            steps = torch.linalg.eigvals(dirac.step_matrix(slow, updates))
            flow = torch.linalg.eigvals(dirac.jacobian(slow))
            distance = ((steps - 1)[:, None] - flow).abs().min(1).values.max()
            assert distance < 1e-4 * flow.abs().max()


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_training_is_the_linear_system_of_the_paper(updates):
    """SDGAN, its losses, the engine, SGD and the average, against powers of one matrix: c, alpha, signs and order."""
    for rates in random_rates(8, seed=2):
        path = simulation.trajectory(configured(rates, 30, updates), rates.alpha)
        step, state = dirac.step_matrix(rates, updates), path[0]
        assert state.tolist() == pytest.approx([0.8, -0.5, 0.8])
        for i in range(31):
            torch.testing.assert_close(path[i], state, rtol=1e-4, atol=2e-6)
            state = step @ state


def test_simulated_outcomes_agree_with_the_theory_for_many_rates():
    """Alternating training with step sizes below the limit of gradient descent: it converges where Eq. (6) says so."""
    for rates in random_rates(300, seed=3):
        radius = dirac.spectral_radius(rates, "alternating")
        if dirac.is_stable(rates):
            assert radius < 1
        else:
            assert radius == pytest.approx(1, abs=1e-12)


def test_the_default_run_orbits_without_and_converges_with_self_distillation():
    config = load_config("dirac")
    found = [simulation.analysis(config, a, simulation.trajectory(config, a)) for a in (0.0, config.simulation.alpha)]
    assert [simulation.outcome(item) for item in found] == ["orbits", "converges"]
    assert [item["stable"] for item in found] == [False, True]
    assert found[0]["distance_end"] == pytest.approx(2**0.5, rel=0.05)
    assert found[0]["distance_end_ema"] > 1, "the average narrows the orbit but does not end it"
    assert found[1]["distance_end"] < 0.05


def test_simultaneous_steps_without_self_distillation_spiral_outwards():
    """Known of gradient descent-ascent: each step multiplies the distance by sqrt(1 + eta_G eta_D)."""
    rates = dirac.Rates(eta_G=0.1, eta_D=0.1, eta_phi=0.02, alpha=0.0)
    path = simulation.trajectory(configured(rates, 50, "simultaneous"), 0.0)
    distance = path[:, :2].norm(dim=1)
    assert float(distance[-1] / distance[0]) == pytest.approx(1.01**25, rel=1e-4)


def test_the_command_prints_the_equations_and_draws_the_figure(tmp_path, capsys):
    words = ["--cfg", "dirac", "--out", str(tmp_path / "dirac"), "--set", "total_img=200"]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "Routh-Hurwitz, Eq. (6)         a2 a1 - a3 a0 = 0: not asymptotically stable: orbits" in out
    assert "a2 a1 - a3 a0 = 5e-05: stable: converges" in out
    assert sorted(file.name for file in (tmp_path / "dirac").iterdir()) == [
        "analysis.json",
        "config.yaml",
        "figure2.png",
    ]
    with Image.open(tmp_path / "dirac" / "figure2.png") as picture:
        assert picture.width > 900
        seen = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    for name in ("green", "blue", "indigo", "orange"):
        rgb = {"green": (44, 160, 44), "blue": (31, 119, 180), "indigo": (75, 0, 130), "orange": (255, 140, 0)}[name]
        assert rgb in seen, f"the {name} curve is missing"
    panels = json.loads((tmp_path / "dirac" / "analysis.json").read_text())
    assert [panel["alpha"] for panel in panels] == [0.0, 0.4]
    assert load_config(tmp_path / "dirac" / "config.yaml").data is None


def test_the_plan_touches_nothing(tmp_path, capsys):
    assert main.main(["--cfg", "dirac", "--plan", "--out", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan of dirac: no data, no ranks; two simulations of 500 steps")
    assert "alpha 0: a2 a1 - a3 a0 = 0, not asymptotically stable" in out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ema.decay=null", "ema.decay must be a number below 1: the equations are about a constant beta, such as 0.98"),
        ("ema.decay=1.0", "ema.decay must be a number below 1: the equations are about a constant beta, such as 0.98"),
        ("optimizer.D.kind=adam", "optimizer.D.kind must be sgd: Eq. (3) is about gradient descent"),
        ("data.train=shards", "key 'data' must be null, not a section"),
        ("simulation.alpha=-1", "key 'simulation.alpha' must be a number >= 0, not -1"),
    ],
)
def test_what_the_equations_do_not_cover_is_refused(override, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config("dirac", [override])
    assert str(caught.value) == f"--set {override}: {sentence}"


def test_other_networks_are_refused(tmp_path):
    text = (REPO / "configs" / "dirac.yaml").read_text()
    (tmp_path / "d.yaml").write_text(text.replace("generator: {kind: dirac, start: 1.0}", "generator: {kind: fastgan}"))
    with pytest.raises(ConfigError, match="model.generator.kind must be dirac: the equations are about one parameter"):
        load_config(tmp_path / "d.yaml")
