"""Freed memory stays with the process on a CPU.

glibc hands large blocks back to the system at once and asks for them again: every tensor of more than 32 MB, and many
smaller ones, then begins with a page fault every 4 kB, which costs more than what is computed with it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1


def keep_freed_memory(env: Mapping[str, str] = os.environ) -> bool:
    """Tell glibc's allocator so; whoever has set it up in the environment, or has another one, keeps that."""
    if any(name.startswith("MALLOC_") for name in env) or "GLIBC_TUNABLES" in env or "LD_PRELOAD" in env:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
