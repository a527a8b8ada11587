"""README.md of an export folder: what the network is, how it was measured, what each file is, how each is opened.

The front matter is what model hubs read. Text that comes from files is escaped; snippets hold none of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdtrain.commands.results import Row, chosen, heading, printed, protocol_of, read_runs
from sdtrain.commands.source import config_of, position_of
from sdtrain.commands.tables import Table, in_markdown, markdown, one_line
from sdtrain.config.compare import to_tree
from sdtrain.errors import RunError
from sdtrain.files import read_json
from sdtrain.interop.architectures import NAMES, title
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.release.names import FORMS
from sdtrain.release.outward import FACE, Outward

PICTURE = "preview.png"
NO_LICENCE = (
    "Not stated. What the training images and the weights that training began from allow holds for these files too; "
    "say it with --licence when you export."
)
UNIT, SIGNED = "[0, 1]", "[-1, 1]"


def card(
    name: str, source: Path, file: Path, network: Network, outward: Outward, proof: dict[str, Any], licence: str
) -> str:
    """The page. `source`: run or file, `file`: its weights, `proof`: what export.json holds, `licence`: "" = unsaid."""
    photos = network.kind in PHOTOS
    task = "image-to-image" if photos or network.kind == FACE else "unconditional-image-generation"
    front = ["---", "library_name: sdtrain", f"license: {json.dumps(one_line(licence) or 'other')}"]
    front += [f"pipeline_tag: {task}", "tags: [gan, distillation, " + network.kind + "]", "---"]
    figures, notes = measured(source, file)
    parts = [
        "\n".join(front),
        f"# {in_markdown(name)}",
        in_markdown(sentence(network, outward)),
        f"![{before_after(network)}]({PICTURE})",
        markdown([Table("What it is:", ["", ""], facts(source, file, network), 2)], []),
        "## Figures\n\n" + markdown(figures, notes),
        "## Files\n\n" + markdown([files(proof)], remarks(proof)),
        "## How to load it\n\nRun from this folder:\n\n" + "\n\n".join(snippets(outward, proof)),
        "## Licence\n\n" + (in_markdown(licence) or NO_LICENCE),
    ]
    return "\n\n".join(parts) + "\n"


def sentence(network: Network, outward: Outward) -> str:
    """What goes in and what comes out."""
    if network.kind in PHOTOS:
        return f"A {title(network)}: photographs in {UNIT}, {outward.scale} times as large, clamped to {UNIT}."
    if network.kind == FACE:
        return (
            f"A {title(network)}: aligned faces of {network.resolution} px in {SIGNED} and the factor that they were "
            f"enlarged by, made sharp; clamped to {SIGNED}."
        )
    return f"A {title(network)}: latents to images of {network.resolution} px, clamped to {SIGNED}."


def before_after(network: Network) -> str:
    if network.kind in PHOTOS or network.kind == FACE:
        return "Input, enlargement by bicubic, and this network"
    return "Samples of the same latents, of the first snapshot where there is one and of these weights"


def facts(source: Path, file: Path, network: Network) -> list[list[str]]:
    """Name and value of each, as plain text."""
    numbers = sum(tensor.numel() for tensor in network.state.values())
    found = {
        "architecture": NAMES.get(network.kind, network.kind),
        "options": words(network.options or {}),
        "weights": f"{network.role} of {f'{source.name}/' * source.is_dir()}{file.name}",
        "numbers": f"{numbers:,}",
    }
    position = position_of(file)
    found |= {"images seen": f"{position['seen_img']:,}"} if position else {}
    config = config_of(file)
    tree = to_tree(config) if config is not None else {}
    sections = {"method": "method", "width of the student": "student", "self-distillation": "sd", "seed": "seed"}
    distils = bool((tree.get("sd") or {}).get("alpha"))
    found |= {said: words(tree[key]) for said, key in sections.items() if key in tree and (key != "sd" or distils)}
    train = tree.get("data", {}).get("train")
    # names alone: a card is public, and where data lies on a machine is not
    names = [str(one).rstrip("/").rpartition("/")[2] for one in (train if isinstance(train, list) else [train])]
    found |= {"training data": ", ".join(names)} if train else {}
    return [[name, value] for name, value in found.items()]


def words(value: Any) -> str:
    """A value of a configuration on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(part)}" for name, part in value.items() if part is not None)
    return str(value) if not isinstance(value, (list, tuple)) else json.dumps(value)


def measured(source: Path, file: Path) -> tuple[list[Table], list[str]]:
    """The evaluations of these weights, on the test list where it was measured, beside what needs no training."""
    none = "none: these weights have not been evaluated by the run they come from"
    try:
        (run, *_), _ = read_runs([source])
    except RunError:
        return [], [none]
    split = "test" if any(row.split == "test" for row in run.rows) else "val"
    ours = [row for row in chosen(run, split) if row.values and is_of(row, split, file)]
    if all(row.seen_img is None for row in ours):
        return [], [none]
    keys = list(dict.fromkeys(key for row in ours for key in row.values if not key.endswith("_std")))
    rows = [[who(row), *(printed(key, row.values[key]) if key in row.values else "-" for key in keys)] for row in ours]
    protocol = protocol_of(ours)
    table = Table(f"Measured on {split}:", ["", *(heading(key, protocol) for key in keys)], rows)
    return [table], [f"protocol: {json.dumps(protocol)}"] if protocol else []


def is_of(row: Row, split: str, file: Path) -> bool:
    """Whether a row is about the weights of `file`, or about something that is not trained."""
    try:
        stage = read_json(file.with_name("metrics.json")).get("stage", row.stage)
    except (OSError, ValueError, AttributeError):
        stage = row.stage
    at = position_of(file).get("seen_img", row.seen_img)
    # what is tested at the end of a run is what validation had chosen before
    right_time = row.seen_img == at or split == "test"
    return row.seen_img is None or (right_time and row.network != "G" and row.stage in ("", stage))


def who(row: Row) -> str:
    place = f" at {row.seen_img:,} images" if row.seen_img is not None else ""
    return f"{row.network}{f' ({row.stage})' if row.stage else ''}{place}"


def files(proof: dict[str, Any]) -> Table:
    """A row a file and consumer; the differences are the largest over the cases."""
    rows = []
    for row in proof["artefacts"]:
        results = list(row["cases"].values())
        psnrs = [result["psnr"] for result in results if result["psnr"] is not None]
        values = (
            ["-", "-", row["unproven"]]
            if not results
            else [
                *(f"{max(result[key] for result in results):.1e}" for key in ("max", "mean")),
                f"{min(psnrs):.1f} dB" if psnrs else "equal",
            ]
        )
        rows.append([row["file"], FORMS[row["form"]].content, f"{row['bytes'] / 1e6:.2f}", row["consumer"], *values])
    caption = f"Compared with the network of training on {proof['inputs']}:"
    head = ["file", "what", "MB", "opened by", "largest difference", "mean", "PSNR"]
    return Table(caption, head, rows, 4)


def remarks(proof: dict[str, Any]) -> list[str]:
    notes = [f"{form}: {reason}" for form, reason in proof["left_out"].items()]
    if any(row["form"] == "onnx-fp16" for row in proof["artefacts"]):
        notes.append("onnxruntime on a CPU computes a float16 graph in float32 where it has no float16 form of a step")
    return [*notes, "digests of all files are in export.json"]


def snippets(outward: Outward, proof: dict[str, Any]) -> Iterator[str]:
    """Five lines for each consumer that has opened a file here."""
    of_form = {row["form"]: row["file"] for row in proof["artefacts"]}
    opened = {row["consumer"]: row["file"] for row in proof["artefacts"] if "unproven" not in row}
    given = ", ".join(as_torch(outward))
    yield from _block("sdtrain", [
        "import torch",
        "from sdtrain.interop.loading import load_network",
        "from sdtrain.release.outward import Outward",
        f'net = Outward(load_network("{of_form["safetensors"]}")).eval()',
        f"image = net({given})",
    ] if "safetensors" in of_form else [])  # fmt: skip
    if "spandrel" in opened:
        yield from _block("spandrel (ComfyUI, chaiNNer)", [
            "import torch",
            "from spandrel import ModelLoader",
            f'net = ModelLoader().load_from_file("{opened["spandrel"]}").eval()',
            "with torch.no_grad():",
            f"    image = net({given})",
        ])  # fmt: skip
    if "onnxruntime" in opened:
        yield from _block("onnxruntime", as_numpy(outward, of_form))
    if "pt2" in of_form:
        yield from _block("torch.export (such a program can run anything: load those alone whose maker you trust)", [
            "import torch",
            f'net = torch.export.load("{of_form["pt2"]}").module()',
            f"image = net({given})",
        ])  # fmt: skip
    if "official" in of_form:
        key = '["params_ema"]' if of_form["official"].endswith(".pth") else ""
        yield from _block(f"{NAMES.get(outward.kind, outward.kind)} as its authors write it", [
            "import torch",
            f'state = torch.load("{of_form["official"]}", weights_only=True){key}',
            "print(len(state))  # your_network.load_state_dict(state, strict=True)",
        ])  # fmt: skip
    if "pkl" in of_form:
        yield (
            "In the folder of stylegan2-ada-pytorch (not proven here: it is not installed):\n\n```text\n"
            f'with open("{of_form["pkl"]}", "rb") as file:\n    G = pickle.load(file)["G_ema"]\n```'
        )


def _block(who: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"{who}:\n\n```python\n" + "\n".join(lines) + "\n```"


def as_torch(outward: Outward) -> Iterator[str]:
    """An expression for each input, by position."""
    side = outward.resolution
    fixed = {
        "lq": "torch.rand(1, 3, 32, 32)",
        "face": f"torch.rand(1, 3, {side}, {side}) * 2 - 1",
        "factor": "torch.tensor([16.0])",
        "c": f"torch.eye({outward.num_classes})[:1]",
        "truncation_psi": "torch.tensor([0.7])",
    }
    z = f"torch.randn(1, {getattr(outward.net, 'z_dim', 0)})"
    yield from (fixed.get(name, z) for name in outward.names if name not in outward.noise)
    if outward.noise:
        yield f"*[torch.randn(1, 1, r, r) for r in {[shape[-1] for shape in outward.noise.values()]}]"


def as_numpy(outward: Outward, of_form: dict[str, str]) -> list[str]:
    """Five lines for onnxruntime: all inputs normal numbers, or as the network wants them."""
    file = of_form.get("onnx") or next(name for form, name in of_form.items() if form.startswith("onnx"))
    first = ["import numpy, onnxruntime", f'session = onnxruntime.InferenceSession("{file}")']
    if outward.kind in PHOTOS:
        inputs = ['inputs = {"lq": numpy.random.rand(1, 3, 32, 32).astype("float32")}']
    else:
        sizes = "{i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}"
        inputs = [f"sizes = {sizes}"]
        inputs += ['inputs = {name: numpy.random.randn(*size).astype("float32") for name, size in sizes.items()}']
        inputs += ['inputs["truncation_psi"] = numpy.float32([0.7])'] if outward.truncates else []
        inputs += ['inputs["factor"] = numpy.float32([16])'] if outward.kind == FACE else []
        one_hot = f'numpy.eye({outward.num_classes}, dtype="float32")[:1]'
        inputs += [f'inputs["c"] = {one_hot}'] if outward.num_classes else []
    return [*first, *inputs, "image = session.run(None, inputs)[0]"]
