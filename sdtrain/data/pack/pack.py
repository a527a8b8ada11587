"""`sdtrain pack`: images to tar shards that are complete, checked, and readable by webdataset alone."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.data.pack.rejects import TooManyRejected, check_rejected, report, share
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, DataError
from sdtrain.files import sweep

if TYPE_CHECKING:
    from sdtrain.data.pack.packing import Job, ShardJob
    from sdtrain.data.pack.shaping import Shape
    from sdtrain.data.pack.sources import SourceFile

MB = 1_000_000
FILTER_NAMES = ("box", "bilinear", "hamming", "bicubic", "lanczos", "nearest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE OUT and how to make one from the other. The same command again continues where it stopped."""
    add = parser.add_argument
    add("source", help="folder of images (sub-folders too; also lsun's exported .webp folder) or a zip archive")
    add("out", nargs="?", help="folder for the shards, made if absent")
    add("--resolution", type=int, default=0, metavar="N", help="square images of N pixels (this, --tile or --keep)")
    add("--tile", type=int, default=0, metavar="N", help="cut every image into squares of N pixels (sub-images)")
    add("--stride", type=int, default=0, metavar="M", help="distance between tiles (default: that of --tile)")
    add("--keep", action="store_true", help="keep every image at its own size")
    crop = "what to do with images that are not square: cut out the middle, or reject (default: %(default)s)"
    add("--crop", choices=("center", "none"), default="none", help=crop)
    resize = "resize filter, recorded because FID depends on it (default: %(default)s)"
    add("--resize", choices=FILTER_NAMES, default="lanczos", help=resize)
    add("--enlarge", action="store_true", help="accept images smaller than --resolution")
    left_out = "largest share of the images that may be rejected, as 10%% or 0.1 (default: 10%%)"
    add("--max-rejected", type=share, default=0.1, metavar="SHARE", help=left_out)
    labels = "class of an image: its first folder, in name order (default: %(default)s)"
    add("--labels", choices=("none", "folder"), default="none", help=labels)
    form = "of the packed images; keep: the file's own bytes where nothing changes (default: %(default)s)"
    add("--format", choices=("png", "jpeg", "keep"), default="png", help=form)
    add("--quality", type=int, default=95, help="of JPEG, 1 to 100 (default: %(default)s)")
    add("--list", metavar="FILE", help="pack only the names in FILE (one a line)")
    add("--exclude-list", metavar="FILE", help="leave out the names in FILE")
    add("--shard-mb", type=int, default=256, metavar="MB", help="about this many MB a shard (default: %(default)s)")
    add("--shard-count", type=int, default=0, metavar="N", help="exactly this many shards (default: from --shard-mb)")
    bombs = "reject larger images, which may be decompression bombs (default: %(default)s)"
    add("--max-pixels", type=int, default=1 << 26, metavar="N", help=bombs)
    large = "reject images that would cost more memory than this, their file included (default: %(default)s)"
    add("--max-image-mb", type=int, default=512, metavar="MB", help=large)
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core, here %(default)s)")
    add("--overwrite", action="store_true", help="replace shards made with other choices, once the new ones are whole")
    reindex = "rebuild index and manifest of the shard folder SOURCE from its tars alone"
    add("--reindex", action="store_true", help=reindex)


def run(args: argparse.Namespace) -> int:
    """Entry of `sdtrain pack`. Raises DataError for what the user can mend."""
    if args.reindex:
        return _reindex(Path(args.source))
    check_arguments(args)
    try:
        with _sigterm_as_interrupt():
            return _pack(args)
    except OSError as error:
        raise DataError(
            f"packing into {args.out} failed: {error.strerror or error}; check rights and free space, then run again"
        ) from None


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A polite stop tidies up like Ctrl-C does; without this SIGTERM would end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise DataError for choices that cannot work together."""
    if not args.out:
        raise DataError("OUT is missing: sdtrain pack SOURCE OUT (only --reindex takes one folder)")
    if sum((args.resolution > 0, args.tile > 0, args.keep)) != 1:
        raise DataError(
            "choose exactly one of --resolution N, --tile N and --keep, so that the size of the images is a decision"
        )
    if not 1 <= args.quality <= 100:
        raise DataError(f"--quality {args.quality} is not between 1 and 100")
    if min(args.shard_mb, args.max_pixels, args.max_image_mb) < 1 or args.shard_count < 0:
        raise DataError(
            "--shard-mb, --max-pixels and --max-image-mb must be at least 1, --shard-count must not be negative"
        )
    if args.stride < 0 or (args.stride and not args.tile):
        raise DataError(f"--stride {args.stride} needs --tile N and a positive number of pixels")
    if Path(args.source).resolve() == Path(args.out).resolve():
        raise DataError(f"OUT is the source folder itself ({args.source}); choose another folder")


def _reindex(folder: Path) -> int:
    from sdtrain.data.pack.packing import reindex

    manifest, damage = reindex(folder)
    print(f"{folder}: {manifest['count']} images in {len(manifest['shards'])} shards, hash {manifest['hash'][:12]}")
    for shard, member, reason in damage[:20]:
        print(f"damaged: {shard} {member} {reason}", file=sys.stderr)
    return EXIT_USER_ERROR if damage else EXIT_OK


def _pack(args: argparse.Namespace) -> int:
    import shutil

    from sdtrain.data.pack.packing import MARKERS, plan_jobs

    files, label_names = _files(args)
    out, shape = Path(args.out), _shape(args)
    jobs = plan_jobs(Path(args.source), out, files, shape, _num_shards(args, files, shape))
    _refuse_other_shards(out, jobs[0].plan, args.overwrite)
    if manifest := complete(out, jobs):
        shutil.rmtree(out / MARKERS, ignore_errors=True)  # a crash in the last moment left it
        print(f"{out} is complete already and its digests are right; nothing to do")
    else:
        about = _about(args, shape, jobs[0].plan, len(files))
        with _tidied(out, jobs):
            manifest = _make(out, jobs, args, about, label_names)
    _summary(out, manifest, len(files))
    return EXIT_OK


def _make(
    out: Path, jobs: list[Job], args: argparse.Namespace, about: dict[str, Any], label_names: list[str]
) -> dict[str, Any]:
    """Pack what is not packed yet; the manifest. Raises TooManyRejected before anything in `out` is replaced."""
    from sdtrain.data.pack.packing import finish, finished

    num_files = about["num_source_files"]
    done = {job.number: marker for job in jobs if (marker := finished(job))}
    done |= _run([job for job in jobs if job.number not in done], num_files, args.workers)
    markers = [done[job.number] for job in jobs]
    rejected = [pair for marker in markers for pair in marker["rejected"]]
    check_rejected(rejected, num_files, sum(marker["count"] for marker in markers), args.max_rejected)
    return finish(out, markers, about, label_names)


@contextmanager
def _tidied(out: Path, jobs: list[Job]) -> Iterator[None]:
    """Make the working folder; see that a failure leaves nothing, or finished shards to continue from."""
    import shutil

    from sdtrain.data.pack.packing import MARKERS

    staged = out / MARKERS
    if staged.is_symlink():
        staged.unlink()  # whoever filled OUT may have led it elsewhere
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    if any(_plan_in(marker) != jobs[0].plan for marker in staged.glob("*.json")):
        shutil.rmtree(staged)
    try:
        staged.mkdir(parents=True, exist_ok=True)
        sweep(staged)
        yield
    except BaseException as error:
        kept = 0 if isinstance(error, TooManyRejected) else len(list(staged.glob("*.json")))
        sweep(staged)
        if kept:
            print(f"{kept} of {len(jobs)} shards are finished; the same command continues", file=sys.stderr)
        else:
            shutil.rmtree(staged, ignore_errors=True)
            _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Inner ones first; one that somebody has used meanwhile stays, with those around it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _files(args: argparse.Namespace) -> tuple[list[SourceFile], list[str]]:
    from sdtrain.data.pack.sources import list_source, select, with_folder_labels

    files = select(list_source(Path(args.source)), args.list, args.exclude_list)
    return with_folder_labels(files) if args.labels == "folder" else (files, [])


def _shape(args: argparse.Namespace) -> Shape:
    from sdtrain.data.pack.shaping import Shape

    return Shape(
        resolution=args.resolution,
        crop=args.crop,
        resize=args.resize,
        enlarge=args.enlarge,
        tile=args.tile,
        stride=args.stride or args.tile,
        format=args.format,
        quality=args.quality,
        max_pixels=args.max_pixels,
        max_image_mb=args.max_image_mb,
    )


def _num_shards(args: argparse.Namespace, files: list[SourceFile], shape: Shape) -> int:
    from sdtrain.data.pack.packing import estimated_bytes

    wanted = args.shard_count or round(estimated_bytes(files, shape) / (args.shard_mb * MB))
    return min(max(1, wanted), len(files))


def _refuse_other_shards(out: Path, plan: str, overwrite: bool) -> None:
    other = other_plan(out, plan)
    if other and not overwrite:
        raise DataError(f"{out} holds {other}; choose another folder, or replace it with --overwrite")


def other_plan(out: Path, plan: str) -> str:
    """What stands in the way in `out`: shards made by another plan, in words, or ""."""
    plans = {_plan_in(path) for path in (*(out / ".pack").glob("*.json"), *out.glob("manifest.json"))}
    if plans - {plan}:
        return "shards made from another source or with other choices"
    return "tar files that sdtrain pack did not make" if not plans and any(out.glob("*.tar")) else ""


def _plan_in(path: Path) -> str:
    from sdtrain.files import read_json

    try:
        found = read_json(path)
        return str(found.get("plan") or found.get("pack", {}).get("plan", ""))
    except (ValueError, AttributeError, RecursionError):
        return "damaged"


def complete(out: Path, jobs: Sequence[ShardJob]) -> dict[str, Any]:
    """The manifest of a folder that this very plan has filled and whose digests are right, else {}."""
    from sdtrain.data.read.manifest import read_manifest
    from sdtrain.data.read.remote import verified

    try:
        manifest = read_manifest(out)
    except DataError:
        return {}  # none, or one that --overwrite replaces
    shards = manifest["shards"]
    whole = manifest.get("pack", {}).get("plan") == jobs[0].plan and (out / "index.npz").is_file()
    whole = whole and [shard["name"] for shard in shards] == [job.path.name for job in jobs]
    return manifest if whole and all(verified(out / shard["name"], shard["sha256"]) for shard in shards) else {}


def _run(jobs: list[Job], num_files: int, num_processes: int) -> dict[int, dict[str, Any]]:
    from tqdm import tqdm

    from sdtrain.data.pack.packing import run_jobs

    done = num_files - sum(len(job.files) for job in jobs)
    with tqdm(total=num_files, initial=done, unit="img", desc="packing", mininterval=0.5) as bar:
        markers = run_jobs(jobs, num_processes, bar.update)
    return {job.number: marker for job, marker in zip(jobs, markers, strict=True)}


def _about(args: argparse.Namespace, shape: Shape, plan: str, num_files: int) -> dict[str, Any]:
    from dataclasses import asdict

    import PIL

    about = asdict(shape) | {
        "source": Path(args.source).name,
        "num_source_files": num_files,
        "plan": plan,
        "pillow": PIL.__version__,
    }
    about["resolution"] = args.resolution or args.tile or None
    about["list"] = args.list and Path(args.list).name
    about["exclude_list"] = args.exclude_list and Path(args.exclude_list).name
    return about


def _summary(out: Path, manifest: dict[str, Any], num_files: int) -> None:
    total_mb = sum(shard["size"] for shard in manifest["shards"]) / MB
    shards = f"{len(manifest['shards'])} shards, {total_mb:.1f} MB, hash {manifest['hash'][:12]}"
    print(f"{out}: {manifest['count']} images in {shards}")
    for reason, count in manifest.get("converted", {}).items():
        print(f"  converted to RGB: {count} ({reason})")
    for line in report(manifest.get("rejected", ()), num_files):
        print(line)
