"""The theory of the Dirac-GAN against the golden eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def dirac_gan(case: Any) -> Iterator[tuple]:
    from sdtrain.methods.dirac import method as dirac

    for number, row in enumerate(case.json):
        rates = dirac.Rates(**{name: row[name] for name in ("eta_G", "eta_D", "eta_phi", "alpha", "c")})
        found = sorted([v.real, v.imag] for v in torch.linalg.eigvals(dirac.jacobian(rates)).tolist())
        expected = sorted(row["eig"])
        # a pair of equal real parts has no order of its own: compare real and imaginary parts each in order
        for part, name in enumerate(("real", "imag")):
            ours, theirs = (sorted(value[part] for value in values) for values in (found, expected))
            yield f"{number}.eig.{name}", torch.tensor(ours), torch.tensor(theirs), 1e-7
        yield f"{number}.max_real", max(found)[0], row["max_real"], 1e-7
        polynomial = torch.tensor(dirac.characteristic_polynomial(rates))
        yield f"{number}.charpoly", polynomial, torch.tensor(row["charpoly"]), 1e-9
        margin = row["discriminant_condition_ii"]
        yield f"{number}.routh_hurwitz", dirac.routh_hurwitz_margin(rates), margin, 1e-12


ADAPTERS = {"dirac_gan.json": dirac_gan}
