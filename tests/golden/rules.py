"""How golden folders leave numbers out: inputs and weights that both sides derive from a seed, and tolerances.

Two conventions exist and a manifest says which one it follows. `rnd_rule`/`fill_rule` name every tensor and seed by its
name; `procedural(seed)` counts the sorted keys. Tolerances are `tol` (relative to the largest reference value) or
`rtol`/`atol`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# leaves that no fill rule touches
KEPT_LEAVES = {
    "common": ("resample_filter", "num_batches_tracked"),
    "sg2": (),
    "pg": (),
    "r3_G": ("Kernel",),
    "r3_D": ("Kernel",),
    "snat": ("_float_tensor", "relative_position_index", "kernel", "ll", "lh", "hl", "hh"),
}
POWER_ITERATIONS = 20


def normal(seed: int | str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers (float64) that depend on seed and key alone."""
    state = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()) & 0xFFFFFFFF)
    return np.asarray(state.standard_normal(shape))


def rnd(key: str, *shape: int, scale: float = 1.0, seed: int) -> Tensor:
    """`rnd_rule` of the manifest: an input tensor known by its name."""
    return torch.from_numpy((normal(seed, key, shape) * scale).astype(np.float32))


def base_seed(manifest: Mapping) -> int:
    """The seed of `rnd` inputs, from the field `base_seed` or from the text of `rnd_rule`."""
    if "base_seed" in manifest:
        return int(manifest["base_seed"])
    found = re.search(r"base_seed\s*=\s*(\d+)", manifest.get("rnd_rule", ""))
    if not found:
        raise ValueError("the manifest names no base_seed")
    return int(found.group(1))


def number(text: str, name: str) -> float:
    """The number that a manifest text gives to a name: `alpha=.3`, `seed(3)`, `group 4` or `up2`.

    `name` is a regular expression. Raises ValueError where the text has none.
    """
    found = re.search(rf"(?<![A-Za-z]){name}\s*[=(]?\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", text)
    if not found:
        raise ValueError(f"{text!r} gives no number to {name!r}")
    return float(found.group(1))


def rnd_in_text(text: str, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Every `0.5*rnd('key',1,3,8,res)` written in a manifest text, by key; `sizes` are the words among the sizes."""
    found = {}
    for scale, key, rest in re.findall(r"(?:([\d.]+)\s*\*\s*)?rnd\(\s*['\"]([^'\"]+)['\"]\s*((?:,[^()]*)?)\)", text):
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        shape = [(sizes or {}).get(part) or int(part) for part in parts if "=" not in part]
        named = dict(part.split("=", 1) for part in parts if "=" in part)
        own_seed = _integer(named["seed"]) if "seed" in named else seed
        factor = float(scale or 1.0) * float(named.get("scale", 1.0))
        found[key] = rnd(key, *shape, scale=factor, seed=own_seed)
    return found


def _integer(text: str) -> int:
    """'1100-100' -> 1000: seeds are written as sums."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", text.replace(" ", "")))


def fill(state: Mapping[str, Tensor], seed: int, family: str) -> dict[str, Tensor]:
    """`fill_rule`: the state dict a golden was made with. `family` is a key of KEPT_LEAVES; returns new tensors."""
    kept = KEPT_LEAVES["common"] + KEPT_LEAVES[family]
    done = dict(state)
    for key, value in state.items():
        leaf = key.rpartition(".")[2]
        if leaf in kept or not value.is_floating_point() or leaf in ("weight_u", "weight_v"):
            continue
        x = normal(seed, key, tuple(value.shape))
        done[key] = torch.from_numpy(np.asarray(_filled(family, key, leaf, x)).astype(np.float32)).reshape(value.shape)
    for key in [key for key in state if key.endswith("weight_u")]:
        stem = key[: -len("weight_u")]
        weight = done[stem + "weight_orig"]
        transposed = stem.endswith("init.init.0.")  # the one ConvTranspose: its outputs are dimension 1
        matrix = (weight.transpose(0, 1) if transposed else weight).flatten(1)
        done[key], done[stem + "weight_v"] = _power(normal(seed, key, tuple(state[key].shape)), matrix)
    return done


def _filled(family: str, key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if leaf == "running_var":
        return 1 + 0.25 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    rule = {"sg2": _filled_sg2, "pg": _filled_pg, "snat": _filled_snat, "r3_G": _filled_r3_G, "r3_D": _filled_r3_D}
    return rule[family](key, leaf, x)


def _filled_sg2(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    in_mapping = key.startswith("mapping.fc")
    if leaf == "bias":
        return 1 + 0.1 * x if ".affine." in key else (10 if in_mapping else 0.1) * x
    scale = {"weight": 100 if in_mapping else 1, "noise_strength": 0.1, "w_avg": 0.3}
    return scale.get(leaf, 1) * x


def _filled_pg(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if x.ndim >= 2:
        return x * math.sqrt(2 / math.prod(x.shape[1:]))
    return 1 + 0.1 * x if leaf in ("weight", "gain") else 0.1 * x


def _filled_r3_G(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if leaf == "Bias":
        return 0.2 * x
    if leaf == "Basis" or key == "Model.EmbeddingLayer.weight":
        return x
    return x * (0.5 if ".LinearLayer3." in key else 1.2) / math.sqrt(math.prod(x.shape[1:]))


def _filled_r3_D(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(len(x)) if key == "Model.EmbeddingLayer.weight" else _filled_r3_G(key, leaf, x)


def _filled_snat(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if key.startswith("style.") and leaf in ("weight", "bias"):
        return {"weight": 100, "bias": 10}[leaf] * x
    if ".style." in key and leaf in ("weight", "bias"):
        return {"weight": 1, "bias": 0.1}[leaf] * x
    if leaf == "input":
        return x
    if ".rpb" in key or leaf == "alpha":
        return 0.5 * x
    if x.ndim >= 2 and leaf != "bias":
        return x * math.sqrt(1 / math.prod(x.shape[1:]))
    return 1 + 0.1 * x if leaf == "weight" else 0.1 * x


def _power(u: np.ndarray, weight: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of spectral norm of a matrix [outputs, rest] after many float64 power iterations."""
    matrix = weight.double().numpy()
    u = u / np.linalg.norm(u)
    for _ in range(POWER_ITERATIONS):
        v = matrix.T @ u
        v = v / np.linalg.norm(v)
        u = matrix @ v
        u = u / np.linalg.norm(u)
    return torch.from_numpy(u.astype(np.float32)), torch.from_numpy(v.astype(np.float32))


def procedural(state: Mapping[str, Tensor], rule: str) -> dict[str, Tensor]:
    """The `weights` text of an entry, e.g. 'procedural(1234), gain=0.7' or '... equalised ...', applied to a state."""
    seed_text, gain_text = re.search(r"procedural\((\d+)\)", rule), re.search(r"gain\s*=\s*(sqrt\()?([\d.]+)", rule)
    if not seed_text:
        raise ValueError(f"no procedural(seed) in {rule!r}")
    equalised = "equalised" in rule or gain_text is None
    gain = 1.0 if gain_text is None else float(gain_text.group(2).rstrip("."))
    gain = math.sqrt(gain) if gain_text is not None and gain_text.group(1) else gain
    done = dict(state)
    for k, key in enumerate(sorted(key for key in state if state[key].is_floating_point())):
        shape = tuple(state[key].shape)
        r = np.random.RandomState(int(seed_text.group(1)) + k).standard_normal(math.prod(shape))
        r = r.astype(np.float32).reshape(shape)
        if len(shape) < 2:
            r = r * np.float32(0.1)
        elif not equalised and len(shape) < 5:
            r = r * np.float32(gain * math.sqrt(1 / math.prod(shape[1:])))
        done[key] = torch.from_numpy(r)
    return done


def limit(entry: Mapping, reference: Tensor) -> float:
    """The largest allowed |got - reference| for one output of a file with this manifest entry."""
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    if "tol" in entry:
        return float(entry["tol"]["max_abs_diff_over_max_abs_ref"]) * largest
    if "rtol" in entry or "atol" in entry:
        return float(entry.get("atol", 0.0)) + float(entry.get("rtol", 0.0)) * largest
    return 0.0


def norm_limit(manifest: Mapping, norm: float) -> float:
    """The allowed deviation of a gradient norm or sum, given the norm ('relative 2e-3 of the norm')."""
    found = re.search(r"relative\s+([\d.e+-]+)\s+of the norm", str(manifest.get("tolerance", "")))
    return (float(found.group(1)) if found else 0.0) * abs(norm)
