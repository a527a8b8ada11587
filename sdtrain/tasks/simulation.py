"""Follow the Dirac-GAN through the training code, hold the outcome against the theory, and draw the paper's Figure 2.

    OUT/
      config.yaml     the configuration
      figure2.png     trajectories without (a) and with (b) self-distillation
      analysis.json   eigenvalues, polynomial, verdict and outcome of both

Steps go through the same phases, engine, optimizers and average as any run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtrain.data.read.stream import Batch
from sdtrain.errors import EXIT_OK
from sdtrain.files import write_bytes, write_json
from sdtrain.methods.dirac import method as dirac
from sdtrain.trainer import Trainer

if TYPE_CHECKING:
    from sdtrain.methods.dirac.options import Loaded

CPU = torch.device("cpu")
COLOURS = {"G": ("tab:green", "indigo"), "G_ema": ("tab:blue", "darkorange")}  # panels (a) and (b), as in the paper


def simulate(config: Loaded, out: Path) -> int:
    """Run both panels, print the analysis, write the files."""
    weights = (0.0, config.simulation.alpha)
    paths = [trajectory(config, alpha) for alpha in weights]
    found = [analysis(config, alpha, path) for alpha, path in zip(weights, paths)]
    print("\n\n".join(render(item) for item in found))
    write(config, out, found)
    draw(config, paths, out / "figure2.png")
    print(f"\nthe picture is {out / 'figure2.png'}")
    return EXIT_OK


def trajectory(config: Loaded, alpha: float) -> Tensor:
    """The states (theta, psi, phi) before the first and after every step, float64 [steps + 1, 3]."""
    own = dataclasses.replace(config, simulation=dataclasses.replace(config.simulation, alpha=alpha))
    trainer = Trainer(own, CPU, resolution=1)
    trainer.enter(trainer.method.stages[0])
    images = torch.zeros(config.batch_size, 1, 1, 1, dtype=torch.uint8)  # stand for the real ones, which are zero
    states = [state(trainer)]
    for step in range(config.total_img // config.batch_size):
        trainer.advance(trainer.chunks(Batch(step=step, images=images, labels=None, indices=torch.arange(len(images)))))
        states.append(state(trainer))
    return torch.tensor(states, dtype=torch.float64)


def state(trainer: Trainer) -> list[float]:
    """(theta, psi, phi)."""
    return [next(iter(trainer.nets[name].state().values())).item() for name in ("G", "D", "G_ema")]


def analysis(config: Loaded, alpha: float, path: Tensor) -> dict[str, Any]:
    """What the theory says and what came out. `path`: float64 [steps + 1, 3], as of `trajectory`."""
    rates, updates = dirac.rates_of(config, alpha), config.simulation.updates
    values = torch.linalg.eigvals(dirac.jacobian(rates))
    distance = path[:, :2].norm(dim=1)
    tenth = max(len(path) // 10, 1)
    return {
        **dataclasses.asdict(rates),
        "eigenvalues": [[v.real, v.imag] for v in values.tolist()],
        "polynomial": dirac.characteristic_polynomial(rates),
        "routh_hurwitz_margin": dirac.routh_hurwitz_margin(rates),
        "stable": dirac.is_stable(rates),
        "updates": updates,
        "spectral_radius": dirac.spectral_radius(rates, updates),
        "steps": len(path) - 1,
        "distance_start": float(distance[:tenth].max()),
        "distance_end": float(distance[-tenth:].max()),
        "distance_end_ema": float(path[-tenth:, 1:].norm(dim=1).max()),
    }


def outcome(found: dict[str, Any]) -> str:
    """Whether the simulated distance to the equilibrium fell, stayed or grew."""
    ratio = found["distance_end"] / max(found["distance_start"], 1e-300)
    return "converges" if ratio < 0.5 else "diverges" if ratio > 2 else "orbits"


def render(found: dict[str, Any]) -> str:
    """One panel for people."""
    a3, a2, a1, a0 = found["polynomial"]
    values = ", ".join(f"{re:+.5f} {im:+.5f}i" for re, im in found["eigenvalues"])
    stable = "stable: converges" if found["stable"] else "not asymptotically stable: orbits"
    radius = found["spectral_radius"]
    constants = "  ".join(f"{name} {found[name]:.4g}" for name in ("eta_G", "eta_D", "eta_phi", "c"))
    return "\n".join(
        [
            f"Dirac-GAN, alpha = {found['alpha']:g}   ({constants})",
            f"  eigenvalues of J, Eq. (4)      {values}",
            f"  characteristic polynomial (5)  {a3:g} x^3 + {a2:.4g} x^2 + {a1:.4g} x + {a0:.4g}",
            f"  Routh-Hurwitz, Eq. (6)         a2 a1 - a3 a0 = {found['routh_hurwitz_margin']:.4g}: {stable}",
            f"  {found['updates']} steps of size 1: spectral radius {radius:.6f} a step",
            f"  simulated, {found['steps']} steps          distance of (theta, psi) from the equilibrium "
            f"{found['distance_start']:.3g} -> {found['distance_end']:.3g}: {outcome(found)}",
        ]
    )


def describe(config: Loaded) -> str:
    """What `--plan` prints: the theory and the work."""
    steps = config.total_img // config.batch_size
    lines = [f"plan of {config.name}: no data, no ranks; two simulations of {steps} steps, and Figure 2 of the paper"]
    for alpha in (0.0, config.simulation.alpha):
        rates = dirac.rates_of(config, alpha)
        verdict = "stable" if dirac.is_stable(rates) else "not asymptotically stable"
        lines.append(f"  alpha {alpha:g}: a2 a1 - a3 a0 = {dirac.routh_hurwitz_margin(rates):.4g}, {verdict}")
    return "\n".join(lines)


def write(config: Loaded, out: Path, found: list[dict[str, Any]]) -> None:
    from sdtrain.config.compare import dump

    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "config.yaml", dump(config).encode())
    rows = [{**item, "outcome": outcome(item)} for item in found]
    write_json(out / "analysis.json", rows)


def draw(config: Loaded, paths: list[Tensor], file: Path) -> None:
    """Figure 2: theta across, psi up; (b) with the gradient vector field at the final theta_EMA.

    `paths`: one of `trajectory` [steps + 1, 3] for each panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    reach = 1.12 * float(torch.cat(paths).abs().max())
    titles = ("(a) standard GAN", rf"(b) self-distillation, $\alpha = {config.simulation.alpha:g}$")
    for panel, (ax, path) in enumerate(zip(axes, paths)):
        if panel == 1:
            field(config, ax, path[-1, 2], reach)
        curves(ax, path, panel)
        ax.set(
            title=titles[panel],
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            xlabel=r"generator $\theta$",
            aspect="equal",
        )
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    axes[0].set_ylabel(r"discriminator $\psi$")
    FigureCanvasAgg(figure).print_png(str(file), pil_kwargs={"compress_level": 9})


def curves(ax: Any, path: Tensor, panel: int) -> None:
    """The paths [steps + 1, 3] of (theta, psi) and (theta_EMA, psi), their start, and the equilibrium."""
    names = {"G": r"$\theta$", "G_ema": r"$\theta_{\mathrm{EMA}}$"}
    for net, column in (("G", 0), ("G_ema", 2)):
        ax.plot(path[:, column], path[:, 1], color=COLOURS[net][panel], linewidth=1.4, label=names[net], zorder=3)
    ax.plot(path[0, 0], path[0, 1], "o", color="black", markersize=5, label="start", zorder=4)
    ax.plot(0, 0, "*", color="crimson", markersize=12, label="equilibrium", zorder=5)


def field(config: Loaded, ax: Any, phi: Tensor, reach: float) -> None:
    """Eq. (3) in the plane (theta, psi) where theta_EMA = phi, a scalar.

    Arrows of equal length, darker where it is stronger.
    """
    line = torch.linspace(-reach, reach, 17, dtype=torch.float64)
    theta, psi = torch.meshgrid(line, line, indexing="xy")
    rates = dirac.rates_of(config, config.simulation.alpha)
    d_theta, d_psi, _ = dirac.vector_field(rates, theta, psi, phi)
    size = torch.hypot(d_theta, d_psi).clamp_min(1e-12)
    arrows = {
        "cmap": "Greys",
        "clim": (-float(size.max()) / 2, float(size.max()) * 1.5),
        "pivot": "mid",
        "width": 0.0035,
    }
    ax.quiver(theta, psi, d_theta / size, d_psi / size, size, scale=26, zorder=1, **arrows)
