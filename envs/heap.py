"""Freed memory kept for the next chunk."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_BLOCK = 32 * 1024**2  # the most glibc allows
KEPT = 256 * 1024**2


def keep_freed_memory() -> bool:
    """Let the C library keep up to 256 MiB of freed memory instead of returning it to the system.

    A network's activations are megabytes that are freed and asked for again in every layer. By default each
    of them is mapped anew and every page of it faults, which cost a third of the time of imagination on the
    bundled world. Nothing is changed where the C library is not glibc.

    Returns:
        Whether it took effect.
    """
    return _set_thresholds(KEPT)


def return_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory`: back to the most that glibc comes to keep by itself, 64 MiB."""
    return _set_thresholds(2 * LARGEST_BLOCK)


def _set_thresholds(kept: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK), mallopt(M_TRIM_THRESHOLD, kept)])
