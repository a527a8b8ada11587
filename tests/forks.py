"""Children of a fork that compute."""

from __future__ import annotations

import sys


def renew_threads() -> None:
    """To be called first in the child. Torch's pool of threads does not live through a fork.

    Whoever asks for it first makes another. Threads of autograd ask together, and one that finds none while another
    makes it aborts the process (pytorch/pytorch#178535); here nobody else can ask.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())
