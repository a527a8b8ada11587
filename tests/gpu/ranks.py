"""`sdtrain/main.py` as one of several ranks that share the first GPU, which nccl refuses: gloo carries tensors."""

from __future__ import annotations

import os
import sys

os.environ["LOCAL_RANK"] = "0"  # before anything asks which GPU is this rank's

from sdtrain.engine import ranks  # noqa: E402
from sdtrain.exits import part  # noqa: E402
from sdtrain.main import main  # noqa: E402

ranks.BACKENDS["cuda"] = "gloo"
sys.exit(part(main()))
