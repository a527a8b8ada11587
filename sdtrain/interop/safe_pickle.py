"""Official checkpoint files as plain data, without running anything they contain.

`read_checkpoint` takes what torch.save and pickle.dump wrote: StyleGAN2-ADA and ProjectedGAN .pkl (tensors are torch
blobs inside the pickle), StyleNAT .pt and Real-ESRGAN .pth (zip or the older torch container). Modules become
`Record`s; source text embedded by StyleGAN2-ADA is dropped unread. Every global a file may name stands in this module;
any other is a WeightsError with its name.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.budget import Budget, is_name, open_weights, refuse
from sdtrain.interop.pickle_machine import Machine, Record, Token, attributes_of, checked_key
from sdtrain.interop.storages import LegacyReader, ZipReader, begins_legacy, storage_token, view_of

MAX_DEPTH = 64

# numpy scalars that official code leaves in attributes, by dtype code
SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}

R3GAN = (
    "Generator GeneratorStage GenerativeBasis Discriminator DiscriminatorStage DiscriminativeBasis ResidualBlock "
    "UpsampleLayer DownsampleLayer Convolution InterpolativeUpsamplerCUDA InterpolativeDownsamplerCUDA "
    "BiasedActivationCUDA"
)

# classes whose instances become records, by the start of their module
CLASSES = {
    "pg_modules.networks_fastgan.": "Generator DummyMapping FastganSynthesis FastganSynthesisCond",
    "pg_modules.blocks.": "InitLayer GLU Swish SEBlock NoiseInjection UpBlockSmall UpBlockBig UpBlockSmallCond "
    "UpBlockBigCond CCBN DownBlock DownBlockPatch SeparableConv2d FeatureFusionBlock CSM",
    "pg_modules.discriminator.": "ProjectedDiscriminator MultiScaleD SingleDisc SingleDiscCond",
    "pg_modules.projector.": "F_RandomProj",
    "R3GAN.": R3GAN,
    "BaselineGAN.": R3GAN,  # what R3GAN was called when its first weights were released
    "training.networks": "Generator Discriminator",
    "torch.nn.modules.": "Sequential ModuleDict ModuleList Conv2d ConvTranspose2d BatchNorm2d Upsample "
    "AdaptiveAvgPool2d AvgPool2d LeakyReLU ReLU ReLU6 Sigmoid Identity Embedding Linear Module _WrappedHook",
    "torch.nn.utils.spectral_norm.": "SpectralNorm SpectralNormStateDictHook SpectralNormLoadStateDictPreHook",
    "torch.nn.quantized.": "FloatFunctional",
    "torch.ao.nn.quantized.": "FloatFunctional",
    "timm.": "Conv2dSame DepthwiseSeparableConv InvertedResidual BatchNormAct2d",
    "argparse.": "Namespace",
    "numpy.": "ndarray",
}
DTYPES = ("torch.float32", "torch.bfloat16")  # values, never called
PERSISTENT = "persistent."
TENSORFLOW = "dnnlib.tflib."
SCRIPT = "__torch__."  # classes of a TorchScript archive, which its own code would define


@dataclass(frozen=True)
class Content:
    """A file as plain data: containers, numbers, text, tensors (CPU) and Records."""

    tree: Any
    globals: tuple[str, ...]
    container: str  # pickle, torch-zip or torch-legacy
    budget: Budget  # what is left of it


def _items(items: Any) -> list[Any]:
    """The members of a plain container; a tensor would unroll into one object a number."""
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise ValueError(f"a {type(items).__name__} in place of a list")
    return list(items)


def _dict(pairs: Any = ()) -> dict:
    if isinstance(pairs, dict):
        return dict(pairs)
    made: dict = {}
    for pair in _items(pairs):
        key, value = _items(pair)
        made[checked_key(key)] = value
    return made


def _set(items: Any = ()) -> set:
    return set(map(checked_key, _items(items)))


def _tuple(items: Any = ()) -> tuple:
    return tuple(_items(items))


def _dtype(code: Any, *_: Any) -> Record:
    return Record("numpy.dtype", (code,))


def _scalar(dtype: Any, raw: Any = b"") -> int | float | bool:
    """A numpy scalar as a Python number."""
    code = dtype.args[0] if isinstance(dtype, Record) else None
    if not (isinstance(code, str) and code in SCALARS and isinstance(raw, bytes)):
        raise ValueError("a numpy scalar of unknown type")
    order = dtype.attributes.get("state", (3, "<"))[1]
    if order not in ("<", "|", "="):
        raise ValueError("a big-endian numpy scalar")
    (value,) = struct.unpack(SCALARS[code], raw)
    return value


def _encode(text: Any, codec: Any = None) -> bytes:
    """Old pickles write bytes as text; only that one use."""
    if codec != "latin1":
        raise ValueError("text in another codec than latin1")
    return text.encode("latin1")


def _first(data: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return data


def _array(*_: Any) -> Record:
    return Record("numpy.ndarray")


def _record(name: str, *args: Any) -> Record:
    return Record(name, args)


def class_token(name: str) -> Token | None:
    """A token that makes records, if `name` is one of CLASSES."""
    kind = name.rpartition(".")[2]
    known = any(name.startswith(module) and kind in kinds.split() for module, kinds in CLASSES.items())
    return Token(name, partial(_record, name)) if known else None


class Globals:
    """The table of one file: every global it may name, and what that becomes. Calling it may raise WeightsError."""

    def __init__(self, budget: Budget):
        self.budget, self.source = budget, budget.source
        self.found: set[str] = set()
        self.calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _dict,
            "builtins.set": _set,
            "__builtin__.set": _set,
            "dnnlib.util.EasyDict": _dict,
            "numpy.dtype": _dtype,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
            "numpy.core.multiarray._reconstruct": _array,
            "numpy._core.multiarray._reconstruct": _array,
            "_codecs.encode": _encode,
            "torch.Size": _tuple,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_tensor_v2": lambda *args: view_of(self.budget, *args[:4]),
            "torch.storage._load_from_bytes": self._blob,
            "torch_utils.persistence._reconstruct_persistent_obj": self._persistent,
        }

    def __call__(self, name: str) -> Token | None:
        if name.startswith(TENSORFLOW):
            raise WeightsError(
                f"{self.source}: is a TensorFlow StyleGAN checkpoint ({name!r}), which this program cannot read; "
                "convert it with the official legacy.py of stylegan2-ada-pytorch and import the result"
            )
        if name in self.calls:
            return Token(name, self.calls[name])
        return Token(name) if name in DTYPES else storage_token(name) or class_token(name)

    def _persistent(self, meta: Any) -> Record:
        """StyleGAN2-ADA's form of a module: class name and attributes; its source text is dropped here."""
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
            raise ValueError("a persistent object of unknown form")
        if not is_name(meta.get("class_name")):
            raise ValueError("a persistent object without the name of its class")
        return Record(PERSISTENT + meta["class_name"], (), attributes_of(self.budget, meta["state"]))

    def _blob(self, data: Any) -> Any:
        """An inner torch blob. It may name storage types and nothing else, so blobs do not nest."""
        if not isinstance(data, bytes):
            raise ValueError("an inner torch blob that is not bytes")
        tree, found = LegacyReader(self.budget, data, storage_token, " (inner torch blob)").load()
        self.found |= found
        return tree


def read_checkpoint(path: Path | str) -> Content:
    """The content of a .pkl, .pt or .pth file. Raises WeightsError when it is missing, damaged or hostile."""
    return read_bytes(str(path), _bytes_of(path))


def _bytes_of(path: Path | str) -> bytes:
    file, size = open_weights(Path(path))
    with file:
        try:
            return file.read(size)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror}); copy it again") from error


def script_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by dotted name; its program is neither read nor run.

    Raises WeightsError when the file is missing, damaged or hostile.
    """
    data = _bytes_of(path)
    budget = Budget(str(path), len(data))
    table = Globals(budget)

    def find(name: str) -> Token | None:
        return Token(name, partial(_record, name)) if name.startswith(SCRIPT) else table(name)

    root, _ = ZipReader(budget, data, find, script=True).load()
    state: dict[str, Tensor] = {}
    waiting = [("", root, 0)]
    while waiting:
        above, module, depth = waiting.pop()
        if depth > MAX_DEPTH or not isinstance(module, Record):
            raise refuse(budget.source, "nests modules too deeply, or holds none")
        budget.items(1 + len(module.attributes))
        for key, value in module.attributes.items():
            if isinstance(value, Tensor):
                state[below_name(budget, above, key)] = value
            elif isinstance(value, Record):
                waiting.append((below_name(budget, above, key), value, depth + 1))
    return state


def read_bytes(source: str, data: bytes) -> Content:
    """`read_checkpoint` of a file's content; `source` names it in messages. Raises WeightsError."""
    budget = Budget(source, len(data))
    table = Globals(budget)
    if not data:
        raise refuse(source, "is empty")
    if data[:4] == b"PK\x03\x04":
        (tree, found), container = ZipReader(budget, data, table).load(), "torch-zip"
    elif begins_legacy(data):
        (tree, found), container = LegacyReader(budget, data, table).load(), "torch-legacy"
    else:
        machine = Machine(budget, table)
        stream = io.BytesIO(data)
        tree, found, container = machine.load(stream), machine.globals, "pickle"
        if stream.read(1):
            raise refuse(source, "has data behind its end")
    return Content(tree, tuple(sorted(found | table.found)), container, budget)


def modules_of(budget: Budget, root: Record) -> Iterator[tuple[str, Record]]:
    """(dotted name, record) of a module and all below it, in state-dict order. Raises WeightsError for cycles."""
    waiting = [("", root, 0)]
    while waiting:
        name, module, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise refuse(budget.source, "nests modules too deeply")
        yield name, module
        below = [
            (below_name(budget, name, key), child, depth + 1)
            for key, child in part_of(budget, module, "_modules").items()
            if isinstance(child, Record)
        ]
        waiting += reversed(below)


def part_of(budget: Budget, module: Record, group: str) -> dict[str, Any]:
    """The children, parameters or buffers of a module, {} where it has none. Raises WeightsError for a wrong form."""
    found = module.attributes.get(group)
    if not isinstance(found, (dict, type(None))):
        raise refuse(budget.source, f"has a module whose {group} are a {type(found).__name__}")
    budget.items(1 + len(found or ()))
    return found or {}


def below_name(budget: Budget, above: str, key: Any) -> str:
    """The dotted name of a part of a module. Raises WeightsError for one that no network has."""
    name = f"{above}.{key}" if above else key
    if not is_name(key) or not is_name(name):
        raise refuse(budget.source, f"has a part of {above or 'a network'} with an unusable name")
    budget.text(len(name))
    return name


def state_of(budget: Budget, root: Record) -> dict[str, Tensor]:
    """The state dict a module record would have: parameters and persistent buffers by dotted name.

    Raises WeightsError for modules of a wrong form, and where they are shared so often that the budget ends.
    """
    state: dict[str, Tensor] = {}
    for name, module in modules_of(budget, root):
        hidden = module.attributes.get("_non_persistent_buffers_set") or ()
        hidden = hidden if isinstance(hidden, (set, frozenset)) else set()
        for group in ("_parameters", "_buffers"):
            for key, value in part_of(budget, module, group).items():
                if isinstance(value, Tensor) and key not in hidden:
                    state[below_name(budget, name, key)] = value
    return state


def named_tensors(source: str, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a table, by name. Raises WeightsError for a name that no network has."""
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    odd = next((name for name in state if not is_name(name)), None)
    if odd is not None:
        raise refuse(source, f"has a tensor with the unusable name {odd!r:.99}")
    return state
