"""The generator behind a path - a run folder, a checkpoint folder or a weights file - and what is known of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.config.words import is_address
from sdtrain.errors import ConfigError
from sdtrain.files import read_json
from sdtrain.terminal import clip

if TYPE_CHECKING:
    from torch import Tensor

ROLE = {"ema": None, "raw": "G"}  # None: the average where there is one


def run_folder_of(path: Path) -> Path | None:
    """The folder with config.yaml that `path` is, or lies in (at most three levels down)."""
    near = [path.resolve(), *path.resolve().parents[:3]]
    return next((folder for folder in near if (folder / "config.yaml").is_file()), None)


def config_of(path: Path) -> Any:
    """The configuration of the run that `path` belongs to; None outside a run. Torch is not imported."""
    from sdtrain.config.load import load_written

    folder = run_folder_of(path)
    return None if folder is None else load_written(folder / "config.yaml")


def of_run(source: Any, option: str) -> Any:
    """Images that a run's own config.yaml names, as they are; `option` is where they could be typed instead.

    Raises ConfigError for an address or a command: a run folder may come from anyone.
    """
    found = next((one for one in (source if isinstance(source, list) else [source]) if is_address(one)), None)
    if found:
        raise ConfigError(
            f"the config.yaml of this run names the address or command '{clip(found)}', and a run folder may come from "
            f"anyone, so nothing is fetched or run for it; type it yourself: {option} SOURCE"
        )
    return source


def file_of(path: Path, weights: str) -> Path:
    """`path` itself, or the file of a folder's average (`weights` ema) or generator (raw). Raises WeightsError."""
    from sdtrain.interop.loading import file_of_run

    return file_of_run(path, ROLE[weights]) if path.is_dir() else path


class Source:
    """The generator of a run, checkpoint or file, with the settings of one command."""

    def __init__(
        self,
        path: Path,
        device: Any,
        *,
        seed: int | None = None,
        weights: str = "ema",
        label: str | None = None,
        truncation: float | None = None,
        truncation_cutoff: int | None = None,
        batch_size: int = 32,
        data: str | None = None,
        allow_pipe: bool = False,
    ) -> None:
        """`data`: the training set, for its classes; None = the one the run names, on this machine.

        Raises WeightsError for weights that cannot be used, ConfigError for an option this generator has not.
        """
        from sdtrain.interop.loading import load_network

        self.file = file_of(path, weights)
        network = load_network(self.file, ROLE[weights])
        if network.player != "Generator":
            raise ConfigError(f"{self.file} holds a discriminator, which makes no images; give the file of a generator")
        self.config, self._data, self._allow_pipe = config_of(self.file), data, allow_pipe
        net: Any = network.build()
        self.class_counts = self._class_counts(network.num_classes, label)
        if not hasattr(net, "z_dim"):
            raise ConfigError(f"{self.file} holds {network.kind}, which enlarges images; use `sdtrain upscale`")
        self.network, self.kind, self.role, self.device = network, network.kind, network.role, device
        self.net: Any = net.to(device)
        self.seed = seed if seed is not None else self.config.seed if self.config else 0
        self.batch_size = batch_size
        self.style = self._style(truncation, truncation_cutoff)

    def _style(self, psi: float | None, cutoff: int | None) -> dict[str, Any]:
        if psi is None:
            return {}
        if "truncation_psi" not in inspect.signature(self.net.forward).parameters:
            raise ConfigError(f"--truncation is for generators with a style space; {self.kind} has none, leave it out")
        return {"truncation_psi": psi, "truncation_cutoff": cutoff}

    def _class_counts(self, num_classes: int, label: str | None) -> Sequence[int]:
        """How often each class is drawn: only `label`, as in the training set of the run, or all alike."""
        if label is not None:
            chosen = self._class_number(label, num_classes)
            return [int(k == chosen) for k in range(num_classes)]
        if num_classes and (self._data or self.config is not None):
            return self._training_set().class_counts
        return [1] * num_classes

    def _class_number(self, label: str, num_classes: int) -> int:
        """The class that a number or a name of the training set means. Raises ConfigError, naming what is near."""
        if not num_classes:
            raise ConfigError(f"--class {label}: {self.file} has no classes; leave it out")
        if label.isascii() and label.isdigit() and int(label) < num_classes:
            return int(label)
        numbers = f"the classes 0 to {num_classes - 1}"
        if label.lstrip("-").isdigit() or not (self._data or self.config):
            raise ConfigError(f"--class {label}: {self.file} has {numbers}")
        names = list(self._training_set().label_names)
        if label in names:
            return names.index(label)
        near = difflib.get_close_matches(label, names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(names[:8])}"
        raise ConfigError(f"--class {label}: {self.file} has {numbers}, none of that name; {hint}")

    def _training_set(self) -> Any:
        from sdtrain.data.read.dataset import open_dataset

        if self._data:
            return open_dataset(self._data, allow_pipe=self._allow_pipe)
        return open_dataset(of_run(self.config.data.train, "--data"), keep_index=False)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """uint8 images [N, 3, R, R] on the CPU."""
        from sdtrain.sampling import sampler

        more = {"class_counts": self.class_counts, "device": self.device, "batch_size": self.batch_size, **self.style}
        return sampler(self.net, seed=self.seed, **more)(indices)

    def latents(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(z [N, z_dim], one-hot labels or None) of these indices, as `__call__` uses them."""
        from sdtrain.sampling import draws_for, labels_for

        draws = draws_for(indices, self.seed, self.device)
        return draws.normal("z", self.net.z_dim), labels_for(draws, self.class_counts)

    @property
    def has_styles(self) -> bool:
        return hasattr(self.net, "mapping") and hasattr(self.net, "synthesis")

    def styles(self, indices: Sequence[int]) -> Tensor:
        """w of every layer [N, num_ws, w_dim], truncated as asked."""
        import torch

        with torch.no_grad():
            return self.net.mapping(*self.latents(indices), **self.style)

    def draw(self, codes: Tensor, labels: Tensor | None, noise_of: int) -> Tensor:
        """uint8 images of styles [N, num_ws, w_dim] or latents [N, z_dim], all with the layer noise of one index."""
        import torch

        from sdtrain.sampling import draws_for, to_uint8

        made = []
        for first in range(0, len(codes), self.batch_size):
            part = slice(first, first + self.batch_size)
            noise = draws_for([noise_of] * len(codes[part]), self.seed, self.device).sub("noise")
            with torch.no_grad():
                if codes.ndim == 3:
                    images = self.net.synthesis(codes[part], noise)
                else:
                    images = self.net(codes[part], None if labels is None else labels[part], noise)
            made.append(to_uint8(images).cpu())
        return torch.cat(made)


def position_of(file: Path) -> dict[str, int]:
    """{'seen_img': images seen} of the weights of a run; {} where nothing says so."""
    for name in ("state.json", "metrics.json"):
        try:
            seen_img = read_json(file.parent / name)["seen_img"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(seen_img, int):
            return {"seen_img": seen_img}
    return {}
