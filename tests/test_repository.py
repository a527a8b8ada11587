"""What a person finds after cloning. Without these the promised commands and folders could be gone unnoticed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPO

FOLDERS = {"configs", "launch", "sdtrain", "shards", "slurm", "tests"}
FILES = {"LICENSE", "README.md", "pyproject.toml"}
TEXT = {".py", ".yaml", ".yml", ".sh", ".md", ".toml", ".json", ".txt", ""}
# Places and habits of the machines this was made on; they mean nothing to anybody else.
FOREIGN = (r"/(root|home|Users)/\w", r"\bissue #?\d", r"the other (engineer|session)", r"\bthe lead\b")


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in done.stdout.split("\0") if name and (REPO / name).is_file()]


def test_the_top_level_holds_what_it_promises_and_nothing_else():
    names = {path.relative_to(REPO).parts[0] for path in tracked()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= FOLDERS | FILES
    assert FILES | {"configs", "launch", "sdtrain", "tests"} <= visible


def test_shell_scripts_parse_and_can_be_run():
    scripts = [path for path in tracked() if path.suffix == ".sh"] + [REPO / ".ci" / "run"]
    assert len(scripts) > 2
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert b"\r" not in script.read_bytes(), script
        starts_itself = script.read_bytes().startswith(b"#!")
        assert os.access(script, os.X_OK) == starts_itself, f"{script.name}: #! and the right to run go together"


def test_no_file_names_the_machine_it_was_written_on():
    this = Path(__file__).resolve()
    found = []
    for path in tracked():
        if path.suffix in TEXT and path != this:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [
                f"{path.relative_to(REPO)}: {hit[0]}" for hit in map(lambda p: re.search(p, text), FOREIGN) if hit
            ]
    assert found == []


def test_no_file_is_a_pickle_or_an_archive():
    allowed = REPO / "tests" / "golden"
    suffixes = {".pkl", ".pickle", ".pth", ".pt", ".ckpt", ".tar", ".zip", ".whl"}
    assert [path for path in tracked() if path.suffix in suffixes and allowed not in path.parents] == []


def test_the_repository_stays_small():
    sizes = {str(path.relative_to(REPO)): path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 40e6, sorted(sizes.items(), key=lambda item: -item[1])[:10]


def test_ci_runs_the_command_of_the_readme():
    command = "bash launch/test.sh"
    assert command in (REPO / "README.md").read_text()
    assert command in (REPO / ".ci" / "run").read_text()
    assert "bash launch/quickstart.sh" in (REPO / "README.md").read_text()


def test_the_licence_is_apache_2():
    text = (REPO / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_quickstart_refuses_a_variant_that_does_not_exist_before_it_installs_anything(tmp_path: Path):
    env = {**os.environ, "SDTRAIN_VENV": str(tmp_path / "venv")}
    script = str(REPO / "launch" / "quickstart.sh")
    done = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("sdtrain: configs/quickstart_nonsense.yaml does not exist")
    assert not (tmp_path / "venv").exists()


def lib(tmp_path: Path, command: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "SDTRAIN_VENV": str(tmp_path / "venv"), **env}
    line = f'source "{REPO}/launch/lib.sh"; {command}'
    return subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, env=full)


def test_set_up_without_a_usable_python_says_what_it_looked_for(tmp_path: Path):
    done = lib(tmp_path, "setup_venv test", PYTHON="/no/such/python")
    assert done.returncode == 2
    assert done.stderr.startswith("sdtrain: no Python 3.10 or newer with venv was found (tried /no/such/python)")


def test_set_up_is_skipped_while_nothing_has_changed(tmp_path: Path):
    """A pip that refuses to work proves that it is not called; the stamp is the one that set-up itself writes."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    fake.write_text('#!/bin/sh\necho called >> "$(dirname "$0")/calls"\n')
    fake.chmod(0o755)
    first = lib(tmp_path, "setup_venv test; setup_venv test; setup_venv quickstart")
    assert first.returncode == 0, first.stderr
    assert (venv / "bin" / "calls").read_text().count("called") == 2
    assert first.stdout.count("== installing") == 2
    (venv / "installed-test").write_text("another pyproject.toml\n")
    assert "== installing sdtrain[test]" in lib(tmp_path, "setup_venv test").stdout


def test_set_up_that_fails_is_not_taken_for_done(tmp_path: Path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = lib(tmp_path, "setup_venv test")
    assert done.returncode == 2 and "run the command again to continue" in done.stderr
    assert not (venv / "installed-test").exists()
