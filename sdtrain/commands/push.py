"""`sdtrain export ... --push OWNER/NAME`: an export folder to huggingface.co, whole or not at all.

What is uploaded is what export.json lists, with its digests, and the card, the cards of networks and the picture.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from sdtrain.commands.export_card import PICTURE
from sdtrain.commands.export_folder import CARD, PROOF
from sdtrain.errors import ConfigError, RunError
from sdtrain.files import read_json, sha256_of_file

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
HUB = "huggingface.co"


def require_hub(repo: str, dry_run: bool) -> None:
    """Raise ConfigError for a name that is none, and unless the package that uploads is there."""
    if not REPO.fullmatch(repo):
        raise ConfigError(f"--push {repo!r:.99} is no repository; give OWNER/NAME, as on {HUB}")
    if not dry_run and importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError("--push needs the package huggingface_hub; pip install 'sdtrain[hub]'")


def push(folder: Path, repo: str, dry_run: bool = False) -> None:
    """Upload, or say what would be. Raises RunError for a folder that is no whole export, ConfigError offline."""
    names = whole(folder)
    size = sum((folder / name).stat().st_size for name in names)
    print("\n".join(f"{(folder / name).stat().st_size:>12,}  {name}" for name in names))
    if dry_run:
        print(f"dry run: {len(names)} files, {size / 1e6:.1f} MB, would go to {HUB}/{repo}; nothing was sent")
        return
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=names, commit_message="sdtrain export")
    except Exception as error:  # what a missing network, a token or a quota raise has no common base
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{HUB} did not take {folder} ({type(error).__name__}: {first:.200}); the folder is complete: once this "
            f"machine reaches it and `hf auth login` was done, say sdtrain export {folder} --push {repo}"
        ) from error
    print(f"{len(names)} files, {size / 1e6:.1f} MB, are at {HUB}/{repo}")


def whole(folder: Path) -> list[str]:
    """Names of the files of an export. Raises RunError where one is missing or another than it was proved as."""
    try:
        proof = read_json(folder / PROOF)
        digests = {str(row["file"]): row["sha256"] for row in proof["artefacts"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{folder} is no export: its {PROOF} cannot be used; make one with sdtrain export RUN --to DIR"
        ) from error
    for name, digest in digests.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file() or sha256_of_file(path) != digest:
            raise RunError(f"{folder}: {name!r:.99} is not the file that {PROOF} speaks of; export again")
    cards = {f"{Path(name).stem}.json" for name in digests}
    return sorted(path.name for path in folder.iterdir() if path.name in {CARD, PROOF, PICTURE, *digests, *cards})
