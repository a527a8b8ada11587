"""Official checkpoint files as plain data, without running anything they contain.

`read_checkpoint` takes what torch.save and pickle.dump wrote: StyleGAN2-ADA and ProjectedGAN .pkl (tensors are torch
blobs inside the pickle), StyleNAT .pt and Real-ESRGAN .pth (zip or the older torch container). Modules become
`Record`s; source text embedded by StyleGAN2-ADA is dropped unread. Every global a file may name stands in this module;
any other is a WeightsError with its name.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.pickle_machine import Machine, Record, Token, checked_keys, refuse
from sdtrain.interop.storages import Budget, LegacyReader, ZipReader, begins_legacy, storage_token, view_of

MAX_FILE_BYTES = 16 << 30
MAX_MODULES = 100_000
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


@dataclass(frozen=True)
class Content:
    """A file as plain data: containers, numbers, text, tensors (CPU) and Records."""

    tree: Any
    globals: tuple[str, ...]
    container: str  # pickle, torch-zip or torch-legacy


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
        made[checked_keys([key])[0]] = value
    return made


def _set(items: Any = ()) -> set:
    return set(checked_keys(_items(items)))


def _tuple(items: Any = ()) -> tuple:
    return tuple(_items(items))


def _dtype(code: Any, *_: Any) -> Record:
    return Record("numpy.dtype", (code,))


def _scalar(dtype: Any, raw: Any = b"") -> int | float | bool:
    """A numpy scalar as a Python number."""
    if not (isinstance(dtype, Record) and dtype.args[0] in SCALARS and isinstance(raw, bytes)):
        raise ValueError("a numpy scalar of unknown type")
    order = dtype.attributes.get("state", (3, "<"))[1]
    if order not in ("<", "|", "="):
        raise ValueError("a big-endian numpy scalar")
    (value,) = struct.unpack(SCALARS[dtype.args[0]], raw)
    return value


def _encode(text: Any, codec: Any = None) -> bytes:
    """Old pickles write bytes as text; only that one use."""
    if codec != "latin1":
        raise ValueError("text in another codec than latin1")
    return text.encode("latin1")


def _persistent(meta: Any) -> Record:
    """StyleGAN2-ADA's form of a module: class name and attributes; its source text is dropped here."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise ValueError("a persistent object of unknown form")
    return Record(PERSISTENT + str(meta.get("class_name")), (), dict(meta["state"]))


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

    def __init__(self, source: str, num_bytes: int):
        self.source = source
        self.budget = Budget(source, 4 * num_bytes + (1 << 20))
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
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
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

    def _blob(self, data: Any) -> Any:
        """An inner torch blob. It may name storage types and nothing else, so blobs do not nest."""
        if not isinstance(data, bytes):
            raise ValueError("an inner torch blob that is not bytes")
        tree, found = LegacyReader(f"{self.source} (inner torch blob)", data, storage_token).load()
        self.found |= found
        return tree


def read_checkpoint(path: Path | str) -> Content:
    """The content of a .pkl, .pt or .pth file. Raises WeightsError when it is missing, damaged or hostile."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise refuse(str(path), f"has {size} bytes, more than any known checkpoint")
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give an existing file") from error
    return read_bytes(str(path), data)


def read_bytes(source: str, data: bytes) -> Content:
    """`read_checkpoint` of a file's content; `source` names it in messages. Raises WeightsError."""
    table = Globals(source, len(data))
    if not data:
        raise refuse(source, "is empty")
    if data[:4] == b"PK\x03\x04":
        (tree, found), container = ZipReader(source, data, table).load(), "torch-zip"
    elif begins_legacy(data):
        (tree, found), container = LegacyReader(source, data, table).load(), "torch-legacy"
    else:
        machine = Machine(source, table)
        stream = io.BytesIO(data)
        tree, found, container = machine.load(stream), machine.globals, "pickle"
        if stream.read(1):
            raise refuse(source, "has data behind its end")
    return Content(tree, tuple(sorted(found | table.found)), container)


def modules_of(source: str, root: Record) -> Iterator[tuple[str, Record]]:
    """(dotted name, record) of a module and all below it, in state-dict order. Raises WeightsError for cycles."""
    waiting = [("", root, 0)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return
        name, module, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise refuse(source, "nests modules too deeply")
        yield name, module
        children = module.attributes.get("_modules") or {}
        if not isinstance(children, dict):
            raise refuse(source, f"has a module {name!r} without a list of children")
        below = [(f"{name}.{key}" if name else str(key), child, depth + 1) for key, child in children.items()]
        waiting += [entry for entry in reversed(below) if isinstance(entry[1], Record)]
    raise refuse(source, f"has more than {MAX_MODULES} modules")


def state_of(source: str, root: Record) -> dict[str, Tensor]:
    """The state dict a module record would have: parameters and persistent buffers by dotted name."""
    state: dict[str, Tensor] = {}
    for name, module in modules_of(source, root):
        hidden = module.attributes.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for key, value in dict(module.attributes.get(group) or {}).items():
                if isinstance(value, Tensor) and key not in hidden:
                    state[f"{name}.{key}" if name else str(key)] = value
    return state
