"""Run by torchrun on two ranks: who reads what at a start, and who says what is wrong; see test_scale.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sdtrain import plan as plan_module
from sdtrain import weights
from sdtrain.engine.ranks import by_all, by_main, first_said, from_main, rank, start_ranks, tensors_from_main, world
from sdtrain.engine.shared import read_by_main, shared_digest
from sdtrain.errors import DataError, UserError
from sdtrain.exits import part, run_command
from sdtrain.main import main


def told(function: Any) -> str:
    try:
        function()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refuse() -> Any:
    raise DataError("it holds 47 samples")


def helpers(place: Path) -> None:
    assert from_main(rank() + 5) == 5
    assert first_said("") is None and first_said("rank 1 speaks" if rank() else "") == "rank 1 speaks"
    mine = {"a": torch.arange(3), "b": torch.ones((), dtype=torch.float64)} if rank() == 0 else None
    found = tensors_from_main(mine)
    assert found is not None and found["a"].tolist() == [0, 1, 2] and found["b"].dtype == torch.float64
    assert tensors_from_main(None) is None
    reads: list[int] = []
    tensors = read_by_main(lambda: reads.append(1) or {"x": torch.full((2,), 7.0)})
    assert tensors is not None and tensors["x"].tolist() == [7.0, 7.0] and len(reads) == 1 - rank()
    assert told(lambda: by_main(refuse)) == "DataError: it holds 47 samples"
    assert told(lambda: by_all(refuse if rank() else lambda: 3)).endswith("rank 1: it holds 47 samples")
    assert by_all(lambda: rank()) == rank()
    assert run_command(lambda: by_main(refuse)) == 2  # said once
    if rank() == 0:
        place.write_bytes(b"0" * 4096)
    with mock.patch.object(weights, "sha256_of_file", side_effect=weights.sha256_of_file) as hashed:
        assert len(shared_digest("lpips_vgg", str(place))) == 64
    assert hashed.call_count == 1 - rank()


def a_start(job: dict[str, Any]) -> None:
    """Data and files are looked at by the main rank alone, and the run is that of any other start."""
    with (
        mock.patch("sdtrain.plan.check_data", side_effect=plan_module.check_data) as data,
        mock.patch("sdtrain.plan.check_weights_needed", return_value={}) as needed,
        mock.patch("sdtrain.plan.make_plan", return_value={}) as plan,
    ):
        assert main(["--cfg", job["cfg"], "--out", job["out"]]) == 0
    calls = (data.call_count, needed.call_count, plan.call_count)
    assert calls == ((1, 1, 1) if rank() == 0 else (0, 0, 0)), calls


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["SDTRAIN_CPU"] = "1"
    start_ranks("cpu")
    assert world() == 2
    helpers(Path(job["weights"]))
    a_start(job)
    part(0)
