"""The golden check: without these tests it might pass over what it never compared, and nobody would know."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402
import held_out  # noqa: E402
import rules  # noqa: E402

SDGAN = GOLDEN / "sdgan"
LOSS = "pg_loss.safetensors"


def folder(path: Path, files: dict[str, dict], **tensors: dict[str, Tensor]) -> Path:
    """A golden folder that lists `files` and holds the given tensors of NAME.safetensors."""
    (path / "manifest.json").write_text(json.dumps({"files": files, "rnd_rule": "base_seed = 1"}))
    for name, content in tensors.items():
        save_file(content, path / f"{name}.safetensors")
    return path


def loss_entry() -> dict:
    return json.loads((SDGAN / "manifest.json").read_text())["files"][LOSS]


def verdicts(lines: list[check.Line]) -> dict[str, tuple[str, str]]:
    return {f"{line.file} {line.output}": (line.verdict, line.detail) for line in lines}


def test_a_changed_number_fails_and_what_is_missing_is_short(tmp_path: Path, capsys) -> None:
    tensors = load_file(SDGAN / LOSS)
    tensors["out.G"] *= 1 + 2 * loss_entry()["tol"]["max_abs_diff_over_max_abs_ref"]
    files = {LOSS: loss_entry(), "unknown.safetensors": {}, "gone.safetensors": {}}
    folder(tmp_path, files, pg_loss=tensors, unknown=tensors)
    assert check.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "2 ok, 2 short, 0 not comparable, 1 failed"
    assert [line.split()[1] for line in printed if line.endswith("failed")][0] == "out.G"
    assert "no adapter for it" in printed[3] and "file not in this folder" in printed[4]


def test_a_stored_or_listed_output_that_no_adapter_computes_is_short(tmp_path: Path) -> None:
    entry = loss_entry()
    entry["tensors"]["out.lost"] = [[], "float32"]
    entry["expected"] = {"margin": {"real": 1.0}, "note": "words are no numbers"}
    tensors = load_file(SDGAN / LOSS)
    folder(
        tmp_path,
        {LOSS: entry},
        pg_loss={**tensors, "out.new": tensors["out.G"].clone(), "odd": tensors["out.D_real"].clone()},
    )
    short = [line.output for line in check.run(tmp_path) if line.verdict == check.SHORT]
    assert short == ["margin.real", "odd", "out.lost", "out.new"]


def test_a_check_that_compares_nothing_does_not_pass(tmp_path: Path) -> None:
    folder(tmp_path, {})
    assert check.main([str(tmp_path)]) == 1
    assert check.main([str(SDGAN), "no_such_file*"]) == 1


@pytest.fixture(scope="module")
def other_numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same format with seeds, sizes, options and names of its own."""
    path = tmp_path_factory.mktemp("held_out")
    held_out.write(path)
    return path


def test_a_folder_with_other_seeds_sizes_and_options_is_ok_throughout(other_numbers: Path) -> None:
    lines = check.run(other_numbers)
    assert [str(line) for line in lines if line.verdict != check.OK] == []
    assert {line.file.removesuffix(".safetensors") for line in lines} == held_out.FILES.keys()


@pytest.mark.parametrize("name", sorted(held_out.FILES))
def test_every_disturbed_output_of_that_folder_is_found(other_numbers: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(other_numbers / f"{name}.safetensors")
    outputs = sorted(key for key in tensors if key.startswith(check.OUTPUT_PREFIXES))
    for key in outputs:
        tensors[key] = tensors[key] + 0.05 * tensors[key].abs().max() + 0.001
    save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "manifest.json").write_text((other_numbers / "manifest.json").read_text())
    lines = check.run(tmp_path, [f"{name}.safetensors"])
    assert sorted(line.output for line in lines if line.verdict == check.FAILED and line.output in outputs) == outputs


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lrelu alpha=.3 gain=.9", "gain", 0.9),
        ("torch.manual_seed(1003) then", "manual_seed", 1003),
        ("res16, mbstd group 32 (> batch)", "mbstd group", 32),
        ("heads4, dim16", "dim", 16),
        ("w_dim=512", "dim", 512),
        ("tol=1e-4", "tol", 1e-4),
    ],
)
def test_numbers_are_found_in_the_words_of_a_manifest(text: str, name: str, value: float) -> None:
    assert rules.number(text, name) == value


def test_a_text_without_the_number_says_so() -> None:
    with pytest.raises(ValueError, match="gives no number to 'clamp'"):
        rules.number("gain=2", "clamp")
