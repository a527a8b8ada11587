"""The Dirac-GAN of the SD-GAN paper, Sec. 3: theory, Eq. (3)-(6), and SD-GAN on two numbers.

Real images are zero, G(z) = theta, D(x) = psi * x, and phi is the EMA of theta. The state is (theta, psi, phi) and its
only equilibrium is zero. L_adv = c * psi * theta; the losses of `SDGAN` with f = identity are -D(G(z)) for G and
D(G(z)) - D(0) for D, so c = -1. Continuous-time rates are the step sizes eta_G and eta_D, and eta_phi = 1 - beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Net
from sdtrain.methods.sdgan.method import SDGAN
from sdtrain.rng import Draws

if TYPE_CHECKING:
    from sdtrain.methods.dirac.options import Loaded

C = -1.0  # f'(0) of the losses above


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The constants of Eq. (3)."""

    eta_G: float
    eta_D: float
    eta_phi: float  # 1 - beta
    alpha: float
    c: float = C


def rates_of(config: Loaded, alpha: float) -> Rates:
    lr_G, lr_D, beta = config.optimizer.G.lr, config.optimizer.D.lr, config.ema.decay
    assert isinstance(lr_G, float) and isinstance(lr_D, float) and beta is not None  # `problems` came first
    return Rates(eta_G=lr_G, eta_D=lr_D, eta_phi=1 - beta, alpha=alpha)


def vector_field(r: Rates, theta: Tensor, psi: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (3): (d theta/dt, d psi/dt, d phi/dt) for scalars, or for shapes [...] that broadcast."""
    d_theta = -r.eta_G * (r.c * psi + r.alpha * (theta - phi))
    return d_theta, r.eta_D * r.c * theta, r.eta_phi * (theta - phi)


def jacobian(r: Rates) -> Tensor:
    """Eq. (4): J of the state (theta, psi, phi), float64 [3, 3]."""
    rows = [
        [-r.eta_G * r.alpha, -r.eta_G * r.c, r.eta_G * r.alpha],
        [r.eta_D * r.c, 0.0, 0.0],
        [r.eta_phi, 0.0, -r.eta_phi],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def characteristic_polynomial(r: Rates) -> tuple[float, float, float, float]:
    """Eq. (5): (a3, a2, a1, a0) of det(lambda I - J)."""
    loop = r.eta_D * r.eta_G * r.c**2
    return 1.0, r.eta_G * r.alpha + r.eta_phi, loop, loop * r.eta_phi


def routh_hurwitz_margin(r: Rates) -> float:
    """Eq. (6), condition (ii): a2 a1 - a3 a0 = eta_D eta_G^2 c^2 alpha."""
    return r.eta_D * r.eta_G**2 * r.c**2 * r.alpha


def is_stable(r: Rates) -> bool:
    """Eq. (6), conditions (i) and (ii): all eigenvalues of J have negative real parts."""
    return all(a > 0 for a in characteristic_polynomial(r)) and routh_hurwitz_margin(r) > 0


def step_matrix(r: Rates, updates: str) -> Tensor:
    """One training step as a linear map of (theta, psi, phi): Eq. (3) in steps of time 1, float64 [3, 3].

    phi follows the new theta, Eq. (1); with alternating updates psi sees the new theta too.
    """
    new_theta = torch.tensor([1 - r.eta_G * r.alpha, -r.eta_G * r.c, r.eta_G * r.alpha], dtype=torch.float64)
    theta, psi, phi = torch.eye(3, dtype=torch.float64)
    seen = new_theta if updates == "alternating" else theta
    return torch.stack([new_theta, psi + r.eta_D * r.c * seen, (1 - r.eta_phi) * phi + r.eta_phi * new_theta])


def spectral_radius(r: Rates, updates: str) -> float:
    """Below 1, training with these step sizes converges."""
    return float(torch.linalg.eigvals(step_matrix(r, updates)).abs().max())


def half_square(x: Tensor, target: Tensor) -> Tensor:
    """L_SD of the Dirac-GAN: 1/2 (theta - phi)^2, [N, 1, 1, 1] twice -> [N]."""
    return 0.5 * (x - target.detach()).square().flatten(1).sum(1)


class Dirac(SDGAN):
    """SD-GAN as it is, with the smallest players; only real images and simultaneous updates are its own."""

    def __init__(self, *parts: Any, simultaneous: bool = False, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.simultaneous = simultaneous
        self.made: dict[tuple[int, ...], Tensor] = {}  # what G made before it moved, by ghosts

    def to_range(self, images: Tensor) -> Tensor:
        """Real images are zero, [N, 1, 1, 1]."""
        return torch.zeros(len(images), 1, 1, 1)

    def generate(self, G: Net, x: Chunk, draws: Draws, teacher: bool = False) -> Tensor:
        """With simultaneous updates D sees G where it was before its step: [num_samples, 1, 1, 1]."""
        ghosts = tuple(x.draws.ghosts)
        if ghosts in self.made and not teacher:
            return self.made.pop(ghosts)
        fake = super().generate(G, x, draws, teacher)
        if self.simultaneous and not teacher:
            self.made[ghosts] = fake.detach().clone()  # it is theta itself, which is about to move
        return fake
