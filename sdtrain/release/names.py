"""The forms a network can be given away in, and the backends it can be run by. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Form:
    endings: tuple[str, ...]  # those that tell the truth, the usual one first
    content: str
    stem: str = "model"  # of the file in an export folder


FORMS = {
    "safetensors": Form(endings=(".safetensors",), content="plain tensors with a card beside them"),
    "official": Form(endings=(".pt", ".pth"), content="a state dict under the official names, without pickled classes"),
    "pth": Form(endings=(".pth",), content="a state dict under params_ema"),
    "spandrel": Form(endings=(".pth",), content="a state dict for tools that use spandrel", stem="model_spandrel"),
    "pkl": Form(endings=(".pkl",), content="the generator as official StyleGAN2-ADA snapshots hold it"),
    "onnx": Form(endings=(".onnx",), content="a graph"),
    "onnx-fp16": Form(endings=(".onnx",), content="a graph in float16", stem="model_fp16"),
    "onnx-int8": Form(endings=(".onnx",), content="a graph in 8-bit integers", stem="model_int8"),
    "pt2": Form(endings=(".pt2",), content="a torch.export program"),
}
BACKENDS = ("eager", "channels-last", "compiled", "onnx", "cuda-graphs")
PRECISIONS = ("fp32", "bf16")
# An ending that none of these is belongs to the name, as in face-v1.5.
ENDINGS = {
    *(ending for form in FORMS.values() for ending in form.endings),
    *(".pickle", ".ckpt", ".bin", ".npz", ".json", ".zip", ".tar", ".h5"),
}


def target(path: Path, form: str) -> Path:
    """The file to write: `path`, with the ending of the form where it has none. Raises ConfigError if it misleads."""
    if form not in FORMS:
        raise ConfigError(f"there is no export format {form!r}; choose {', '.join(FORMS)}")
    endings = FORMS[form].endings
    if path.is_dir():
        raise ConfigError(
            f"--out {path} is a folder; name a file in it, such as {path / ('network' + endings[0])}, "
            "or take --to for all forms in a new folder"
        )
    if path.suffix.lower() in endings:
        return path
    if path.suffix.lower() in ENDINGS:
        raise ConfigError(
            f"--out {path.name}: format {form} writes {FORMS[form].content}, which {path.suffix} does not say; "
            f"name it {path.with_suffix(endings[0]).name}"
        )
    return path.with_name(path.name + endings[0])
