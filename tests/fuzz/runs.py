"""Run folders and files of figures from elsewhere, read by every command that takes one.

The folders are changed copies of one run that has saved at 32 images: networks of some kilobytes, real digests.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.backends.backend_agg  # noqa: E402, F401  # slow imports, once for all children
import matplotlib.figure  # noqa: E402, F401
import tiny  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  # which the first optimizer pulls in
import yaml  # noqa: E402

from fuzz.configs import as_yaml  # noqa: E402
from fuzz.harness import Inputs  # noqa: E402
from fuzz.mutate import NAMES, changed, damaged, odd  # noqa: E402
from sdtrain import main  # noqa: E402
from sdtrain.commands import (  # noqa: E402
    eval_rows,
    evaluate,
    exhibits,
    importing,
    pages,
    report,
    results,
    sample,
    snapshots,
    source,
    tables,
)
from sdtrain.commands.material import Material  # noqa: E402
from sdtrain.config.load import load_config  # noqa: E402
from sdtrain.engine.runfolder import RunFolder  # noqa: E402
from sdtrain.errors import UserError  # noqa: E402
from sdtrain.outlook import forecast, render_forecast  # noqa: E402
from sdtrain.plan import check_data  # noqa: E402
from sdtrain.run import Run  # noqa: E402

PROTOCOL = {"metrics": ["fid"], "num_fake": 100, "num_real": 50, "real_hash": "x", "latents_seed": 0}
TRAIN = {"kind": "train", "seen_img": 32, "stage": "main", "G/adv": 0.5, "D/real": 1.5, "G/sd": 0.1}
EVAL = {"kind": "eval", "seen_img": 32, "split": "val", "weights": "ema", "fid": 60.5, "rfid": 3.0, "rfid_std": 0.1}


def timed(num_feat: int) -> dict[str, Any]:
    """A case of `sdtrain speed`."""
    condition = {"size": "8x8", "precision": "fp32", "backend": "eager", "threads": 1, "clock": "wall time"}
    what = {"name": f"{num_feat}.pth", "kind": "rrdbnet", "options": {"num_feat": num_feat, "num_grow_ch": 32}}
    return {**what, **condition, "parameters": 9, "flops": num_feat, "seconds": [0.1, 0.2, 0.1]}


ROWS: tuple[dict[str, Any], ...] = (
    TRAIN,
    {"kind": "perf", "seen_img": 32, "sec_per_kimg": 2.5, "sec/evaluate": 1.0, "peak_mem_gb": 0.5},
    {**EVAL, "protocol": PROTOCOL},
    {**EVAL, "bicubic": {"psnr_y": 30.0, "fid": 1.0}, "psnr_y": 31.0, "stage": "student", "protocol": PROTOCOL},
    {"kind": "baseline", "method": "bicubic", "split": "test", "fid_16": 50.0, "psnr_y": 20.1, "protocol": PROTOCOL},
    {"kind": "eval", "measured": "photos", "fid": 2.5, "kid": 0.001, "precision": 0.5, "protocol": PROTOCOL},
    {"kind": "speed", "setup": {"device": "CPU", "torch": "2.15", "batch": 1}, "cases": [timed(64), timed(32)]},
)
PLAN = {"name": "x", "select_by": "rfid", "stages": [{"name": "main", "end_img": 96, "trains": ["G"]}], "warnings": []}
ENGINE = {"name": "ddp", "precision": "fp32", "summation": "exact", "device": "cpu"}
ENVIRONMENT = {
    "starts": [{"time": "2026-01-01", "world_size": 1, "packages": {"torch": "2.10"}, "weights": {}, "engine": ENGINE}]
}
NAMED = ("sdgan-table1", "sdgan-table2", "sdgan-fig3", "sdgan-fig5", "sdakd-table3")  # of rows alone


@cache
def template() -> Run:
    """A run in a temporary folder that goes when this process ends. Children share its networks."""
    home = Path(tempfile.mkdtemp(prefix="sdtrain-fuzz-run-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(home, ignore_errors=True))
    torch.set_num_threads(1)
    config = tiny.tiny_config(tiny.make_shards(home / "shards"), eval_img=32, name="run", tracker="tensorboard")
    config["metrics"] = {"extractor": "random-inception"}
    loaded = load_config(tiny.write_config(home / "input.yaml", config))
    run = Run(loaded, home / "run", torch.device("cpu"), check_data(loaded))
    run.folder.create()
    main.write_down(run, None, {})
    run.begin(run.method.stages[0])
    run.step = 2
    for player in run.engine.players.values():
        for parameter in player.named.values():
            parameter.grad = torch.zeros_like(parameter)
        player.optimizer.step()
    run.save_snapshot()
    run.save(wait=True)
    out = run.folder.path
    for name, tree in (("plan.json", PLAN), ("environment.json", ENVIRONMENT)):
        (out / name).write_text(json.dumps(tree))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    shutil.copy(out / "checkpoints/img_000000032/G_ema.safetensors", out / "best")
    (out / "best" / "metrics.json").write_text(json.dumps(ROWS[2]))
    return run


ORIGINAL = template().folder.path
NAMES_OF_FILES = [path.relative_to(ORIGINAL).as_posix() for path in sorted(ORIGINAL.rglob("*")) if path.is_file()]


# Rows


def line(chance: Random) -> bytes:
    """A row of metrics.jsonl that is right, nearly right, or no row."""
    row = dict(chance.choice(ROWS))
    kind = chance.randrange(8)
    if kind < 3:
        return json.dumps(changed(chance, row)).encode(errors="replace")
    if kind == 3:
        return damaged(chance, json.dumps(row).encode())
    if kind == 4:
        return json.dumps(odd(chance)).encode()
    if kind == 5:
        seen_img = chance.choice((0, 32, 10**15, 1e300, "32", -5, [], True, 10**400))
        return json.dumps({**row, "seen_img": seen_img}).encode()
    if kind == 6:
        name = chance.choice(NAMES)
        return json.dumps({**row, chance.choice((f"G/{name}", "stage", "split", "weights", "measured")): name}).encode()
    return json.dumps(row).encode()


def text_of_rows(chance: Random) -> bytes:
    number = chance.choice((0, 1, 3, 10, 30))
    data = chance.choice((b"\n", b"\n", b"\r\n", b"\x0b", b"\xe2\x80\xa8")).join(line(chance) for _ in range(number))
    if chance.random() < 0.1:
        data = damaged(chance, data)
    if chance.random() < 0.05:
        heavy = (b"[" * 10**6, b'{"a":' * 10**5, b"\0" * 10**6, b"9" * 10**6, b"{}\n" * 10**5)
        data = chance.choice((*heavy, b"\xff\xfe1"))
    return data + chance.choice((b"\n", b"", b"\n\n"))


def name_of_run(chance: Random) -> str:
    if chance.random() < 0.5:
        return "run"
    name = chance.choice(NAMES).replace("/", "_").replace("\0", "_")
    name = name.encode(errors="replace")[:200].decode(errors="ignore")
    return name if name.strip(" .") else "run"


def figures(chance: Random, folder: Path) -> Path:
    """A folder with runs that have rows and a plan, or a file of `evaluate --json`, under names of all kinds."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        run = folder / f"{name_of_run(chance)}{chance.choice(('', '', '_seed1', '_seed2'))}"
        if chance.random() < 0.3:
            run.with_suffix(".jsonl").write_bytes(text_of_rows(chance))
            continue
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_bytes(text_of_rows(chance))
        tree = changed(chance, PLAN) if chance.random() < 0.5 else PLAN
        (run / "plan.json").write_text(json.dumps(tree), errors="replace")
        if chance.random() < 0.5:  # a run that named tables and figures take
            shutil.copy(ORIGINAL / "config.yaml", run)
            tree = changed(chance, ENVIRONMENT) if chance.random() < 0.5 else ENVIRONMENT
            (run / "environment.json").write_text(json.dumps(tree), errors="replace")
        place = chance.choice(("img_000000096", "img_99999999999999999999", "img_\u00b2", "img_-1"))
        (run / "checkpoints" / place).mkdir(parents=True, exist_ok=True)
        for marker in run.glob("checkpoints/*"):
            (marker / "complete.json").write_text('{"files": []}')
    if chance.random() < 0.1:
        (folder / "drawn").mkdir()
    return folder


def read_figures(folder: Path) -> None:
    """All pages of `report`; pictures too where the input wants them, since they take a second."""
    drawn = folder / "drawn"
    runs = [path for path in sorted(folder.iterdir()) if path != drawn]
    if drawn.is_dir():
        report.run(arguments(report, *map(str, runs), "--out", str(drawn / "page.md")))
        return
    found, notes = results.read_runs(runs)
    made = report.tables_of_metrics(found, notes)
    try:
        parts = exhibits.fill(NAMED, Material(found, arguments(report, "x"), notes))
        made += [block for part in parts for block in part.blocks if isinstance(block, tables.Table)]
        made += [block.points for part in parts for block in part.blocks if isinstance(block, pages.Figure)]
    except UserError as error:
        assert "\n" not in str(error).strip(), "more than one line"
    for suffix, render in tables.PAGES.items():
        page = render(made, notes, [Path(__file__)])
        page.encode(errors="replace")
        assert suffix != ".html" or "<script" not in page, "a tag from a file in the page"
        assert suffix != ".tex" or "\\input{" not in page and "\\write" not in page, "a command in the page"


def rows_file(chance: Random, folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(text_of_rows(chance))
    return path


def read_rows(path: Path) -> None:
    """What --against and --plan take from rows."""
    shutil.copy(path, path.with_name("metrics.jsonl"))
    render_forecast(forecast(path.parent, {"main": 48, "last": 96}), "run")
    eval_rows.compare(eval_rows.last_row(path), {"fid": 1.0, "protocol": PROTOCOL})


def arguments(command: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


# Folders


def trees(name: str) -> Any:
    text = (ORIGINAL / name).read_text()
    return yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)


def hurt(chance: Random, run: Path, name: str) -> None:
    """Change one file of a run: its text, its values, or what kind of thing it is."""
    file = run / name
    edit = chance.randrange(12)
    if edit == 0:
        file.unlink()
        links = (lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file.name))
        chance.choice((file.mkdir, lambda: os.mkfifo(file), lambda: None, lambda: file.write_bytes(b""), *links))()
    elif edit < 4 or file.suffix not in (".json", ".yaml"):
        data = text_of_rows(chance) if file.suffix == ".jsonl" else damaged(chance, file.read_bytes())
        file.write_bytes(data)
    elif edit == 4:
        file.write_text(json.dumps(odd(chance)))
    elif edit == 5:
        heavy = (b"[" * 10**6, b'{"a":' * 10**5, b"[{},[]," * 10**6, b"[" + b"{}," * 10**6 + b"1]")
        file.write_bytes(chance.choice((*heavy, b"\xff" * 100, b"", b"null")))
    elif file.suffix == ".yaml":
        file.write_text(as_yaml(changed(chance, trees(name))))
    else:
        file.write_text(json.dumps(changed(chance, trees(name))))


def marked(folder: Path) -> None:
    """Give the folder a marker that is right for what lies in it."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink() and path.name != "complete.json":
            data = path.read_bytes()
            files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    marker = folder / "complete.json"
    if marker.is_file() or not os.path.lexists(marker):  # nobody would read from a pipe
        marker.write_text(json.dumps({"files": files}))


def run_folder(chance: Random, folder: Path) -> Path:
    """A copy of the run with one to three files hurt, its markers mended most of the time, or its folders renamed."""
    run = folder / "run"
    shutil.copytree(ORIGINAL, run)
    wanted = [name for name in NAMES_OF_FILES if not name.endswith(".safetensors") and "latest" not in name]
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice(NAMES_OF_FILES if chance.random() < 0.2 else wanted)
        if (run / name).is_file() and not (run / name).is_symlink():
            hurt(chance, run, name)
            if chance.random() < 0.8 and name.startswith(("checkpoints", "snapshots")) and "complete" not in name:
                marked((run / name).parent)
    if chance.random() < 0.2:
        spoil(chance, run)
    return run


def spoil(chance: Random, run: Path) -> None:
    """Put folders in places and under names that no run of ours has."""
    place = run / chance.choice(("checkpoints", "snapshots"))
    inner = place / "img_000000032"
    edit = chance.randrange(8)
    if edit == 0:
        other = chance.choice(("img_99999999999999999999", "img_\u00b2\u00b2", "img_", "img_-5", "img_1e3", "img_ 32"))
        shutil.copytree(inner, place / other, symlinks=True, ignore=lambda *_: [])
    elif edit == 1:
        (inner / "complete.json").unlink(missing_ok=True)
        (inner / "complete.json").write_text(json.dumps({"files": chance.choice(([], {}, "x", 5, None, {"x": 1}))}))
    elif edit == 2:
        evil = {"../../../../canary": {"bytes": 5, "sha256": "0" * 64}, "/dev/zero": {}, "a\0b": {}, "x" * 300: {}}
        (inner / "complete.json").write_text(json.dumps({"files": evil}))
    elif edit == 3:
        (place / "img_000000099").write_text("a file")
    elif edit == 4:
        (place / "img_000000099").symlink_to("img_000000099")
    elif edit == 5:
        shutil.rmtree(run / "best")
    elif edit == 6:
        shutil.rmtree(place)
        place.write_text("a file")
    else:
        (run / "config.yaml").unlink(missing_ok=True)


def each(*steps: Callable[[], object]) -> None:
    """All of them, although one may refuse what another takes."""
    for step in steps:
        try:
            step()
        except UserError:
            pass


def read_folder(run: Path) -> None:
    """The commands that take a run folder."""
    out = run.parent / "out"
    nowhere = str(run.parent / "nowhere")
    each(
        lambda: report.tables_of_metrics(*results.read_runs([run])),
        lambda: snapshots.weights_at(results.Written(run, "run", total_img=96), [20.0, 33.3, 100.0], []),
        lambda: sample.run(arguments(sample, str(run), "--out", str(out), "--num", "1", "--device", "cpu")),
        lambda: evaluate.run(arguments(evaluate, str(run), "--real", nowhere, "--device", "cpu", "--against", nowhere)),
        lambda: evaluate.subject(arguments(evaluate, str(run)), torch.device("cpu")),
        lambda: list(importing.inspected(run, {})),
        lambda: [source.position_of(path) for path in run.rglob("*.safetensors")],
    )


def resume(path: Path) -> None:
    """What a run does that goes on in this folder, up to its first step; then the plan's forecast."""
    run = template()
    main.has_checkpoints(path)
    forecast(path, {"main": 48, "last": 96})
    main.check_folder(run.config, path, [])
    run.folder = RunFolder(path, run.config)
    run.checkpoint, run.step = None, 0
    run.folder.create()
    main.announce(run, run.resume())
    if run.checkpoint is not None:
        for stage in run.method.stages:
            run.begin(stage)
    main.write_down(run, PLAN, {})
    run.folder.open_log(run.seen_img)
    run.folder.row("train", run.seen_img, {"G/adv": 1.0})
    run.folder.close()


CLASSES = {
    "rows of report": Inputs(figures, read_figures),
    "rows of --against": Inputs(rows_file, read_rows),
    "run folder, read": Inputs(run_folder, read_folder),
    "run folder, resumed": Inputs(run_folder, resume),
}
