"""What a GPU would be asked to do, seen without one: devices and types of all operations of every method, and how often
the host waits. Without this the first step on a GPU could end with an error, or wait for the device a thousand times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, run_python

sys.path.insert(0, str(REPO / "tests" / "fakecuda"))
import table  # noqa: E402

# of one step with every lazy phase due, in the small networks of fakecuda/cases.py; none above what was counted
LAUNCHES = {
    "projected baseline": 1750,
    "projected SD, LPIPS, T": 2100,
    "stylegan2 SD": 1300,
    "stylegan2 R1, path length": 2900,
    "stylegan2 ADA, T": 1450,
    "r3gan": 1100,
    "stylenat bCR, R1": 4300,
    "Real-ESRGAN / teacher_pixel": 670,
    "Real-ESRGAN / teacher": 1470,
    "Real-ESRGAN / supervised": 1230,
    "Real-ESRGAN / adversarial": 1550,
    "GCFSR / teacher_pixel": 483,
    "GCFSR / teacher": 1533,
    "GCFSR / supervised": 1000,
    "GCFSR / adversarial": 1699,
}
MOST_WAITS = 2  # the flags of the step before, and the numbers that steer the next one
MOST_COPIES = 60


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if torch.version.cuda is None:
        pytest.skip("needs a build of torch with CUDA; this one has none")
    try:
        env = table.environment()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    seen = run_python("-c", "import torch; print(torch.cuda.device_count())", env=env)
    if seen.stdout.strip() != "1":
        pytest.skip(f"the stub does not fit this torch: {seen.stderr.strip()[-200:]}")
    file = tmp_path_factory.mktemp("counted") / "found.json"
    done = run_python("tests/fakecuda/table.py", "--modes", "fast,bf16", "--json", str(file), env=env, timeout=900)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("mode", ["fast", "bf16"])
def test_every_method_and_stage_takes_a_step_without_a_mismatch_of_device_or_type(found: Any, mode: str) -> None:
    assert {name: row[mode]["error"] for name, row in found["steps"].items() if "error" in row[mode]} == {}
    assert found["steps"].keys() == LAUNCHES.keys()


def test_pictures_metrics_and_tiles_are_made_on_a_gpu_without_a_mismatch(found: Any) -> None:
    assert found["beside"] and {name: said for name, said in found["beside"].items() if said} == {}


def test_a_step_waits_for_the_gpu_at_most_twice_and_copies_nothing_else_that_blocks(found: Any) -> None:
    rows = {name: row["fast"] for name, row in found["steps"].items()}
    assert {name: row["where"] for name, row in rows.items() if row["waits"] > MOST_WAITS} == {}
    assert {name: row["copies"] for name, row in rows.items() if row["copies"] > MOST_COPIES} == {}


def test_no_method_launches_more_operations_than_it_may(found: Any) -> None:
    rows = {name: row["fast"]["launches"] for name, row in found["steps"].items()}
    assert {name: count for name, count in rows.items() if count > LAUNCHES[name]} == {}


def test_what_stands_for_a_gpu_counts_waits_copies_and_launches_and_refuses_mixed_types(tmp_path: Path) -> None:
    program = tmp_path / "counted.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPO / 'tests' / 'fakecuda')!r})\n"
        "import torch\n"
        "from gpu import WrongType, gpu\n"
        "with gpu() as device:\n"
        "    x = torch.ones(4, 4).to('cuda', non_blocking=True)\n"
        "    assert (device.copies.total(), device.waits.total()) == (1, 0)\n"
        "    y = (x @ x).relu_()[0]\n"
        "    assert device.launches.total() == 2\n"
        "    waits = [lambda: y.sum().item(), lambda: bool(y.all()), lambda: y[:1].tolist(), lambda: y.cpu(),\n"
        "             lambda: torch.tensor([1.0], device='cuda'), lambda: x[[0, 2]], lambda: torch.linalg.inv(x),\n"
        "             lambda: x.new_tensor([3]), lambda: torch.ones(2).to('cuda')]\n"
        "    for number, wait in enumerate(waits, 1):\n"
        "        wait()\n"
        "        assert device.waits.total() == number, (number, device.waits)\n"
        "    try:\n"
        "        x @ x.bfloat16()\n"
        "    except WrongType:\n"
        "        print('refused')\n"
    )
    try:
        env = table.environment()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    done = run_python(str(program), env=env)
    assert done.stdout == "refused\n", done.stdout + done.stderr
