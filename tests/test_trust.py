"""Without these a name in a file could steer a terminal or a page, and a link lead writes and deletions astray."""

from __future__ import annotations

import argparse
import ast
import io
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, run_python
from PIL import Image
from tiny import tiny_config, write_config

from sdtrain import cli, weights
from sdtrain.commands import evaluate_sr, fetch_weights, sample, tables
from sdtrain.config.load import load_config
from sdtrain.data.read.picture import Picture, png_of
from sdtrain.engine import checkpoint, snapshots
from sdtrain.engine.runfolder import OWN, RunFolder
from sdtrain.errors import RunError, UserError, WeightsError
from sdtrain.exits import run_command
from sdtrain.files import save_tensors, sweep, write_bytes, write_json
from sdtrain.interop.loading import load_network
from sdtrain.interop.pth import save_pth
from sdtrain.terminal import visible

# Links


def complete(folder: Path) -> Path:
    """A folder that counts as a checkpoint."""
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {"seen_img": 1})
    write_json(folder / checkpoint.MARKER, {"files": {"state.json": checkpoint.digest(folder / "state.json")}})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of somebody else that holds what retention and sweeping look for."""
    place = tmp_path / "theirs"
    for name in ("img_000000001", "img_000000002", "img_000000003", ".writing-img_000000004"):
        complete(place / name)
    (place / f".{'0' * 16}.tmp").write_text("half")
    (place / ".mine.tmp").write_text("not ours")
    return place


def test_nothing_is_deleted_through_a_link(theirs: Path, tmp_path: Path) -> None:
    before, root = content(theirs), tmp_path / "checkpoints"
    root.symlink_to(theirs)
    checkpoint.retain(root, 1)
    snapshots._remove_later(root, 0)
    sweep(root)
    own = tmp_path / "own"
    own.mkdir()
    (own / "img_000000009").symlink_to(theirs / "img_000000003")
    snapshots._remove_later(own, 1)
    assert content(theirs) == before and checkpoint.verify(own / "img_000000009") is None


def test_sweeping_removes_temporary_files_of_our_own_alone(theirs: Path) -> None:
    sweep(theirs)
    assert [path.name for path in theirs.glob(".*.tmp")] == [".mine.tmp"]


@pytest.mark.parametrize("name", OWN)
def test_a_run_folder_that_leads_elsewhere_is_refused_before_anything_is_written(
    theirs: Path, tmp_path: Path, name: str
) -> None:
    before = content(theirs)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(theirs)
    with pytest.raises(RunError, match=rf"{re.escape(name)} is a link, and a run writes and deletes in its own folder"):
        RunFolder(tmp_path / "run").create()
    assert content(theirs) == before and [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_run_folder_that_is_itself_a_link_is_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RunFolder(tmp_path / "run").create()
    assert (tmp_path / "disk" / "checkpoints").is_dir()


def test_packing_over_links_replaces_the_links(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    for name in ("a.tar", "shard-000000.tar", "manifest.json", "index.npz", "plan.json"):
        (theirs / name).write_text("{}")
    before, out = content(theirs), tmp_path / "out"
    out.mkdir()
    (out / ".pack").symlink_to(theirs)
    for name in ("a.tar", "shard-000000.tar", "manifest.json", "index.npz"):
        (out / name).symlink_to(theirs / name)
    words = [str(tmp_path / "photos"), str(out), "--resolution", "8", "--workers", "1"]
    assert cli.main(["pack", *words]) == 2  # theirs is no set of ours
    assert cli.main(["pack", *words, "--overwrite"]) == 0
    assert content(theirs) == before and not any(path.is_symlink() for path in out.iterdir())
    assert cli.main(["verify", str(out)]) == 0


PIXELS = np.zeros((4, 4, 3), np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "sample.png": lambda path: sample.save(path, PIXELS),
    "sample.gif": lambda path: sample.write_gif(path, [PIXELS, PIXELS], 10),
    "upscaled.png": lambda path: write_bytes(path, png_of(Picture(PIXELS.astype(np.float32)))),
    "exported.pth": lambda path: save_pth({"a": torch.zeros(1)}, path),
    "exported.safetensors": lambda path: save_tensors(path, {"a": torch.zeros(1)}),
    "card.json": lambda path: write_json(path, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_command_writes_replaces_a_link_in_its_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    WRITERS[name](tmp_path / name)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / name).is_symlink()


def test_the_pictures_and_pages_of_a_report_replace_links(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    for name in ("page.md", "page.png"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "page.png").is_symlink()


def test_an_unfinished_download_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.part").symlink_to(tmp_path / "precious")
    for resumed in (False, True):
        with pytest.raises(OSError):
            fetch_weights._open_part(tmp_path / "a.part", resumed)
    assert (tmp_path / "precious").read_text() == "mine"


# Strings that become paths


@pytest.mark.parametrize("told", ["../../../escaped", "/tmp/escaped", "a\0b", "\x1b[2J"])
def test_the_hash_that_a_manifest_tells_is_no_part_of_a_path(tmp_path: Path, told: str) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    real, run = tmp_path / "real", tmp_path / "run"
    assert cli.main(["pack", str(tmp_path / "photos"), str(real), "--resolution", "8", "--workers", "1"]) == 0
    write_json(real / "manifest.json", {**json.loads((real / "manifest.json").read_text()), "hash": told})
    run.mkdir()
    config = load_config(write_config(run / "config.yaml", tiny_config(tmp_path)))
    args = argparse.Namespace(path=str(run), real=str(real), cache=tmp_path / "cache", allow_pipe=False)
    try:
        folder = evaluate_sr.folder_of_inputs(args, config)
    except UserError:  # or such a manifest is refused
        return
    assert folder.parent == tmp_path / "cache" and re.fullmatch(r"lq-[0-9a-f]{16}-[0-9a-f]{16}", folder.name)


# Weights: the members of a zip decide, whatever its ending


def torchscript(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", *members):
            archive.writestr(f"archive/{name}", b"\x80\x02}.")
    return path


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pkl", ".safetensors", ".bin"])
@pytest.mark.parametrize("member", ["constants.pkl", "code/__torch__.py", "code/x/y.py.debug_pkl"])
def test_a_torchscript_archive_never_reaches_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, member: str
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("torch was given the file")

    monkeypatch.setattr(torch, "load", reached)
    monkeypatch.setattr(torch.jit, "load", reached)
    path = torchscript(tmp_path / f"net{ending}", member, "version")
    with pytest.raises(WeightsError, match="is a TorchScript archive, a program and not a state dict"):
        weights.load_weights("vgg16", str(path))
    with pytest.raises(WeightsError, match="TorchScript" if ending in (".pt", ".pth", ".pkl") else "safetensors"):
        load_network(path)
    assert cli.main(["import", str(path), "--inspect"]) == 2


LOADERS = re.compile(r"torch\.(?!utils\.data)(?:\w+\.)*load|torch\.hub\.\w+|eval|exec|os\.system")
PICKLES = re.compile(r"(?:c?[pP]ickle|marshal|shelve|dill|cloudpickle|joblib)$")


def could_run_code(node: ast.AST) -> bool:
    """Whether it is a call or an import through which a file's content could run."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return PICKLES.match(getattr(node, "module", None) or node.names[0].name) is not None
    if not isinstance(node, ast.Call):
        return False
    return LOADERS.fullmatch(ast.unparse(node.func)) is not None or any(word.arg == "shell" for word in node.keywords)


def test_nothing_in_the_package_hands_a_file_to_what_could_run_it() -> None:
    """But for the heads of LPIPS, a file of an installed package, and for what an export has just written itself.

    What writes official snapshots imports pickle for its pickler, and names nothing of it that reads.
    """
    found = sorted(
        (str(path.relative_to(REPO / "sdtrain")), ast.unparse(node))
        for path in (REPO / "sdtrain").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if could_run_code(node)
    )
    own = ["release/proof.py"] * 2 + ["release/snapshot.py"]
    assert [place for place, _ in found] == ["losses/perceptual.py", *own], found
    heads, program, state, pickler = (text for _, text in found)
    assert "weights_only=True" in heads and "weights_only=True" in state and pickler == "import pickle"
    assert program == "torch.export.load(io.BytesIO(path.read_bytes()))"
    named = re.findall(r"\bpickle\.(\w+)", (REPO / "sdtrain" / "release" / "snapshot.py").read_text())
    assert set(named) == {"_Pickler", "STACK_GLOBAL"}


# Names in pages and on the terminal

NAMES = [
    "a$b|c<d>_e",
    r"$\frac",
    r"\input{etc.passwd}",
    "<script>alert(1)<script>",
    "[x](javascript:alert(1))",
    "`id` ![p](q)",
    "two\nlines\r\n| --- |",
    "\x1b[2J\x1b]0;title\x07\x9b31m",
    "abc\u202egnp.exe\u2066",
    "-_~^%&#{}*=+",
    "n" * 255,
    "\udcff",
]


def written_run(folder: Path, stage: str = "main", values: Any = None) -> Path:
    """A run folder with two evaluations, and losses that make a curve."""
    folder.mkdir(parents=True)
    about = {"stage": stage, "protocol": {"num_fake": 2, "num_real": 2, "lq": stage}}
    found: list[dict[str, Any]] = []
    for img in (16, 32):
        found.append({"kind": "train", "seen_img": img, "stage": stage, "G/adv": 1.0, f"D/{stage}": 2.0})
        found.append({"kind": "eval", "seen_img": img, "split": stage, "weights": stage, "fid": 3.0 + img, **about})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("suffix", [".md", ".html", ".tex"])
def test_no_name_is_more_than_text_on_a_page(
    tmp_path: Path, name: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = written_run(tmp_path / name.replace("/", ""), stage=name), tmp_path / f"page{suffix}"
    assert cli.main(["report", str(run), "--out", str(page)]) == 0
    shown = capsys.readouterr()
    text = page.read_text()
    assert not STEERING.search(shown.out + shown.err) and not STEERING.search(text)
    if suffix == ".html":
        assert "<script" not in text and "<d>" not in text
    if suffix == ".tex":
        assert r"\input" not in text and r"\frac" not in text and not re.search(r"(?<!\\)[%#&_]\w", table_cells(text))
    if suffix == ".md":
        assert not re.search(r"(?<!\\)(?:\[x\]|!\[p\]|\$b|\*=)|<script|`id`", text)
        lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
        assert len(lengths) == 1  # no name has made a column or a line of its own


def table_cells(page: str) -> str:
    """The lines of a LaTeX table with the marks between cells taken out."""
    return " ".join(line.replace(" & ", " ") for line in page.splitlines() if line.endswith(r"\\"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_steers_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> int:
        print("found", name)
        print("warned", name, file=sys.stderr)
        handler = logging.StreamHandler()
        logging.getLogger("trust").addHandler(handler)
        logging.getLogger("trust").warning("logged %s", name)
        logging.getLogger("trust").removeHandler(handler)
        raise UserError(f"refused {name}")

    assert run_command(refuse) == 2
    shown = capsys.readouterr()
    assert not STEERING.search(shown.out + shown.err)
    assert all(f"{word} {visible(name)}" in shown.out + shown.err for word in ("found", "warned", "logged", "refused"))


def test_what_is_text_is_shown_as_it_is_and_progress_bars_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "Gr\u00fc\u00dfe, \u9854\tcaf\u00e9 \U0001f642\nnext"
    assert visible(plain) == plain
    run_command(lambda: print("\r50 %\rtwo", end="") or 0)
    assert capsys.readouterr().out == "\r50 %\\rtwo"


def test_a_terminal_of_few_letters_gets_the_others_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(bytes_out, encoding="ascii", write_through=True))
    assert run_command(lambda: print("Gr\u00fc\u00dfe") or 0) == 0
    assert bytes_out.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_sentences_and_faults_of_real_commands_are_text(tmp_path: Path) -> None:
    strange = tmp_path / "\x1b[31mrun\u202e"
    written_run(strange)
    for words in (["report", strange / "\x1b]0;x\x07", "--out", "a.md"], ["sample", strange, "--out", tmp_path / "o"]):
        done = run_python("-m", "sdtrain.cli", *map(str, words))
        assert done.returncode == 2 and "\\x1b" in done.stderr and not STEERING.search(done.stdout + done.stderr)
    fault = "import sys; from sdtrain import terminal; sys.excepthook = terminal.show_fault; raise OSError('\\x1b[2J')"
    said = run_python("-c", fault).stderr
    assert "OSError: \\x1b[2J" in said and not STEERING.search(said)


def test_settings_of_matplotlib_in_the_working_folder_hand_no_name_to_latex(tmp_path: Path) -> None:
    run = written_run(tmp_path / r"$\input{x}$")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    for program in ("latex", "dvipng"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    code = "import sys; from sdtrain import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(run), "--out", "page.md"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.png").is_file() and not (tmp_path / "ran").exists()


def test_every_page_escapes_with_one_function_each() -> None:
    assert {tables.in_markdown.__module__, tables.in_html.__module__, tables.in_latex.__module__} == {tables.__name__}
    others = re.compile(r"html\.escape|textbackslash|&lt;")
    files = {path.name for path in (REPO / "sdtrain").rglob("*.py") if others.search(path.read_text())}
    assert files == {"tables.py"}
