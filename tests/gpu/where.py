"""Where these tests compute: on a GPU, or with SDTRAIN_TEST_DEVICE=cpu on the CPU, which tries the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("SDTRAIN_TEST_DEVICE", "cuda")
ABSENT = DEVICE != "cpu" and not torch.cuda.is_available()
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(ABSENT, reason="needs a CUDA device, and torch sees none; SDTRAIN_TEST_DEVICE=cpu tries it"),
]
only_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="says something of a GPU alone")
