"""The generator behind a path - a run folder, a checkpoint folder or a weights file - and what is known of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from functools import cached_property
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
        data_free: bool = False,
    ) -> None:
        """`data`: the training set, for its classes; None = the one the run names, on this machine.

        `data_free`: no training set is opened; classes are drawn all alike and have numbers for names.

        Raises WeightsError for weights that cannot be used, ConfigError for an option this generator has not.
        """
        from sdtrain.interop.loading import load_network

        self.file = file_of(path, weights)
        network = load_network(self.file, ROLE[weights])
        if network.player != "Generator":
            raise ConfigError(f"{self.file} holds a discriminator, which makes no images; give the file of a generator")
        self.config, self._data, self._allow_pipe = config_of(self.file), data, allow_pipe
        self._has_data = not data_free and bool(data or self.config)
        net: Any = network.build()
        self.num_classes = network.num_classes
        self.class_counts = self._class_counts(label)
        if not hasattr(net, "z_dim"):
            raise ConfigError(f"{self.file} holds {network.kind}, which enlarges images; use `sdtrain upscale`")
        self.network, self.kind, self.role, self.device = network, network.kind, network.role, device
        self.resolution = network.resolution
        self.net: Any = net.to(device)
        self.seed = seed if seed is not None else self.config.seed if self.config else 0
        self.batch_size = batch_size
        self.style = self._style(truncation, truncation_cutoff)

    def choose(self, *, seed: int, label: str | None, truncation: float | None) -> None:
        """Other settings for the same network. Raises ConfigError for an option it has not."""
        self.seed, self.class_counts, self.style = seed, self._class_counts(label), self._style(truncation, None)

    @property
    def has_truncation(self) -> bool:
        return "truncation_psi" in inspect.signature(self.net.forward).parameters

    def _style(self, psi: float | None, cutoff: int | None) -> dict[str, Any]:
        if psi is None:
            return {}
        if not self.has_truncation:
            raise ConfigError(f"--truncation is for generators with a style space; {self.kind} has none, leave it out")
        return {"truncation_psi": psi, "truncation_cutoff": cutoff}

    def _class_counts(self, label: str | None) -> Sequence[int]:
        """How often each class is drawn: only `label`, as in the training set of the run, or all alike."""
        if label is not None:
            chosen = self._class_number(label)
            return [int(k == chosen) for k in range(self.num_classes)]
        if self.num_classes and self._has_data:
            return self.training_set.class_counts
        return [1] * self.num_classes

    def _class_number(self, label: str) -> int:
        """The class that a number or a name of the training set means. Raises ConfigError, naming what is near."""
        if not self.num_classes:
            raise ConfigError(f"--class {label}: {self.file} has no classes; leave it out")
        if label.isascii() and label.isdigit() and int(label) < self.num_classes:
            return int(label)
        numbers = f"the classes 0 to {self.num_classes - 1}"
        if label.lstrip("-").isdigit() or not self._has_data:
            raise ConfigError(f"--class {label}: {self.file} has {numbers}")
        names = list(self.training_set.label_names)
        if label in names:
            return names.index(label)
        near = difflib.get_close_matches(label, names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(names[:8])}"
        raise ConfigError(f"--class {label}: {self.file} has {numbers}, none of that name; {hint}")

    @cached_property
    def training_set(self) -> Any:
        """The data set that names the classes. Raises ConfigError or DataError where it cannot be had."""
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
    def label_names(self) -> list[str]:
        """Of the classes, in the training set where there is one; [] without classes."""
        if self.class_counts and self._has_data:
            return list(self.training_set.label_names)
        return [str(k) for k in range(len(self.class_counts))]

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The class of the image of each index; -1 without classes."""
        from sdtrain.sampling import draws_for, labels_for

        labels = labels_for(draws_for(indices, self.seed, "cpu"), self.class_counts)
        return [-1] * len(indices) if labels is None else labels.argmax(1).tolist()

    @property
    def has_styles(self) -> bool:
        return hasattr(self.net, "mapping") and hasattr(self.net, "synthesis")

    def codes(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(styles where there are any, else latents; one-hot labels or None) of these indices."""
        z, labels = self.latents(indices)
        return (self.styles(indices) if self.has_styles else z), labels

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
